"""Dense against pruned on the same rows: metrics with intervals, agreement, flips, and a paired test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.judges import Indices, Judge

_DRAWS = 100  # at a time, so that a million rows take no more than a gigabyte or two


@dataclass(frozen=True)
class Quality:
    """What was measured on one split.

    Args:
        metrics: name -> ``dense`` and ``pruned`` values and their ``difference`` (pruned - dense), each with its 95 % bootstrap
            interval (``..._interval``), the difference's over the same units of both. Where a first stage has decided before
            them also ``first_stage``, and what either model adds: ``dense_above_first_stage``, ``pruned_above_first_stage``.
        retention: name -> pruned / dense; 0 where the dense value is not above 0, of which no part can be kept.
        agreement: the part of units (rows, or queries) for which both models decide the same.
        flips: how many units lost and won by pruning: ``right_to_wrong`` and ``wrong_to_right`` where there is a right answer.
        paired_test: the name of the test that neither model is better.
        paired_p: its two-sided p-value.
        per_class: label -> F1 of ``dense`` and ``pruned``, and ``rows``; empty where there are no classes.
        collapsed: the pruned model says the same to every row, though it should not.
        unit: what agreement and flips count: rows, or queries.
    """

    metrics: dict[str, dict[str, Any]]
    retention: dict[str, float]
    agreement: float
    flips: dict[str, int]
    paired_test: str
    paired_p: float
    per_class: dict[str, dict[str, float]]
    collapsed: bool
    unit: str = "row"

    @property
    def collapse(self) -> str:
        """What a collapsed model does."""
        return "scores all passages of a query alike" if self.unit == "query" else "gives every text the same answer"


def compare(judge: Judge, dense: Tensor, pruned: Tensor, seed: int = 0, resamples: int = 999) -> Quality:
    """Hold the logits of a pruned model against those of the dense one.

    Args:
        judge: of the split.
        dense, pruned: logits, shape (rows, outputs), see ``logits_of``.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        InputError: there is one unit.
    """
    refuse_one_unit(judge)
    answers = {"dense": judge.answers(dense), "pruned": judge.answers(pruned)}
    found = judge.without_model()
    values: dict[str, dict[str, Any]] = {name: {} for name in judge.metrics}
    for name, value in values.items():
        draws = {}
        for kind, given in (answers if found is None else answers | {"first_stage": found}).items():

            def metric(draws: Indices, axis: int, name: str = name, given: Any = given) -> NDArray[np.float64]:
                return judge.values(name, given, draws)

            value[kind] = judge.value(name, given)
            draws[kind] = _resampled(metric, len(judge), seed, resamples)
            value[f"{kind}_interval"] = _interval(draws[kind])
        pairs = {"difference": ("pruned", "dense")}
        if found is not None:
            pairs |= {f"{kind}_above_first_stage": (kind, "first_stage") for kind in answers}
        for what, (one, other) in pairs.items():
            value[what] = value[one] - value[other]
            value[f"{what}_interval"] = _interval(draws[one] - draws[other])  # both of the same units each time
    was, now = (judge.worth(given) for given in answers.values())
    test, p = judge.paired_test(**answers)
    return Quality(
        metrics=values,
        retention={name: v["pruned"] / v["dense"] if v["dense"] > 0 else 0.0 for name, v in values.items()},
        agreement=float(judge.same(*answers.values()).mean()),
        flips=dict(zip(judge.flips, (int((now < was).sum()), int((now > was).sum())), strict=True)),
        paired_test=test,
        paired_p=p,
        per_class=judge.per_class(**answers),
        collapsed=judge.collapsed(answers["pruned"]),
        unit=judge.unit,
    )


def refuse_one_unit(judge: Judge) -> None:
    """Intervals are drawn from several."""
    if len(judge) < 2:
        raise InputError(
            f"task.dataset: the test split has {len(judge)} {judge.unit}, and two models are compared by two or more; add some"
        )


def _resampled(
    metric: Callable[..., NDArray[np.float64]], units: int, seed: int, resamples: int
) -> NDArray[np.float64]:  # fmt: skip
    result = bootstrap(
        (np.arange(units),), metric, vectorized=True, method="percentile", batch=_DRAWS,
        n_resamples=resamples, rng=np.random.default_rng(seed),
    )  # fmt: skip
    draws: NDArray[np.float64] = result.bootstrap_distribution
    return draws


def _interval(draws: NDArray[np.float64]) -> list[float]:
    """The middle 95 % of them."""
    return [float(end) for end in np.percentile(draws, [2.5, 97.5])]
