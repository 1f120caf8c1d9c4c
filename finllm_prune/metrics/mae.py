"""The mean absolute error of predicted numbers, in their own unit: 0 is perfect.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/mae.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import mean_absolute_error


def mae(predictions: Sequence[float], references: Sequence[float]) -> float:
    """The metric of numbers, as scikit-learn computes it."""
    return float(mean_absolute_error(references, predictions))


class MAE(evaluate.Metric):
    """The same as an ``evaluate.Metric``: ``compute(predictions=..., references=...)``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: numbers of equal length",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, Any]:
        return {"mae": mae(predictions, references)}
