"""What a judge provides, and how two models are held against each other by any of them."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]
Answers = NDArray[Any]


class Judge(Protocol):
    """Knows the right answers to one split, and what a model's answers to it are worth.

    Attributes:
        unit: what the bootstrap draws and a test pairs, in one word: a row, or a query with its candidates.
        metrics: names for ``value``.
        headline: what the mean worth of the units is: a metric's name, or words.
        bounded: whether a unit's worth lies from 0 to 1; errors and likelihoods have a unit of their own.
        flips: what a unit is called that lost by pruning, and one that won.
    """

    @property
    def unit(self) -> str: ...

    @property
    def metrics(self) -> Sequence[str]: ...

    @property
    def headline(self) -> str: ...

    @property
    def bounded(self) -> bool: ...

    @property
    def flips(self) -> tuple[str, str]: ...

    def __len__(self) -> int:
        """Units."""
        ...

    def answers(self, logits: Tensor) -> Answers:
        """What a model decided, the first axis being the units; ``logits``: of all rows (rows, outputs), in their order."""
        ...

    def value(self, metric: str, answers: Answers, units: Indices | None = None) -> float:
        """A metric over these units, where one that comes twice counts twice; None takes all."""
        ...

    def values(self, metric: str, answers: Answers, draws: Indices) -> NDArray[np.float64]:
        """(draws,): the metric over the units of each of them; ``draws``: (draws, units in it)."""
        ...

    def worth(self, answers: Answers) -> NDArray[np.float64]:
        """(units,): of each answer alone, the more the better."""
        ...

    def same(self, one: Answers, other: Answers) -> NDArray[np.bool_] | NDArray[np.float64]:
        """(units,): whether two models decided alike, or in which part of what a unit consists of."""
        ...

    def paired_test(self, dense: Answers, pruned: Answers) -> tuple[str, float]:
        """The name of the test that neither model is better, and its two-sided p."""
        ...

    def without_model(self) -> Answers | None:
        """What was decided before any model was asked, where something is: a first stage's order."""
        ...

    def per_class(self, dense: Answers, pruned: Answers) -> dict[str, dict[str, float]]:
        """Class -> a figure of ``dense`` and ``pruned``, and ``rows``; nothing where there are no classes."""
        ...

    def collapsed(self, answers: Answers) -> bool:
        """Whether a model says the same to everything, though it should not."""
        ...

    def units(self) -> Indices:
        """(rows,): which unit each row of the logits belongs to, ascending; a unit may have none."""
        ...


def is_number(logits: Tensor) -> NDArray[np.bool_]:
    """(rows,): whether all of a row's logits are."""
    numbers: NDArray[np.bool_] = logits.isfinite().all(-1).numpy()
    return numbers


def one_by_one(judge: Judge, metric: str, answers: Answers, draws: Indices) -> NDArray[np.float64]:
    """``Judge.values`` where nothing faster is known."""
    return np.array([judge.value(metric, answers, units) for units in draws])
