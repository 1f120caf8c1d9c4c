"""Judge of an order: the passages of each query, sorted by score, against what is known to be relevant."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import ir_measures
import numpy as np
import torch
from ir_measures import AP, RR, R, nDCG
from numpy.typing import NDArray
from scipy.stats import permutation_test
from torch import Tensor

from finllm_prune.judges.judge import Answers, Indices

# Of 100 candidates or fewer Recall@100 is the first stage's alone.
MEASURES = {"ndcg_at_10": nDCG @ 10, "mrr_at_10": RR @ 10, "map": AP, "recall_at_10": R @ 10, "recall_at_100": R @ 100}
_EQUAL = 1e-4  # scores of a model that tells no passage from another differ by rounding alone


class RankingJudge:
    """A query is a unit: its value is that of the order of its candidates, by ``ir_measures`` (MacAvaney et al. 2022).

    All queries count, with 0 where nothing relevant is among the candidates; relevant passages that are not among them count
    as missed, as trec_eval does it.

    Args:
        judged: query -> passage -> relevance, with a relevant passage for each query.
        pools: query -> candidates, in the order of the scores that ``answers`` takes; a query may have none.
    """

    unit: ClassVar[str] = "query"
    metrics: ClassVar[tuple[str, ...]] = tuple(MEASURES)
    headline: ClassVar[str] = "ndcg_at_10"
    bounded: ClassVar[bool] = True
    flips: ClassVar[tuple[str, str]] = ("worse", "better")

    def __init__(self, judged: Mapping[str, Mapping[str, int]], pools: Mapping[str, Sequence[str]]):
        self.judged = {query: dict(passages) for query, passages in judged.items()}
        self.pools = {query: list(pools.get(query, ())) for query in judged}

    def __len__(self) -> int:
        return len(self.judged)

    def answers(self, logits: Tensor) -> Answers:
        """What became of each query: the place of its ``first`` passage in the pool, the ``spread`` of its scores, its values.

        Args:
            logits: (candidates of all queries, 1), queries and candidates in their order. What is no number comes last.
        """
        scores = np.nan_to_num(logits.double().numpy().reshape(-1), nan=-1e30, posinf=1e30, neginf=-1e30)
        parts = np.split(scores, np.cumsum([len(pool) for pool in self.pools.values()]))
        run = {
            query: dict(zip(pool, part.tolist(), strict=True))
            for (query, pool), part in zip(self.pools.items(), parts[:-1], strict=True)
        }
        kinds = [("first", np.int64), ("spread", np.float64), *((name, np.float64) for name in MEASURES)]
        answers = np.zeros(len(self), dtype=kinds)
        answers["first"] = [part.argmax() if len(part) else -1 for part in parts[:-1]]
        answers["spread"] = [np.ptp(part) if len(part) else 0.0 for part in parts[:-1]]
        place = {query: i for i, query in enumerate(self.judged)}
        names = {measure: name for name, measure in MEASURES.items()}
        for found in ir_measures.iter_calc(list(names), self.judged, run):
            answers[names[found.measure]][place[found.query_id]] = found.value
        return answers

    def value(self, metric: str, answers: Answers, units: Indices | None = None) -> float:
        """The mean over queries."""
        values = answers[metric]
        return float((values if units is None else values[units]).mean())

    def values(self, metric: str, answers: Answers, draws: Indices) -> NDArray[np.float64]:
        values: NDArray[np.float64] = answers[metric][draws].mean(axis=-1)
        return values

    def worth(self, answers: Answers) -> NDArray[np.float64]:
        """nDCG@10 of each query."""
        worth: NDArray[np.float64] = answers["ndcg_at_10"].astype(np.float64)
        return worth

    def same(self, one: Answers, other: Answers) -> NDArray[np.bool_]:
        """The same passage comes first."""
        same: NDArray[np.bool_] = one["first"] == other["first"]
        return same

    def paired_test(self, dense: Answers, pruned: Answers) -> tuple[str, float]:
        """Fisher's randomization test of the mean nDCG@10, two-sided, as Smucker et al. 2007 recommend."""
        pairs = (self.worth(dense), self.worth(pruned))
        result = permutation_test(
            pairs, lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True, n_resamples=9999,
            batch=100, rng=np.random.default_rng(0),
        )  # fmt: skip
        return "randomization test on nDCG@10", float(result.pvalue)

    def without_model(self) -> Answers:
        """The order of the first stage."""
        return self.answers(
            torch.tensor([[-float(place)] for pool in self.pools.values() for place in range(len(pool))])
        )

    def per_class(self, dense: Answers, pruned: Answers) -> dict[str, dict[str, float]]:
        """There are no classes."""
        return {}

    def collapsed(self, answers: Answers) -> bool:
        """The model gives all passages of a query the same score, whatever the query."""
        several = [len(pool) > 1 for pool in self.pools.values()]
        return bool(any(several) and (answers["spread"][several] < _EQUAL).all())

    def units(self) -> Indices:
        return np.repeat(np.arange(len(self)), [len(pool) for pool in self.pools.values()])
