"""Sliding windows: a long document as several sequences, whose logits become one answer."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finllm_prune.errors import InputError
from finllm_prune.tasks.ends import Ids, start_of

Pooling = Literal["mean", "max"]


def windows_of(
    texts: Sequence[str], limit: int, stride: int, most: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[Ids]]:
    """The first ``most`` windows of each text, as ``tokenizer(..., stride=stride, return_overflowing_tokens=True)`` makes them.

    Args:
        limit: tokens of a window, special ones included.
        stride: tokens that a window shares with the one before.

    Raises:
        InputError: windows would not move on, or the tokenizer cannot make them.
    """
    room = limit - tokenizer.num_special_tokens_to_add()
    if stride >= room:
        raise InputError(f"task.stride: windows hold {room} tokens of a text, so {stride} cannot be shared; lower it")
    if not tokenizer.is_fast:
        raise InputError(
            "task.strategy: windows are made by fast tokenizers (tokenizer.json), and this model has none; use head"
        )
    if tokenizer.truncation_side != "right":  # the first window is then the end of the text
        return [windows[:most] for windows in _cut(texts, limit, stride, tokenizer)]
    starts = [start_of(text, room + most * (room - stride)) for text in texts]
    found = _cut(starts, limit, stride, tokenizer)
    for i, windows in enumerate(found):
        if len(windows) <= most and len(starts[i]) < len(texts[i]):  # the last may be short for want of characters
            (found[i],) = _cut([texts[i]], limit, stride, tokenizer)
    return [windows[:most] for windows in found]


def pooled(logits: Tensor, parts: Tensor, pooling: Pooling) -> Tensor:
    """One row for each document: the mean, or the largest of each output, over its windows.

    Args:
        logits: of all windows, one document after the other, shape (windows, outputs).
        parts: windows of each document, shape (documents,).
    """
    of_each = logits.split(parts.tolist())
    return torch.stack([each.mean(0) if pooling == "mean" else each.amax(0) for each in of_each])


def _cut(texts: Sequence[str], limit: int, stride: int, tokenizer: PreTrainedTokenizerBase) -> list[list[Ids]]:
    tokens = tokenizer(
        list(texts), truncation=True, max_length=limit, stride=stride, return_overflowing_tokens=True, verbose=False
    )
    windows: list[list[Ids]] = [[] for _ in texts]
    for text, ids in zip(tokens["overflow_to_sample_mapping"], tokens["input_ids"], strict=True):
        windows[text].append(ids)
    return windows
