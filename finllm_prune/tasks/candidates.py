"""Which passages of a query are ranked, and which of them a reranker learns from."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import bm25s
import numpy as np

from finllm_prune.errors import InputError


@dataclass(frozen=True)
class BM25:
    """The first stage: the passages with the highest BM25 (Robertson and Zaragoza 2009), by ``bm25s`` (Lu 2024).

    Lucene's form of the score, lower case, no stemming, English stop words left out.

    Args:
        k1: how soon further occurrences of a word stop to count; 0 or more.
        b: how much long passages are held back, 0..1.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    k1: float = 0.9
    b: float = 0.4

    def __post_init__(self) -> None:
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise InputError(f"task.bm25: k1 is not negative and b lies in 0..1, not {self.k1:g} and {self.b:g}")

    def __str__(self) -> str:
        return f"BM25 (k1 {self.k1:g}, b {self.b:g})"

    def search(
        self, passages: Mapping[str, str], queries: Sequence[Mapping[str, str]], count: int
    ) -> list[dict[str, list[str]]]:
        """For each set of queries: query id -> ids of at most ``count`` passages that share a word with it, best first.

        Raises:
            InputError: no passage holds a word.
        """
        shown, ids = sys.stderr.isatty(), np.array(list(passages))
        index = bm25s.BM25(k1=self.k1, b=self.b)
        held = bm25s.tokenize(list(passages.values()), stopwords="en", show_progress=shown)
        if not any(held.ids):
            raise InputError(
                "task.bm25: no passage holds a word but stop words; give candidates/<split>.tsv of another search"
            )
        index.index(held, show_progress=shown)
        found = []
        for texts in queries:
            words = bm25s.tokenize(list(texts.values()), stopwords="en", show_progress=shown)
            best, scores = index.retrieve(words, k=min(count, len(ids)), show_progress=shown)
            found.append(
                {query: ids[row[score > 0]].tolist() for query, row, score in zip(texts, best, scores, strict=True)}
            )
        return found


class Listed(NamedTuple):
    """A query with some passages and their relevance: what one row of training holds."""

    query: str
    passages: list[str]
    relevance: list[int]


def training_lists(
    judged: Mapping[str, Mapping[str, int]], pools: Mapping[str, Sequence[str]], texts: Mapping[str, str],
    positives: int, negatives: int, draws: int = 1, seed: int = 42,
) -> list[Listed]:  # fmt: skip
    """The relevant passages of each query, at most ``positives`` in a list, with others of its pool drawn at random.

    Each list comes ``draws`` times with the same relevant passages and others that were not drawn before, until the pool is
    through. A query without others in its pool teaches no order and is left out.

    Args:
        judged: query -> passage -> relevance; above 0 is relevant.
        pools: query -> passages of the first stage: what is not relevant there is hard to tell from what is.
        texts: passage -> its text; a copy of what is relevant is no other passage, whatever its id.
        positives, negatives: passages of a list; a small pool gives fewer negatives.
        draws: how many lists are made of the same relevant passages.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    lists = []
    for query, passages in judged.items():
        relevant = [passage for passage, relevance in passages.items() if relevance > 0]
        told = {texts[passage] for passage in relevant}
        others = [p for p in pools.get(query, ()) if passages.get(p, 0) == 0 and texts[p] not in told]
        for begin in range(0, len(relevant) if others else 0, positives):
            order = generator.permutation(len(others))
            for draw in range(draws):
                drawn = np.roll(order, -draw * negatives)[:negatives]
                listed = relevant[begin : begin + positives] + [others[i] for i in drawn]
                lists.append(Listed(query, listed, [passages.get(passage, 0) for passage in listed]))
    return lists
