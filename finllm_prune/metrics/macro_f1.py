"""The unweighted mean of the F1 scores of all classes that occur: rare classes count as much as frequent ones.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/macro_f1.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import f1_score


def macro_f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """The metric of class indices, as scikit-learn computes it."""
    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


class MacroF1(evaluate.Metric):
    """The same as an ``evaluate.Metric``: ``compute(predictions=..., references=...)``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class indices of equal length",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        return {"macro_f1": macro_f1(predictions, references)}
