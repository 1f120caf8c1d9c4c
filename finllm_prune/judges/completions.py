"""A text of its own for each row, as the answer to an instruction."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon
from torch import Tensor

from finllm_prune.judges.judge import Answers, Indices

_NEVER = -1e4  # the log-likelihood of a model that gives no number
_LARGEST = 700.0  # whose exponential is a number


@dataclass(frozen=True)
class CompletionJudge:
    """Answers say, of each row's right completion, how likely it was and which tokens the model would have written there.

    Their columns are the log-likelihood, the tokens, how many of these were the likeliest ones, and the likeliest tokens' ids,
    -1 behind the last. Each token is told after the right ones before it. A row's worth is its mean log-likelihood of a token,
    the test of it Wilcoxon's (1945). ``perplexity`` is ``exp(-log-likelihood / tokens)`` over all tokens of all rows.

    Args:
        rows: how many there are.
    """

    rows: int

    unit: ClassVar[str] = "row"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")
    headline: ClassVar[str] = "log-likelihood of a token"
    bounded: ClassVar[bool] = False
    flips: ClassVar[tuple[str, str]] = ("worse", "better")

    def __len__(self) -> int:
        return self.rows

    def answers(self, logits: Tensor) -> Answers:
        """The columns as they are; see ``finllm_prune.tasks.completions``."""
        answers: Answers = logits.double().numpy().copy()
        answers[:, 0] = np.nan_to_num(answers[:, 0], nan=_NEVER, posinf=_NEVER, neginf=_NEVER)
        return answers

    def value(self, metric: str, answers: Answers, units: Indices | None = None) -> float:
        return float(self.values(metric, answers, np.arange(self.rows) if units is None else units))

    def values(self, metric: str, answers: Answers, draws: Indices) -> NDArray[np.float64]:
        """Of each of several draws of units, shape (draws, units in it)."""
        likelihood, tokens, right = (answers[:, column][draws].sum(-1) for column in range(3))
        values: NDArray[np.float64] = right / tokens
        if metric == "perplexity":
            values = np.exp(np.minimum(-likelihood / tokens, _LARGEST))
        return values

    def worth(self, answers: Answers) -> NDArray[np.float64]:
        worth: NDArray[np.float64] = answers[:, 0] / answers[:, 1]
        return worth

    def same(self, one: Answers, other: Answers) -> NDArray[np.float64]:
        """The part of each completion's tokens for which both models would have written the same."""
        same: NDArray[np.float64] = ((one == other) & (one >= 0))[:, 3:].sum(1) / one[:, 1]
        return same

    def paired_test(self, dense: Answers, pruned: Answers) -> tuple[str, float]:
        differences = self.worth(dense) - self.worth(pruned)
        name = "Wilcoxon's signed-rank test of mean log-likelihoods"
        return name, float(wilcoxon(differences).pvalue) if differences.any() else 1.0

    def without_model(self) -> Answers | None:
        """Nothing answers."""
        return None

    def per_class(self, dense: Answers, pruned: Answers) -> dict[str, dict[str, float]]:
        """There are no classes."""
        return {}

    def collapsed(self, answers: Answers) -> bool:
        """One token, whatever is asked."""
        said = answers[:, 3:]
        return len(np.unique(said[said >= 0])) == 1 and bool((answers[:, 2] < answers[:, 1]).any())

    def units(self) -> Indices:
        return np.arange(len(self))
