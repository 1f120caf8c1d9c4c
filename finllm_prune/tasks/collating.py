"""Batches of rows that are several sequences each: the windows of a document, a query with each of its candidates."""

from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from finllm_prune.inference import PARTS, Gather


class PartsCollator:
    """Lays the sequences of all rows one below the other, padded to the longest, and says in ``parts`` how many each row has.

    Args:
        tokenizer: pads.
        gather: (logits of the sequences, ``parts``) -> logits whose first axis is the rows.
        sequences: columns that hold one list for each sequence; all others hold one value, or one list of numbers, a row.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, gather: Gather,
        sequences: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids"),
    ):  # fmt: skip
        self.pad = DataCollatorWithPadding(tokenizer)
        self.gather = gather
        self.sequences = sequences

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        flat = [
            {name: row[name][part] for name in self.sequences if name in row}
            for row in rows
            for part in range(len(row["input_ids"]))
        ]
        batch: dict[str, Tensor] = dict(self.pad(flat))
        batch[PARTS] = torch.tensor([len(row["input_ids"]) for row in rows])
        names = [name for name in rows[0] if name not in self.sequences]
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in names}
