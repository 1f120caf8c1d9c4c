"""A number for each row, as a sentiment between -1 and 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon
from torch import Tensor

from finllm_prune.judges.judge import Answers, Indices, one_by_one
from finllm_prune.metrics import find_metric

_FAR = 1e9  # where what is no number is taken to lie
_EQUAL = 1e-4  # of the range of the right answers: a model that tells no text from another differs by rounding alone


@dataclass(frozen=True)
class ScoreJudge:
    """Answers are numbers, shape (rows,); a row's worth is minus its squared error; the test is Wilcoxon's (1945).

    Args:
        references: the right number of each row.
        metrics: names of ``finllm_prune.metrics`` that take numbers.
        tolerance: two answers this near to each other are the same.
    """

    references: NDArray[np.float64]
    metrics: Sequence[str]
    tolerance: float

    unit: ClassVar[str] = "row"
    headline: ClassVar[str] = "negative squared error"
    bounded: ClassVar[bool] = False
    flips: ClassVar[tuple[str, str]] = ("worse", "better")

    def __len__(self) -> int:
        return len(self.references)

    def answers(self, logits: Tensor) -> Answers:
        answers: Answers = np.nan_to_num(logits.double().numpy()[:, 0], nan=_FAR, posinf=_FAR, neginf=-_FAR)
        return answers

    def value(self, metric: str, answers: Answers, units: Indices | None = None) -> float:
        rows = slice(None) if units is None else units
        return find_metric(metric)(answers[rows], self.references[rows])

    def values(self, metric: str, answers: Answers, draws: Indices) -> NDArray[np.float64]:
        return one_by_one(self, metric, answers, draws)

    def worth(self, answers: Answers) -> NDArray[np.float64]:
        worth: NDArray[np.float64] = -((answers - self.references) ** 2)
        return worth

    def same(self, one: Answers, other: Answers) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = np.abs(one - other) <= self.tolerance
        return same

    def paired_test(self, dense: Answers, pruned: Answers) -> tuple[str, float]:
        name = "Wilcoxon's signed-rank test of squared errors"
        differences = self.worth(dense) - self.worth(pruned)
        return name, float(wilcoxon(differences).pvalue) if differences.any() else 1.0

    def without_model(self) -> Answers | None:
        """Nothing answers."""
        return None

    def per_class(self, dense: Answers, pruned: Answers) -> dict[str, dict[str, float]]:
        """There are no classes."""
        return {}

    def collapsed(self, answers: Answers) -> bool:
        right = np.ptp(self.references)
        return bool(right > 0 and np.ptp(answers) < _EQUAL * right)

    def units(self) -> Indices:
        return np.arange(len(self))
