"""Reranking: a query and a passage, read together, get one score, which puts what a first stage found into a better order."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollator, PreTrainedConfig, PreTrainedTokenizerBase

from finllm_prune.errors import InputError
from finllm_prune.judges import RankingJudge
from finllm_prune.judges.rankings import MEASURES
from finllm_prune.tasks.beir import Judged, Pools, Retrieval, read_beir
from finllm_prune.tasks.candidates import BM25, Listed, training_lists
from finllm_prune.tasks.collating import PartsCollator
from finllm_prune.tasks.ranking_losses import Name, bce, ranking_loss
from finllm_prune.tasks.rows import Choice
from finllm_prune.tasks.splitting import SPLITS, leakage, without_copies
from finllm_prune.tasks.task import BUILTIN, Examples, Loss
from finllm_prune.tasks.yes_no import OneOutput, Prompt, asked, asks_pairs, is_causal

_NO_PASSAGE = -100  # the label that fills a short list up


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
            for row in rows:
                digest.update(json.dumps([name, *row.values()]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Reranking:
    """A cross-encoder with one output, trained on lists of relevant and hard passages, judged by the order of candidates.

    Args:
        dataset: ``builtin``, a local folder in BEIR's layout, or a Hub id, as BeIR/fiqa or mteb/fiqa; see ``read_beir``.
        max_length: tokens of a query and its passage together; the longer of the two is cut first, as CrossEncoder does it.
        objective: what is learned of a list, by the name of a loss of ``ranking_losses``.
        margin: of ``pairwise``.
        positives: relevant passages in a list; a query with more of them has several lists.
        negatives: other passages in a list, drawn from the query's candidates.
        candidates: how many passages of the first stage are ranked, and negatives drawn from.
        bm25: the first stage, where the data brings no candidates.
        train_rows: train on a fixed random sample of this many queries; None takes all.
        deduplicate: drop queries that come again in a later split, but for case, spaces, digits and punctuation.
        bad_rows: ``refuse`` data with a broken row, or ``skip`` such rows, counted.
        prompt: how a causal language model is asked. Other models are not asked, unless this is given.
    """

    pipeline_tag: ClassVar[str] = "text-ranking"
    metrics: ClassVar[tuple[str, ...]] = tuple(MEASURES)

    dataset: str = "builtin"
    max_length: int = 256
    objective: Name = "listnet"
    margin: float = 1.0
    positives: int = 1
    negatives: int = 7
    candidates: int = 100
    bm25: BM25 = field(default_factory=BM25)
    train_rows: int | None = None
    deduplicate: bool = False
    bad_rows: Choice = "refuse"
    prompt: Prompt | None = None

    def __post_init__(self) -> None:
        if self.max_length < 8:
            raise InputError(
                f"task.max_length: a query and a passage need at least 8 tokens together, not {self.max_length}"
            )
        for key in ("positives", "negatives", "candidates"):
            if getattr(self, key) < 1:
                raise InputError(f"task.{key}: at least one passage is needed, not {getattr(self, key)}")

    @property
    def auto_class(self) -> OneOutput:
        return OneOutput(self.prompt or Prompt())

    def load(self) -> RankingExamples:
        data = read_beir(self.dataset, BUILTIN / "reranking", self.bad_rows)
        judged, facts = self._splits(data)
        facts = {"bad_rows": data.bad_rows} | facts
        pools, first_stage = self._pools(data, judged)
        splits: dict[str, datasets.Dataset] = {}
        if "train" in judged:
            lists = training_lists(judged["train"], pools["train"], self.positives, self.negatives)
            if not lists:
                raise InputError(
                    "task.dataset: no training query has candidates that are not relevant; nothing can be learned"
                )
            splits["train"] = _lists(lists, data)
        splits |= {name: _pairs(judged[name], pools[name], data) for name in ("validation", "test") if name in judged}
        facts["first_stage"] = {"name": first_stage, "candidates": self.candidates} | {
            name: _first_stage(judged[name], pools[name]) for name in splits if name != "train"
        }
        return RankingExamples(splits, ["relevance"], data.source, facts, judged, pools)

    def fit_tokenizer(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """CrossEncoder reads from it how long pairs may be and how they are put into words."""
        tokenizer.model_max_length = min(self.max_length, tokenizer.model_max_length)
        if self.prompt is not None or (is_causal(config) and not asks_pairs(tokenizer)):
            tokenizer.chat_template = (self.prompt or Prompt()).chat_template()
        elif not asks_pairs(tokenizer):
            tokenizer.chat_template = None  # of a chat, which this is not

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        if "passages" not in rows.column_names:
            tokens = self._encode(list(rows["text"]), list(rows["pair"]), tokenizer)
            return datasets.Dataset.from_dict(tokens | {"labels": list(rows["label"])})
        sizes = [len(passages) for passages in rows["passages"]]
        queries = [query for query, size in zip(rows["text"], sizes, strict=True) for _ in range(size)]
        flat = self._encode(queries, list(chain.from_iterable(rows["passages"])), tokenizer)
        lists = {name: [list(islice(values, size)) for size in sizes] for name, values in _iterators(flat)}
        labels = [label + [_NO_PASSAGE] * (self._width - len(label)) for label in rows["label"]]
        return datasets.Dataset.from_dict(lists | {"labels": labels})

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        return ListsCollator(tokenizer, self._gather)

    def loss(self, examples: Examples) -> Loss | None:
        """Of lists; single pairs, which are only evaluated on, are told by ``bce``."""
        if "train" not in examples.splits:
            raise InputError(f"task.dataset: {examples.source} has no training split, so it can only be evaluated on")
        of_lists = ranking_loss(self.objective, self.margin)

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return of_lists(logits, labels) if labels.ndim == 2 else bce(logits.view(-1, 1), labels.view(-1, 1))

        return loss

    def head_config(self, labels: list[str]) -> dict[str, Any]:
        return {"num_labels": 1, "id2label": {0: labels[0]}, "label2id": {labels[0]: 0}}

    def judge(self, examples: Examples, split: str = "test") -> RankingJudge:
        assert isinstance(examples, RankingExamples)
        return RankingJudge(examples.judged[split], examples.pools[split])

    @property
    def _width(self) -> int:
        return self.positives + self.negatives

    def _gather(self, logits: Tensor, parts: Tensor) -> Tensor:
        """Scores (passages, 1) -> (lists, passages of the longest list)."""
        return torch.stack([F.pad(part[:, 0], (0, self._width - len(part))) for part in logits.split(parts.tolist())])

    def _encode(
        self, queries: list[str], passages: list[str], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, list[list[int]]]:
        limit = min(self.max_length, tokenizer.model_max_length)
        if asks_pairs(tokenizer):
            ids = asked(tokenizer, queries, passages, limit)
            return {"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]}
        tokens = tokenizer(queries, passages, truncation="longest_first", max_length=limit)
        return {name: tokens[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in tokens}

    def _splits(self, data: Retrieval) -> tuple[dict[str, Judged], dict[str, Any]]:
        """The queries of each split, a part of the training ones for validation where there are none; and facts on them."""
        judged = dict(data.judged)
        if self.train_rows is not None and "train" in judged:
            if not 0 < self.train_rows <= len(judged["train"]):
                raise InputError(
                    f"task.train_rows: {self.train_rows} of {len(judged['train'])} queries cannot be taken"
                )
            judged["train"] = _sample(judged["train"], self.train_rows)
        if "train" in judged and "validation" not in judged:
            if len(judged["train"]) < 2:
                raise InputError(
                    f"task.dataset: {data.source} has one training query and none for validation; add some"
                )
            judged["validation"] = _sample(judged["train"], max(1, len(judged["train"]) // 10))
            judged["train"] = {q: v for q, v in judged["train"].items() if q not in judged["validation"]}
        queries = {name: _queries(judged.get(name, {}), data) for name in SPLITS}
        facts: dict[str, Any] = {}
        if self.deduplicate and len(judged) == len(SPLITS):
            queries, facts["dropped_copies"] = without_copies(queries)
            judged = {name: {q: judged[name][q] for q in queries[name]["query"]} for name in SPLITS}
        facts |= {"leakage": leakage(queries), "queries": {name: len(each) for name, each in judged.items()}}
        relevant = {name: {p for of in judged.get(name, {}).values() for p, r in of.items() if r} for name in SPLITS}
        facts["passages"] = len(data.passages)
        facts["relevant_passages_shared_with_train"] = {
            name: len(relevant[name] & relevant["train"]) for name in ("validation", "test")
        }
        return judged, facts

    def _pools(self, data: Retrieval, judged: dict[str, Judged]) -> tuple[dict[str, Pools], str]:
        """The candidates of each split, and what found them."""
        given = {name: pools for name, pools in data.candidates.items() if name in judged}
        missing = [name for name in judged if name not in given]
        texts = [{query: data.queries[query] for query in judged[name]} for name in missing]
        found = self.bm25.search(data.passages, texts, self.candidates) if missing else []
        pools = dict(zip(missing, found, strict=True)) | {
            name: {query: pool[: self.candidates] for query, pool in pools.items()} for name, pools in given.items()
        }
        return pools, "the candidates of the data" if "test" in given else str(self.bm25)


class ListsCollator(PartsCollator):
    """Batches of lists for training, and of single pairs otherwise."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """As ``PartsCollator``, and as ``DataCollatorWithPadding``."""
        return super().__call__(rows) if isinstance(rows[0]["input_ids"][0], list) else dict(self.pad(rows))


def _iterators(columns: dict[str, list[list[int]]]) -> Iterable[tuple[str, Any]]:
    return ((name, iter(values)) for name, values in columns.items())


def _sample(judged: Judged, count: int) -> Judged:
    drawn = np.random.default_rng(42).permutation(len(judged))[:count]
    names = list(judged)
    return {names[i]: judged[names[i]] for i in sorted(drawn)}


def _queries(judged: Judged, data: Retrieval) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [data.queries[query] for query in judged], "query": list(judged)})


def _lists(lists: Sequence[Listed], data: Retrieval) -> datasets.Dataset:
    return datasets.Dataset.from_dict({
        "text": [data.queries[each.query] for each in lists],
        "passages": [[data.passages[passage] for passage in each.passages] for each in lists],
        "label": [each.relevance for each in lists],
    })  # fmt: skip


def _pairs(judged: Judged, pools: Pools, data: Retrieval) -> datasets.Dataset:
    pairs = [(query, passage) for query in judged for passage in pools.get(query, ())]
    if not pairs:
        raise InputError(f"task.dataset: no query of {data.source} has a candidate; nothing can be ranked")
    return datasets.Dataset.from_dict({
        "text": [data.queries[query] for query, _ in pairs],
        "pair": [data.passages[passage] for _, passage in pairs],
        "label": [judged[query].get(passage, 0) for query, passage in pairs],
    })  # fmt: skip


def _first_stage(judged: Judged, pools: Pools) -> dict[str, float]:
    """What the candidates are worth in the order in which they came, and the part of what is relevant that they hold."""
    judge = RankingJudge(judged, pools)
    places = [-place for pool in judge.pools.values() for place in range(len(pool))]
    answers = judge.answers(torch.tensor(places)[:, None])
    shares = [
        sum(r > 0 for p, r in judged[query].items() if p in pool) / sum(r > 0 for r in judged[query].values())
        for query, pool in ((query, set(pool)) for query, pool in judge.pools.items())
    ]
    return {name: judge.value(name, answers) for name in judge.metrics} | {"recall": float(np.mean(shares))}


TASK = Reranking
