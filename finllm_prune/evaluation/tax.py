"""The compression tax: pruning takes more from some classes than from others (Hooker et al. 2020)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finllm_prune.evaluation.quality import Quality
from finllm_prune.judges import Answers, ClassJudge, Judge


def tax(
    quality: Quality, judge: Judge, dense: Answers, pruned: Answers, seed: int = 0, resamples: int = 999
) -> list[dict[str, Any]]:  # fmt: skip
    """The class that pays most first.

    Args:
        quality: of these answers.
        judge: whose they are.
        dense, pruned: what the models answered.
        seed, resamples: of the bootstrap.

    Returns:
        For each class ``label``, ``rows``, the F1 of ``dense`` and ``pruned``, their ``difference`` and its 95 % bootstrap
        ``interval``, over the same rows of both; None where a row may have several classes.
    """
    intervals: dict[str, list[float]] = {}
    if isinstance(judge, ClassJudge):
        drawn = _differences(judge, dense, pruned, seed, resamples)
        ends = np.percentile(drawn, [2.5, 97.5], axis=0).T.tolist()
        intervals = dict(zip(judge.labels, ends, strict=True))
    rows = [
        {"label": label, **each, "difference": each["pruned"] - each["dense"], "interval": intervals.get(label)}
        for label, each in quality.per_class.items()
    ]
    return sorted(rows, key=lambda row: row["difference"])


def _differences(
    judge: ClassJudge, dense: Answers, pruned: Answers, seed: int, resamples: int
) -> NDArray[np.float64]:  # fmt: skip
    """Shape (resamples, classes)."""
    random = np.random.default_rng(seed)
    found = np.empty((resamples, len(judge.labels)))
    for draw in found:
        rows = random.integers(len(judge), size=(1, len(judge)))
        draw[:] = judge.f1(pruned, rows)[0] - judge.f1(dense, rows)[0]
    return found
