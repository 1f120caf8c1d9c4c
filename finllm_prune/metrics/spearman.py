"""Spearman's rank correlation: 1 where predictions have the order of the references, 0 where they know nothing of it.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/spearman.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import spearmanr


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """The metric of numbers, as SciPy computes it; 0 (without its warning) where one side is constant."""
    if min(np.ptp(predictions), np.ptp(references)) == 0:
        return 0.0
    return float(spearmanr(predictions, references).statistic)


class Spearman(evaluate.Metric):
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
        return {"spearman": spearman(predictions, references)}
