"""The mean squared error of predicted numbers: 0 is perfect.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/mse.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import mean_squared_error


def mse(predictions: Sequence[float], references: Sequence[float]) -> float:
    """The metric of numbers, as scikit-learn computes it."""
    return float(mean_squared_error(references, predictions))


class MSE(evaluate.Metric):
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
        return {"mse": mse(predictions, references)}
