"""Matthews correlation coefficient (Matthews 1975): 1 perfect, 0 no better than chance, also when classes are skewed.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/mcc.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


def mcc(predictions: Sequence[int], references: Sequence[int]) -> float:
    """The metric of class indices, as scikit-learn computes it; 0 (without its warning) where one class is all there is."""
    if len({*predictions, *references}) < 2:
        return 0.0
    return float(matthews_corrcoef(references, predictions))


class MCC(evaluate.Metric):
    """The same as an ``evaluate.Metric``: ``compute(predictions=..., references=...)``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class indices of equal length",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        return {"mcc": mcc(predictions, references)}
