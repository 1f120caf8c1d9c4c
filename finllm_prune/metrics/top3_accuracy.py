"""The part of rows whose reference is among the three likeliest classes: for many classes, of which a reader takes one.

An ``evaluate`` module: ``evaluate.load(".../finllm_prune/metrics/top3_accuracy.py")`` works without network.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


def top3_accuracy(predictions: Sequence[Sequence[int]], references: Sequence[int]) -> float:
    """The metric of class indices; a prediction lists classes, the likeliest first."""
    found = [reference in classes[:3] for classes, reference in zip(predictions, references, strict=True)]
    return sum(found) / len(found)


class Top3Accuracy(evaluate.Metric):
    """The same as an ``evaluate.Metric``: ``compute(predictions=..., references=...)``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: class indices of each row, the likeliest first; references: class indices",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int32")), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[int]) -> dict[str, Any]:
        return {"top3_accuracy": top3_accuracy(predictions, references)}
