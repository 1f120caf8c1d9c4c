"""One class for each row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from statsmodels.stats.contingency_tables import mcnemar
from torch import Tensor

from finllm_prune.judges.judge import Answers, Indices
from finllm_prune.metrics import find_metric

_LIKELIEST = 3
_OF_SEVERAL = ("top3_accuracy",)


@dataclass(frozen=True)
class ClassJudge:
    """Answers are the likeliest classes, shape (rows, 3 or fewer), the first of which is the decision.

    The test is McNemar's (1947), exact.

    Args:
        references: the right class of each row.
        labels: class names by index.
        metrics: names of ``finllm_prune.metrics``.
    """

    references: Indices
    labels: Sequence[str]
    metrics: Sequence[str]

    unit: ClassVar[str] = "row"
    flips: ClassVar[tuple[str, str]] = ("right_to_wrong", "wrong_to_right")

    def __len__(self) -> int:
        return len(self.references)

    def answers(self, logits: Tensor) -> Answers:
        answers: Answers = logits.argsort(dim=-1, descending=True, stable=True)[:, :_LIKELIEST].numpy()
        return answers

    def value(self, metric: str, answers: Answers, units: Indices | None = None) -> float:
        rows = slice(None) if units is None else units
        decided = answers[rows] if metric in _OF_SEVERAL else answers[rows, 0]
        return find_metric(metric)(decided.tolist(), self.references[rows].tolist())

    def worth(self, answers: Answers) -> NDArray[np.float64]:
        return np.asarray(answers[:, 0] == self.references, dtype=np.float64)

    def same(self, one: Answers, other: Answers) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = one[:, 0] == other[:, 0]
        return same

    def paired_test(self, dense: Answers, pruned: Answers) -> tuple[str, float]:
        return "McNemar's exact test", mcnemar_p(*(each[:, 0] == self.references for each in (dense, pruned)))

    def per_class(self, dense: Answers, pruned: Answers) -> dict[str, dict[str, float]]:
        every = list(range(len(self.labels)))
        scores = [
            f1_score(self.references, each[:, 0], labels=every, average=None, zero_division=0.0)
            for each in (dense, pruned)
        ]
        return {
            name: {"dense": float(scores[0][i]), "pruned": float(scores[1][i]), "rows": int((self.references == i).sum())}
            for i, name in enumerate(self.labels)
        }  # fmt: skip

    def collapsed(self, answers: Answers) -> bool:
        return len(np.unique(answers[:, 0])) == 1 and len(np.unique(self.references)) > 1


def mcnemar_p(was: NDArray[np.bool_], now: NDArray[np.bool_]) -> float:
    """The exact two-sided p-value that two models are equally often right (McNemar 1947)."""
    table = [[(was & now).sum(), (was & ~now).sum()], [(~was & now).sum(), (~was & ~now).sum()]]
    return float(mcnemar(table, exact=True).pvalue)
