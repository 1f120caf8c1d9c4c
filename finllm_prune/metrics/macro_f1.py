"""The unweighted mean of the F1 scores of all classes that occur: rare classes count as much as frequent ones.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/macro_f1.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score


def macro_f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """The metric of class indices, or of 0 and 1 for each of several labels (rows, labels), as scikit-learn computes it."""
    # Of several labels scikit-learn would count one that does not occur as 0.
    return float(np.nan_to_num(f1_score(references, predictions, average="macro", zero_division=np.nan)))


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
