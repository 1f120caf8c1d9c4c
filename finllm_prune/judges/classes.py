"""One class for each row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from statsmodels.stats.contingency_tables import mcnemar
from torch import Tensor

from finllm_prune.judges.judge import Answers, Indices, is_number, one_by_one
from finllm_prune.metrics import find_metric

_LIKELIEST = 3
_OF_SEVERAL = ("top3_accuracy",)


@dataclass(frozen=True)
class ClassJudge:
    """Answers are the likeliest classes, shape (rows, 3 or fewer), the first of which is the decision.

    Where a logit is no number the answer is -1, which is no class and never right.

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
    headline: ClassVar[str] = "accuracy"
    bounded: ClassVar[bool] = True
    flips: ClassVar[tuple[str, str]] = ("right_to_wrong", "wrong_to_right")

    def __len__(self) -> int:
        return len(self.references)

    def answers(self, logits: Tensor) -> Answers:
        likeliest = logits.argsort(dim=-1, descending=True, stable=True)[:, :_LIKELIEST].numpy()
        answers: Answers = np.where(is_number(logits)[:, None], likeliest, -1)
        return answers

    def value(self, metric: str, answers: Answers, units: Indices | None = None) -> float:
        rows = slice(None) if units is None else units
        decided = answers[rows] if metric in _OF_SEVERAL else answers[rows, 0]
        return find_metric(metric)(decided.tolist(), self.references[rows].tolist())

    def values(self, metric: str, answers: Answers, draws: Indices) -> NDArray[np.float64]:
        """From counts: thousands of draws by scikit-learn take longer than all the rest of a small run."""
        if metric in _OF_SEVERAL:
            found: NDArray[np.float64] = (answers == self.references[:, None]).any(1)[draws].mean(axis=-1)
            return found
        if metric not in _OF_COUNTS:
            return one_by_one(self, metric, answers, draws)
        return _OF_COUNTS[metric](self._counts(answers[:, 0], draws))

    def f1(self, answers: Answers, draws: Indices) -> NDArray[np.float64]:
        """Of each class, (draws, classes); 0 where it neither occurs nor is decided for."""
        return _f1(self._counts(answers[:, 0], draws))[:, :-1]

    def worth(self, answers: Answers) -> NDArray[np.float64]:
        return np.asarray(answers[:, 0] == self.references, dtype=np.float64)

    def same(self, one: Answers, other: Answers) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = (one[:, 0] == other[:, 0]) & (one[:, 0] >= 0)
        return same

    def paired_test(self, dense: Answers, pruned: Answers) -> tuple[str, float]:
        return "McNemar's exact test", mcnemar_p(*(each[:, 0] == self.references for each in (dense, pruned)))

    def without_model(self) -> Answers | None:
        """Nothing answers."""
        return None

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

    def units(self) -> Indices:
        return np.arange(len(self))

    def _counts(self, decided: Indices, draws: Indices) -> NDArray[np.float64]:
        """Confusion matrices, shape (draws, classes + 1, classes + 1): right class, decision; the last is that of no class."""
        several, classes = len(draws), len(self.labels) + 1
        cells = (np.arange(several)[:, None] * classes + self.references[draws]) * classes + decided[draws] % classes
        counts = np.bincount(cells.reshape(-1), minlength=several * classes * classes)
        return counts.reshape(several, classes, classes).astype(np.float64)


def _accuracy(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    share: NDArray[np.float64] = np.trace(counts, axis1=1, axis2=2) / counts.sum(axis=(1, 2))
    return share


def _f1(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    told_and_there = counts.sum(axis=1) + counts.sum(axis=2)
    f1: NDArray[np.float64] = 2 * np.diagonal(counts, axis1=1, axis2=2) / np.maximum(told_and_there, 1)
    return f1


def _macro_f1(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the classes that occur or are decided for."""
    occurring = (counts.sum(axis=1) + counts.sum(axis=2) > 0).sum(axis=1)
    mean: NDArray[np.float64] = _f1(counts).sum(axis=1) / occurring
    return mean


def _mcc(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gorodkin 2004, equation 8; 0 where one class is all there is, or all that is decided for."""
    rows, told, there = counts.sum(axis=(1, 2)), counts.sum(axis=1), counts.sum(axis=2)
    both = np.trace(counts, axis1=1, axis2=2) * rows - (told * there).sum(axis=1)
    scale = np.sqrt((rows**2 - (told**2).sum(axis=1)) * (rows**2 - (there**2).sum(axis=1)))
    mcc: NDArray[np.float64] = np.divide(both, scale, out=np.zeros_like(both), where=scale > 0)
    return mcc


_OF_COUNTS = {"accuracy": _accuracy, "micro_f1": _accuracy, "macro_f1": _macro_f1, "mcc": _mcc}


def mcnemar_p(was: NDArray[np.bool_], now: NDArray[np.bool_]) -> float:
    """The exact two-sided p-value that two models are equally often right (McNemar 1947)."""
    table = [[(was & now).sum(), (was & ~now).sum()], [(~was & now).sum(), (~was & ~now).sum()]]
    return float(mcnemar(table, exact=True).pvalue)
