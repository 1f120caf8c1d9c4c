"""Is the pruned model worse than the dense one by more than a margin? The question before one replaces the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from finllm_prune.errors import InputError

Verdict = Literal["not worse", "worse", "not shown"]
_TINY = 1e-12  # of a margin's square: where two models err alike there is no variance


@dataclass(frozen=True)
class NonInferiority:
    """What is asked.

    Args:
        margin: how much worse is still good enough, in the units of a unit's worth: 0.01 is a point of accuracy or nDCG; of
            squared errors it may be above 1.
        alpha: how often a pruned model that is worse by the margin may pass, over all sets together.
    """

    margin: float = 0.01
    alpha: float = 0.05

    def __post_init__(self) -> None:
        refuse_none(self.margin, "non_inferiority.margin")
        if not 0 < self.alpha < 0.5:
            raise InputError(f"non_inferiority.alpha: it lies between 0 and 0.5, as {self.alpha:g} does not")


def refuse_none(margin: float, key: str) -> None:
    """A margin is a number above 0."""
    if not 0 < margin < math.inf:
        raise InputError(f"{key}: it is above 0 (0.01 is a point), as {margin:g} is not")


def refuse_wide(margin: float, task: object, key: str) -> None:
    """A worth from 0 to 1 cannot be less by 1 or more; only squared errors of scores can."""
    if margin >= 1 and getattr(task, "scores", None) is None:
        raise InputError(f"{key}: it lies between 0 and 1 (0.01 is a point), as {margin:g} does not")


@dataclass(frozen=True)
class Outcome:
    """What was found on one set.

    Args:
        margin: that was asked.
        difference: the mean worth of pruned minus that of dense.
        interval: of the difference, two-sided at 1 - 2 alpha; the lower end above -margin is what the test asks.
        p: one-sided, that such a difference comes of a model which is worse by the margin.
        units_needed: with which a model exactly as good as the dense one would be shown not to be worse in four of five
            samples, at the variance found here.
    """

    margin: float
    difference: float
    interval: list[float]
    p: float
    units_needed: int

    def verdict(self, p: float, alpha: float) -> Verdict:
        """``p``: as corrected for the number of sets."""
        if p < alpha:
            return "not worse"
        return "worse" if self.interval[1] < -self.margin else "not shown"


def not_worse(
    dense: NDArray[np.float64], pruned: NDArray[np.float64], asked: NonInferiority, bounded: bool = True
) -> Outcome:
    """The one-sided paired test of "pruned is worse by ``margin`` or more" against "it is not".

    A t test of the units' differences in worth, shifted by the margin (Schuirmann 1987). Where answers are right or wrong and
    few of them flip, there is hardly any variance, and such a test is sure of anything: of 50 rows it lets a model that is a
    point worse pass in 60 samples of 100. Hence two guards: the variance is at least ``margin * (1 - margin)``, the least that
    right or wrong answers have when the model is worse by the margin (what the restricted variance of Nam 1997 and Tango 1998
    comes to when nothing flipped), and one unit more counts as lost. With them it is at most 5 of 100, from 50 to 5,000 rows.
    Errors and likelihoods are in a unit of their own and go without guards, so that the verdict is the same in any unit.

    Args:
        dense, pruned: the worth of each unit, shape (units,).
        asked: margin and level.
        bounded: whether the worth lies from 0 to 1, as what is right or wrong and nDCG do.
    """
    difference = pruned - dense
    units, mean = len(difference), float(difference.mean())
    freedom = max(1, units - 1)
    least = asked.margin * (1 - asked.margin) if bounded else asked.margin**2 * _TINY
    one = 1.0 if bounded else 0.0  # a unit more that counts as lost
    variance = max(float(difference.var()) * units / freedom, least)
    error = math.sqrt(variance / units)
    reach = float(stats.t.isf(asked.alpha, freedom)) * error + one / units
    # Of n units: margin - one / n is to be so many standard errors.
    errors = float(stats.norm.isf(asked.alpha) + stats.norm.ppf(0.8)) * math.sqrt(variance)
    return Outcome(
        margin=asked.margin,
        difference=mean,
        interval=[mean - reach, mean + reach],
        p=float(stats.t.sf((mean - one / units + asked.margin) / error, freedom)),
        units_needed=math.ceil(((errors + math.sqrt(errors**2 + 4 * one * asked.margin)) / (2 * asked.margin)) ** 2),
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that no false one among them is believed more often than alpha (Holm 1979).

    As statsmodels' ``multipletests``, which collects the garbage of the whole process each time.
    """
    order = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in corrected]


def points(margin: float) -> str:
    """A margin in words."""
    return f"{100 * margin:g} point{'' if margin == 0.01 else 's'}"


def p_value(p: float) -> str:
    """Three digits, or that it is less."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
