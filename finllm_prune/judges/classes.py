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


@dataclass(frozen=True)
class ClassJudge:
    """Answers are class indices, shape (rows,); the test is McNemar's (1947), exact.

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
        return logits.argmax(-1).numpy()

    def value(self, metric: str, answers: Answers, units: Indices | None = None) -> float:
        rows = slice(None) if units is None else units
        return find_metric(metric)(answers[rows].tolist(), self.references[rows].tolist())

    def worth(self, answers: Answers) -> NDArray[np.float64]:
        return np.asarray(answers == self.references, dtype=np.float64)

    def same(self, one: Answers, other: Answers) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = one == other
        return same

    def paired_test(self, dense: Answers, pruned: Answers) -> tuple[str, float]:
        was, now = dense == self.references, pruned == self.references
        table = [[(was & now).sum(), (was & ~now).sum()], [(~was & now).sum(), (~was & ~now).sum()]]
        return "McNemar's exact test", float(mcnemar(table, exact=True).pvalue)

    def per_class(self, dense: Answers, pruned: Answers) -> dict[str, dict[str, float]]:
        every = list(range(len(self.labels)))
        scores = [
            f1_score(self.references, each, labels=every, average=None, zero_division=0.0) for each in (dense, pruned)
        ]
        return {
            name: {"dense": float(scores[0][i]), "pruned": float(scores[1][i]), "rows": int((self.references == i).sum())}
            for i, name in enumerate(self.labels)
        }  # fmt: skip

    def collapsed(self, answers: Answers) -> bool:
        return len(np.unique(answers)) == 1 and len(np.unique(self.references)) > 1
