"""Rows of queries and passages: lists to learn from, pairs to rank, and what is told of them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import datasets
import numpy as np

from finllm_prune.errors import InputError
from finllm_prune.judges import RankingJudge
from finllm_prune.tasks.beir import Judged, Pools, Retrieval
from finllm_prune.tasks.candidates import Listed
from finllm_prune.tasks.queries import column_of
from finllm_prune.tasks.splitting import SPLITS
from finllm_prune.tasks.task import KEPT, Examples


@dataclass(frozen=True)
class RankingExamples(Examples):
    """Training rows are lists (``text``: the query, ``passages``, ``label``: their relevance), the others single pairs.

    Args:
        judged: split -> query -> passage -> relevance.
        pools: split -> query -> the passages that are ranked, in the order of the first stage; the pairs lie in this order.
    """

    judged: dict[str, Judged] = field(default_factory=dict)
    pools: dict[str, Pools] = field(default_factory=dict)

    def reordered(self, labels: list[str]) -> Examples:
        return self

    def texts(self, split: str) -> list[str]:
        """Queries and passages, each once."""
        rows = self.splits[split]
        passages = chain.from_iterable(rows["passages"]) if split == "train" else rows["pair"]
        return [*dict.fromkeys(rows["text"]), *dict.fromkeys(passages)]

    def counts(self, split: str) -> dict[str, int]:
        """Pairs of a query with what is relevant to it, and with other passages."""
        labels = self.splits[split]["label"]
        relevant = [label > 0 for label in (chain.from_iterable(labels) if split == "train" else labels)]
        return {"relevant": sum(relevant), "others": len(relevant) - sum(relevant)}

    def fingerprint(self) -> str:
        """sha256 over all rows of all splits, in order."""
        digest = hashlib.sha256()
        for name, rows in self.splits.items():
            for row in rows.remove_columns([column for column in rows.column_names if column.startswith(KEPT)]):
                digest.update(json.dumps([name, *row.values()]).encode())
        return digest.hexdigest()


def completed(data: Retrieval, **rows: int | None) -> Retrieval:
    """Samples of the training and test queries if asked, and a tenth of the training's where there is no validation split.

    Args:
        rows: ``train`` and ``test``: how many queries; None takes all.
    """
    judged, candidates = dict(data.judged), data.candidates
    for split, count in rows.items():
        if count is not None and split in judged:
            if not 0 < count <= len(judged[split]):
                raise InputError(f"task.{split}_rows: {count} of {len(judged[split])} queries cannot be taken")
            judged[split] = _sample(judged[split], count)
    if "train" not in judged:
        return replace(data, judged=judged)
    train = judged["train"]
    if "validation" not in judged:
        if len(train) < 2:
            raise InputError(f"task.dataset: {data.source} has one training query and none for validation; add some")
        held_out = _sample(train, max(1, len(train) // 10))
        judged |= {"validation": held_out, "train": {q: v for q, v in train.items() if q not in held_out}}
        if "train" in candidates:
            candidates = candidates | {"validation": candidates["train"]}
    return replace(data, judged={name: judged[name] for name in SPLITS}, candidates=candidates)


def query_rows(data: Retrieval) -> dict[str, datasets.Dataset]:
    """Split -> ``text`` and ``query`` (the id); a split that is not there has no row."""
    ids = {name: list(data.judged.get(name, {})) for name in SPLITS}
    return {
        name: datasets.Dataset.from_dict({"text": [data.queries[query] for query in queries], "query": queries})
        for name, queries in ids.items()
    }


def facts_of(data: Retrieval) -> dict[str, Any]:
    """How much there is, and which relevant passages of a split are also relevant in training."""
    relevant = {
        name: {passage for passages in judged.values() for passage, relevance in passages.items() if relevance > 0}
        for name, judged in data.judged.items()
    }
    shared = {name: len(found & relevant.get("train", set())) for name, found in relevant.items() if name != "train"}
    return {
        "queries": {name: len(judged) for name, judged in data.judged.items()},
        "passages": len(data.passages),
        "relevant_passages_shared_with_train": shared,
    }


def list_rows(data: Retrieval, lists: Sequence[Listed]) -> datasets.Dataset:
    """A row for each list: ``text`` (the query), ``passages``, ``label`` (their relevance)."""
    if not lists:
        raise InputError("task.dataset: no training query has a candidate that is not relevant; nothing can be learned")
    return datasets.Dataset.from_dict({
        "text": [data.queries[each.query] for each in lists],
        "passages": [[data.passages[passage] for passage in each.passages] for each in lists],
        "label": [each.relevance for each in lists],
    })  # fmt: skip


def pair_rows(data: Retrieval, split: str, pools: Pools, keep: Sequence[str] = ()) -> datasets.Dataset:
    """A row for each candidate of each query: ``text`` (the query), ``pair`` (the passage), ``label`` (its relevance).

    Columns of the query that are to ``keep`` lie beside.
    """
    judged = data.judged[split]
    pairs = [(query, passage) for query in judged for passage in pools.get(query, ())]
    if not pairs:
        raise InputError(
            f"task.dataset: no query of {data.source}, split {split}, has a candidate; nothing can be ranked"
        )
    return datasets.Dataset.from_dict({
        "text": [data.queries[query] for query, _ in pairs],
        "pair": [data.passages[passage] for _, passage in pairs],
        "label": [judged[query].get(passage, 0) for query, passage in pairs],
        **{f"{KEPT}{name}": column_of(data, name, [query for query, _ in pairs], "keep_columns") for name in keep},
    })  # fmt: skip


def first_stage(judged: Judged, pools: Pools) -> dict[str, float]:
    """What candidates are worth as they came, the part of what is relevant among them, and how many queries have none."""
    judge = RankingJudge(judged, pools)
    answers = judge.without_model()
    parts = []
    for query, passages in judged.items():
        relevant = {passage for passage, relevance in passages.items() if relevance > 0}
        parts.append(len(relevant & set(judge.pools[query])) / len(relevant))
    return {name: judge.value(name, answers) for name in judge.metrics} | {
        "recall": float(np.mean(parts)),
        "queries_without_candidates": sum(not pool for pool in judge.pools.values()),
    }


def _sample(judged: Judged, count: int) -> Judged:
    drawn = np.random.default_rng(42).permutation(len(judged))[:count]
    names = list(judged)
    return {names[i]: judged[names[i]] for i in sorted(drawn)}
