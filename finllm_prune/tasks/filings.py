"""Filings: one long document, one of 2 to 100+ classes, or several of them."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import datasets
from transformers import DataCollator, PreTrainedTokenizerBase

from finllm_prune.errors import InputError
from finllm_prune.judges import ClassJudge, Judge
from finllm_prune.tasks.batchwise import Batch, rewritten
from finllm_prune.tasks.classification import Classification
from finllm_prune.tasks.collating import PartsCollator
from finllm_prune.tasks.ends import both_ends, columns_of
from finllm_prune.tasks.markup import plain_text
from finllm_prune.tasks.skew import SkewLoss
from finllm_prune.tasks.task import Examples, Loss
from finllm_prune.tasks.windows import Pooling, pooled, windows_of

_FEW = 3  # classes, among whose three likeliest the right one always is


@dataclass(frozen=True)
class Filings(Classification):
    """Classification of documents that are longer than the model reads.

    Args:
        strategy: which tokens of a long document the model sees. ``head``: the first ``max_length``; ``head_tail``: the
            first and the last, together ``max_length`` (Sun et al. 2019). ``windows``: all of the document, in sequences of
            ``max_length``, whose logits are pooled in training as in use; a batch is then of documents. For a model of long
            context raise ``max_length``.
        head: the part of ``max_length`` that ``head_tail`` takes from the beginning.
        stride: tokens that a window shares with the one before, as the tokenizer's own ``stride``.
        max_windows: what lies beyond so many windows is not read.
        pooling: ``mean`` of the windows' logits, or the ``max`` of each output.
        clean: resolve HTML tags and entities and make white space single.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "micro_f1")
    builtin: ClassVar[str] = "filings"

    max_length: int = 512
    strategy: Literal["head", "head_tail", "windows"] = "head"
    head: float = 0.25
    stride: int = 64
    max_windows: int = 8
    pooling: Pooling = "mean"
    clean: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.head < 1:
            raise InputError(f"task.head: the part taken from the beginning lies between 0 and 1, not at {self.head}")
        if self.strategy == "windows" and not 0 <= self.stride < self.max_length - 2:
            raise InputError(
                f"task.stride: a window shares 0 to {self.max_length - 3} tokens with the last, not {self.stride}"
            )
        if self.max_windows < 1:
            raise InputError(f"task.max_windows: a document is read in 1 window or more, not in {self.max_windows}")
        if self.pair_column is not None:
            raise InputError("task.pair_column: a filing is one text; remove the key, or use the task sentiment")

    def load(self) -> Examples:
        examples = super().load()
        if self.dataset == "builtin":
            examples = dataclasses.replace(examples, source="the passages of filings that finllm-prune embeds")
        return examples

    def judge(self, examples: Examples, split: str = "test") -> Judge:
        judge = super().judge(examples, split)
        if isinstance(judge, ClassJudge) and len(examples.labels) > _FEW:
            return dataclasses.replace(judge, metrics=(*self.metrics, "top3_accuracy"))
        return judge

    def read_text(self, text: str) -> str:
        return plain_text(text) if self.clean else text

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        if self.strategy == "head":
            return super().tokenize(rows, tokenizer)
        limit = min(self.max_length, tokenizer.model_max_length)

        def read(batch: Batch, _: Sequence[int]) -> Batch:
            if self.strategy == "head_tail":
                return columns_of(both_ends(batch["text"], limit, self.head, tokenizer)) | {"labels": batch["label"]}
            ids = windows_of(batch["text"], limit, self.stride, self.max_windows, tokenizer)
            masks = [[[1] * len(window) for window in windows] for windows in ids]
            return {"input_ids": ids, "attention_mask": masks, "labels": batch["label"]}

        return rewritten(rows, read)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        if self.strategy != "windows":
            return super().collator(tokenizer)
        return PartsCollator(tokenizer, functools.partial(pooled, pooling=self.pooling))

    def loss(self, examples: Examples) -> Loss | None:
        # No model has a loss of its own for pooled logits.
        return super().loss(examples) or (SkewLoss(None, 0.0) if self.strategy == "windows" else None)


TASK = Filings
