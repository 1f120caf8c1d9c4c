"""F1 over all rows together: frequent classes count more than rare ones; with one label per row it equals the accuracy.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/micro_f1.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import f1_score


def micro_f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """The metric of class indices, or of 0 and 1 for each of several labels (rows, labels), as scikit-learn computes it."""
    return float(f1_score(references, predictions, average="micro", zero_division=0.0))


class MicroF1(evaluate.Metric):
    """The same as an ``evaluate.Metric``: ``compute(predictions=..., references=...)``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class indices of equal length",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        return {"micro_f1": micro_f1(predictions, references)}
