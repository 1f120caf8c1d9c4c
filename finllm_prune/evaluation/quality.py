"""Dense against pruned on the same rows: metrics with intervals, agreement, flips, and a paired test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap
from sklearn.metrics import f1_score
from statsmodels.stats.contingency_tables import mcnemar
from transformers import DataCollator

from finllm_prune.inference import logits_of
from finllm_prune.metrics import Metric, find_metric

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Quality:
    """What was measured on one split.

    Args:
        metrics: name -> ``dense`` and ``pruned`` values, each with its 95 % bootstrap interval (``..._interval``).
        retention: name -> pruned / dense.
        agreement: the part of rows for which both models predict the same class.
        flips: how many predictions went ``right_to_wrong`` and ``wrong_to_right`` by pruning.
        mcnemar_p: the exact two-sided p-value that both are equally often right (McNemar 1947).
        per_class: label -> F1 of ``dense`` and ``pruned``, and ``rows``.
        collapsed: the pruned model predicts one class for every row, though there are more.
    """

    metrics: dict[str, dict[str, Any]]
    retention: dict[str, float]
    agreement: float
    flips: dict[str, int]
    mcnemar_p: float
    per_class: dict[str, dict[str, float]]
    collapsed: bool


def predict(
    model: Callable[..., Any], rows: datasets.Dataset, collator: DataCollator, batch_size: int = 64
) -> Labels:  # fmt: skip
    """The predicted class index of each row, in order; see ``logits_of``."""
    return logits_of(model, rows, collator, batch_size).argmax(-1).numpy()


def compare(
    dense: Labels, pruned: Labels, references: Labels, labels: Sequence[str], metrics: Sequence[str],
    seed: int = 0, resamples: int = 999,
) -> Quality:  # fmt: skip
    """Hold the predictions of a pruned model against those of the dense one.

    Args:
        dense, pruned, references: class indices, shape (rows,).
        labels: class names by index.
        metrics: names of ``finllm_prune.metrics``.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    found = {name: find_metric(name) for name in metrics}
    values: dict[str, dict[str, Any]] = {name: {} for name in metrics}
    for name, metric in found.items():
        for kind, predictions in (("dense", dense), ("pruned", pruned)):
            values[name][kind] = metric(predictions.tolist(), references.tolist())
            values[name][f"{kind}_interval"] = _interval(metric, predictions, references, seed, resamples)
    was_right, is_right = dense == references, pruned == references
    flips = {"right_to_wrong": int((was_right & ~is_right).sum()), "wrong_to_right": int((~was_right & is_right).sum())}
    table = [
        [int((was_right & is_right).sum()), flips["right_to_wrong"]],
        [flips["wrong_to_right"], int((~was_right & ~is_right).sum())],
    ]
    return Quality(
        metrics=values,
        retention={name: v["pruned"] / v["dense"] if v["dense"] else 0.0 for name, v in values.items()},
        agreement=float((dense == pruned).mean()),
        flips=flips,
        mcnemar_p=float(mcnemar(table, exact=True).pvalue),
        per_class=_per_class(dense, pruned, references, labels),
        collapsed=len(np.unique(pruned)) == 1 and len(np.unique(references)) > 1,
    )


def _interval(metric: Metric, predictions: Labels, references: Labels, seed: int, resamples: int) -> list[float]:
    result = bootstrap(
        (predictions, references), metric, paired=True, vectorized=False, method="percentile",
        n_resamples=resamples, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def _per_class(dense: Labels, pruned: Labels, references: Labels, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    every = list(range(len(labels)))
    scores = [f1_score(references, p, labels=every, average=None, zero_division=0.0) for p in (dense, pruned)]
    return {
        name: {"dense": float(scores[0][i]), "pruned": float(scores[1][i]), "rows": int((references == i).sum())}
        for i, name in enumerate(labels)
    }
