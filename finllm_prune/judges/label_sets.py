"""Several labels for each row, or none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from torch import Tensor

from finllm_prune.judges.classes import mcnemar_p
from finllm_prune.judges.judge import Answers, Indices, is_number, one_by_one
from finllm_prune.metrics import find_metric


@dataclass(frozen=True)
class LabelSetJudge:
    """Answers are 0 or 1 for each label, shape (rows, labels); right is a whole set (``accuracy``: subset accuracy).

    Where a logit is no number the answers are -1, and wrong of every label. The test is McNemar's (1947), exact, on whole sets.

    Args:
        references: the right sets, in the form of the answers.
        labels: names of the columns.
        metrics: names of ``finllm_prune.metrics``.
        threshold: a label is given where its probability, the sigmoid of its logit, is at least this.
    """

    references: NDArray[np.int64]
    labels: Sequence[str]
    metrics: Sequence[str]
    threshold: float = 0.5

    unit: ClassVar[str] = "row"
    headline: ClassVar[str] = "accuracy"
    bounded: ClassVar[bool] = True
    flips: ClassVar[tuple[str, str]] = ("right_to_wrong", "wrong_to_right")

    def __len__(self) -> int:
        return len(self.references)

    def answers(self, logits: Tensor) -> Answers:
        given = (logits.double().sigmoid() >= self.threshold).long().numpy()
        return np.where(is_number(logits)[:, None], given, -1)

    def value(self, metric: str, answers: Answers, units: Indices | None = None) -> float:
        rows = slice(None) if units is None else units
        return find_metric(metric)(_sets(answers[rows], self.references[rows]), self.references[rows])

    def values(self, metric: str, answers: Answers, draws: Indices) -> NDArray[np.float64]:
        return one_by_one(self, metric, answers, draws)

    def worth(self, answers: Answers) -> NDArray[np.float64]:
        return self.same(answers, self.references).astype(np.float64)

    def same(self, one: Answers, other: Answers) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = ((one == other) & (one >= 0)).all(-1)
        return same

    def paired_test(self, dense: Answers, pruned: Answers) -> tuple[str, float]:
        was, now = (self.same(each, self.references) for each in (dense, pruned))
        return "McNemar's exact test of whole sets", mcnemar_p(was, now)

    def without_model(self) -> Answers | None:
        """Nothing answers."""
        return None

    def per_class(self, dense: Answers, pruned: Answers) -> dict[str, dict[str, float]]:
        scores = [
            f1_score(self.references, _sets(each, self.references), average=None, zero_division=0.0)
            for each in (dense, pruned)
        ]
        return {
            name: {"dense": float(scores[0][i]), "pruned": float(scores[1][i]), "rows": int(self.references[:, i].sum())}
            for i, name in enumerate(self.labels)
        }  # fmt: skip

    def collapsed(self, answers: Answers) -> bool:
        return len(np.unique(answers, axis=0)) == 1 and len(np.unique(self.references, axis=0)) > 1

    def units(self) -> Indices:
        return np.arange(len(self))


def _sets(answers: Answers, references: NDArray[np.int64]) -> Answers:
    """Answers of 0 and 1, where what is no number is wrong of every label."""
    return np.where(answers < 0, 1 - references, answers)
