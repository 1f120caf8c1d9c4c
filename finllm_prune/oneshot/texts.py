"""Texts as windows of tokens: what a model is calibrated on, and what its perplexity is taken of."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finllm_prune.errors import InputError
from finllm_prune.tasks import read_texts
from finllm_prune.tasks.task import read_splits
from finllm_prune.tasks.texts import filled_texts

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
BUILTIN = "filings"


@dataclass(frozen=True)
class Windows:
    """Texts, end to end, in windows of equal length that do not overlap; the last one may be shorter.

    An end-of-text token stands between two texts, and a window begins with the tokenizer's own beginning, if it sets one.

    Args:
        dataset: ``builtin`` (passages of annual reports), a .txt, .jsonl, .csv or .parquet file, a folder of splits, a Hub id.
        text_column: the column of the text.
        split: of a folder or a Hub id.
        tokens: of a window.
        rows: how many windows are taken, at random; all, where there are fewer or it is None.
        seed: of that draw.
    """

    dataset: str = "builtin"
    text_column: str = "text"
    split: str = "test"
    tokens: int = 2048
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise InputError(f"tokens: a window has at least 2, of which one is predicted, not {self.tokens}")
        if self.rows is not None and self.rows < 1:
            raise InputError(f"rows: at least 1 window is needed, not {self.rows}")

    def read(self, tokenizer: PreTrainedTokenizerBase, key: str) -> list[list[int]]:
        """The token ids of each window; ``key`` of the recipe asked for them.

        Raises:
            InputError: the texts cannot be read, or are too few for one window of two tokens.
        """
        ids = self._tokens(tokenizer, key)
        first = tokenizer("a")["input_ids"][0]
        begin = [first] if first == tokenizer.bos_token_id else []
        size = self.tokens - len(begin)
        windows = [begin + ids[start : start + size] for start in range(0, len(ids), size)]
        windows = [window for window in windows if len(window) > 1]
        if not windows:
            raise InputError(f"{key}.dataset: {self.dataset} holds no two tokens; name texts")
        if self.rows is None or self.rows >= len(windows):
            if self.rows is not None and self.rows > len(windows):
                logger.info(
                    "%s: the texts make %d windows of %d tokens, not %d.", key, len(windows), self.tokens, self.rows
                )
            return windows
        whole = [window for window in windows if len(window) == self.tokens]
        return random.Random(self.seed).sample(whole if len(whole) >= self.rows else windows, self.rows)

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, key: str) -> list[int]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = self._texts(key)
        read = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [token for ids in read for token in [*ids, *end]]

    def _texts(self, key: str) -> list[str]:
        if Path(self.dataset).is_file():
            return read_texts(self.dataset, f"{key}.dataset", column=self.text_column)
        try:
            splits, source = read_splits(self.dataset, BUILTIN)
        except InputError as error:
            raise InputError(str(error).replace("task.dataset", f"{key}.dataset")) from error
        if self.split not in splits:
            raise InputError(
                f"{key}.split: {source} has no split {self.split}, but {', '.join(splits)}; name one of these"
            )
        if self.text_column not in splits[self.split].column_names:
            raise InputError(
                f"{key}.text_column: {source} has no column '{self.text_column}' but "
                f"{', '.join(splits[self.split].column_names)}; name one of these"
            )
        return filled_texts(
            list(splits[self.split][self.text_column]), f"{key}.dataset", f"{source}, split {self.split},"
        )


@dataclass(frozen=True)
class Calibration(Windows):
    """What a method sees; by default of another split than perplexity is taken of."""

    split: str = "train"
    rows: int | None = 128


def batches(rows: Sequence[Sequence[int]], tokens: int) -> list[Batch]:
    """Rows of token ids, in order, in batches of so many tokens or of one row; padding (0) comes last and does not count."""
    made: list[Batch] = []
    start = 0
    while start < len(rows):
        end, longest = start, 0
        while end < len(rows) and (end == start or max(longest, len(rows[end])) * (end - start + 1) <= tokens):
            longest = max(longest, len(rows[end]))
            end += 1
        part = [torch.tensor(row) for row in rows[start:end]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
        made.append({"input_ids": ids, "attention_mask": real})
        start = end
    return made
