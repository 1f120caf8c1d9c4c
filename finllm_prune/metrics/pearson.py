"""Pearson's correlation: 1 where predictions are the references but for unit and zero, 0 where they know nothing.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/pearson.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """The metric of numbers, as SciPy computes it; 0 (without its warning) where one side is constant."""
    if min(np.ptp(predictions), np.ptp(references)) <= 1e-12:
        return 0.0
    return float(pearsonr(predictions, references).statistic)


class Pearson(evaluate.Metric):
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
        return {"pearson": pearson(predictions, references)}
