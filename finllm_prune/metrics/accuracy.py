"""The part of predictions that equal their reference.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/accuracy.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    """The metric of class indices, or of 0 and 1 for each of several labels (rows, labels), as scikit-learn computes it."""
    return float(accuracy_score(references, predictions))


class Accuracy(evaluate.Metric):
    """The same as an ``evaluate.Metric``: ``compute(predictions=..., references=...)``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class indices of equal length",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        return {"accuracy": accuracy(predictions, references)}
