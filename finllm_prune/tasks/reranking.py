"""Reranking: a query and a passage, read together, get one score, which puts what a first stage found into a better order."""

import logging
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, ClassVar

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollator, PreTrainedConfig, PreTrainedTokenizerBase

from finllm_prune.errors import InputError
from finllm_prune.families import is_causal
from finllm_prune.judges import RankingJudge
from finllm_prune.judges.rankings import MEASURES
from finllm_prune.tasks.batchwise import Batch, rewritten
from finllm_prune.tasks.beir import Pools, Retrieval, read_beir
from finllm_prune.tasks.candidates import BM25, training_lists
from finllm_prune.tasks.collating import PartsCollator
from finllm_prune.tasks.masking import Mask
from finllm_prune.tasks.queries import divided_queries, masked_texts
from finllm_prune.tasks.ranking_losses import Name, bce, ranking_loss
from finllm_prune.tasks.ranking_rows import (
    RankingExamples,
    completed,
    facts_of,
    first_stage,
    list_rows,
    pair_rows,
    query_rows,
)
from finllm_prune.tasks.rows import Choice
from finllm_prune.tasks.splitting import Split, leakage, without_copies
from finllm_prune.tasks.task import BUILTIN, Examples, Loss
from finllm_prune.tasks.yes_no import OneOutput, Prompt, asked, asks_pairs

logger = logging.getLogger(__name__)

_NO_PASSAGE = -100  # the label that fills a short list up


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
        draws: how many lists are made of the same relevant passages, each with negatives of its own. Epochs repeat negatives;
            this does not.
        candidates: how many passages of the first stage are ranked, and negatives drawn from.
        bm25: the first stage, where the data brings no candidates.
        split: divide all judged queries anew, by a column of theirs or at random; None takes the splits of the data.
        mask: replace names by one word, in queries and passages; its ``column`` is one of the queries.
        normalise_numbers: each number becomes 0.
        train_rows, test_rows: train or test on a fixed random sample of this many queries; None takes all.
        deduplicate: drop queries that come again in a later split, but for case, spaces, digits and punctuation.
        bad_rows: ``refuse`` data with a broken row, or ``skip`` such rows, counted.
        config, revision: of a Hub id: which part of it, at which branch or commit; None takes its main ones.
        keep_columns: columns of the queries that stay beside them, for the slices of a suite.
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
    draws: int = 1
    candidates: int = 100
    bm25: BM25 = field(default_factory=BM25)
    split: Split | None = None
    mask: Mask | None = None
    normalise_numbers: bool = False
    train_rows: int | None = None
    test_rows: int | None = None
    deduplicate: bool = False
    bad_rows: Choice = "refuse"
    config: str | None = None
    revision: str | None = None
    keep_columns: list[str] = field(default_factory=list)
    prompt: Prompt | None = None

    def __post_init__(self) -> None:
        if self.max_length < 8:
            raise InputError(
                f"task.max_length: a query and a passage need at least 8 tokens together, not {self.max_length}"
            )
        for key in ("positives", "negatives", "candidates"):
            if getattr(self, key) < 1:
                raise InputError(f"task.{key}: at least one passage is needed, not {getattr(self, key)}")
        if self.draws < 1:
            raise InputError(f"task.draws: at least one list is drawn for a relevant passage, not {self.draws}")

    @property
    def auto_class(self) -> OneOutput:
        return OneOutput(self.prompt or Prompt())

    def load(self) -> RankingExamples:
        data = read_beir(self.dataset, BUILTIN / "reranking", self.bad_rows, self.config, self.revision)
        lost = {split: {"no relevant passage": count} for split, count in data.unanswerable.items()}
        facts: dict[str, Any] = {"bad_rows": data.bad_rows}
        if self.mask is not None or self.normalise_numbers:
            data, masked = masked_texts(data, self.mask, self.normalise_numbers)
            facts |= {} if self.mask is None else {"masked": masked}
        if self.split is not None:
            data, facts["split"] = divided_queries(data, self.split)
        data = completed(data, train=self.train_rows, test=self.test_rows)
        queries = query_rows(data)
        if self.deduplicate and "train" in data.judged:
            queries, facts["dropped_copies"] = without_copies(queries)
            data = data.of({name: set(rows["query"]) for name, rows in queries.items()})
        facts |= {"leakage": leakage(queries)} | facts_of(data)
        pools, name = self._pools(data)
        splits: dict[str, datasets.Dataset] = {
            split: pair_rows(data, split, pools[split], self.keep_columns)
            for split in ("validation", "test")
            if split in data.judged
        }
        facts["first_stage"] = {"name": name, "candidates": self.candidates}
        facts["first_stage"] |= {split: first_stage(data.judged[split], pools[split]) for split in splits}
        if "train" in data.judged:
            lists = training_lists(
                data.judged["train"], pools["train"], data.passages, self.positives, self.negatives, self.draws
            )
            splits = {"train": list_rows(data, lists)} | splits
            if alone := len(data.judged["train"]) - len({each.query for each in lists}):
                lost["train"] = lost.get("train", {}) | {"no candidate that is not relevant": alone}
        facts["queries_left_out"] = lost
        for split, whys in lost.items():
            told = ", ".join(f"{count} with {why}" for why, count in whys.items())
            logger.warning("task.dataset: queries of %s are left out: %s.", split, told)
        return RankingExamples(
            splits, ["relevance"], data.source, facts, data.left_out, judged=data.judged, pools=pools
        )

    def fit_tokenizer(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """CrossEncoder reads from it how long pairs may be and how they are put into words."""
        tokenizer.model_max_length = min(self.max_length, tokenizer.model_max_length)
        if self.prompt is not None or (is_causal(config) and not asks_pairs(tokenizer)):
            tokenizer.chat_template = (self.prompt or Prompt()).chat_template()
        elif not asks_pairs(tokenizer):
            tokenizer.chat_template = None  # of a chat, which this is not

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        encode = self._encoded_lists if "passages" in rows.column_names else self._encoded_pairs
        return rewritten(rows, lambda batch, _: encode(batch, tokenizer))

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
        return {"num_labels": 1, "id2label": {0: labels[0]}, "label2id": {labels[0]: 0}, "problem_type": None}

    def judge(self, examples: Examples, split: str = "test") -> RankingJudge:
        assert isinstance(examples, RankingExamples)
        return RankingJudge(examples.judged[split], examples.pools[split])

    @property
    def _width(self) -> int:
        return self.positives + self.negatives

    def _gather(self, logits: Tensor, parts: Tensor) -> Tensor:
        """Scores (passages, 1) -> (lists, passages of the longest list)."""
        return torch.stack([F.pad(part[:, 0], (0, self._width - len(part))) for part in logits.split(parts.tolist())])

    def _encoded_pairs(self, rows: Batch, tokenizer: PreTrainedTokenizerBase) -> Batch:
        return self._encode(rows["text"], rows["pair"], tokenizer) | {"labels": rows["label"]}

    def _encoded_lists(self, rows: Batch, tokenizer: PreTrainedTokenizerBase) -> Batch:
        sizes = [len(passages) for passages in rows["passages"]]
        queries = [query for query, size in zip(rows["text"], sizes, strict=True) for _ in range(size)]
        flat = self._encode(queries, list(chain.from_iterable(rows["passages"])), tokenizer)
        lists: Batch = {}
        for name, values in flat.items():
            rest = iter(values)
            lists[name] = [list(islice(rest, size)) for size in sizes]
        return lists | {"labels": [label + [_NO_PASSAGE] * (self._width - len(label)) for label in rows["label"]]}

    def _encode(
        self, queries: list[str], passages: list[str], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, list[list[int]]]:
        limit = min(self.max_length, tokenizer.model_max_length)
        if asks_pairs(tokenizer):
            ids = asked(tokenizer, queries, passages, limit)
            return {"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]}
        tokens = tokenizer(queries, passages, truncation="longest_first", max_length=limit)
        return {name: tokens[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in tokens}

    def _pools(self, data: Retrieval) -> tuple[dict[str, Pools], str]:
        """The candidates of each split, and what found those of the test."""
        missing = [split for split in data.judged if split not in data.candidates]
        texts = [{query: data.queries[query] for query in data.judged[split]} for split in missing]
        found = self.bm25.search(data.passages, texts, self.candidates) if missing else []
        given = {
            split: {query: pool[: self.candidates] for query, pool in pools.items()}
            for split, pools in data.candidates.items()
        }
        name = "the data's own first stage" if "test" in given else str(self.bm25)
        return given | dict(zip(missing, found, strict=True)), name


class ListsCollator(PartsCollator):
    """Batches of lists for training, and of single pairs otherwise."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """As ``PartsCollator``, and as ``DataCollatorWithPadding``."""
        return super().__call__(rows) if isinstance(rows[0]["input_ids"][0], list) else dict(self.pad(rows))


TASK = Reranking
