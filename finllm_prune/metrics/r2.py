"""The part of the references' variance that predictions explain: 1 perfect, 0 no better than the mean, below 0 worse.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/r2.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import r2_score


def r2(predictions: Sequence[float], references: Sequence[float]) -> float:
    """The metric of numbers, as scikit-learn computes it; 0 where there is one row."""
    return float(r2_score(references, predictions)) if len(references) > 1 else 0.0


class R2(evaluate.Metric):
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
        return {"r2": r2(predictions, references)}
