"""The forward pass of a batch whose rows may be several sequences, and the logits of a model on many rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollator, PreTrainedModel
from transformers.utils.generic import ModelOutput

PARTS = "parts"
Gather = Callable[[Tensor, Tensor], Tensor]


def gather_of(collator: DataCollator) -> Gather | None:
    """How a collator that makes several sequences of a row puts their logits together: (logits, parts) -> one for each row."""
    gather: Gather | None = getattr(collator, "gather", None)
    return gather


def answer(
    model: Callable[..., Any], batch: Mapping[str, Tensor], gather: Gather | None = None, **options: Any
) -> ModelOutput:
    """The outputs of a model for a batch without its labels.

    Args:
        model: anything that is called like one.
        batch: what the model takes, and ``parts``, where rows are not what the model gives logits for: the sequences of each
            row, shape (rows,), or which token comes next where it is to be learned (``tasks.completions``).
        gather: puts the logits (sequences, outputs) of such a batch together, one for each row.
        options: for the model, as ``output_hidden_states``.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", PARTS)}
    if "logits_to_keep" in inputs:  # of a language model, whose cache is of use only where it writes
        options["use_cache"] = False
    outputs: ModelOutput = model(**inputs, **options)
    if PARTS in batch and gather is not None:
        outputs["logits"] = gather(outputs["logits"], batch[PARTS])
    return outputs


def logits_of(
    model: Callable[..., Any], rows: datasets.Dataset, collator: DataCollator, batch_size: int = 64
) -> Tensor:  # fmt: skip
    """The logits (fp32, on the CPU) of each row, in order.

    Args:
        model: on the device where it is to run, or anything on the CPU that is called like one. A model's mode is as before
            afterwards.
        rows: tokenized; the columns that the collator takes.
        collator: makes a batch of rows.
        batch_size: sequences at a time, or one row's; fewer where the collator tells how many may run ``at_once``. Rows of
            like length lie together.
    """
    order, found = [], []
    for numbers, _, outputs in outputs_of(model, rows, collator, batch_size):
        order.extend(numbers)
        found.append(outputs["logits"].float().cpu())
    return in_order(torch.cat(found), order)


def outputs_of(
    model: Callable[..., Any], rows: datasets.Dataset, collator: DataCollator, batch_size: int = 64,
    description: str = "predict", **options: Any,
) -> Iterator[tuple[list[int], dict[str, Tensor], ModelOutput]]:  # fmt: skip
    """The numbers of some rows, their batch on the model's device, and its outputs; together all rows, each once.

    Args:
        model, rows, collator, batch_size: as of ``logits_of``.
        description: of the progress bar.
        options: for the model, as ``output_hidden_states``.
    """
    batches = _batches(rows["input_ids"], min(batch_size, getattr(collator, "at_once", batch_size)))
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=collator)
    with _evaluating(model) as device:
        for numbers, batch in zip(batches, tqdm(loader, desc=description, leave=False, disable=None), strict=True):
            inputs = {key: value.to(device) for key, value in batch.items()}
            with torch.inference_mode():  # which would stay on where whoever iterates never comes back
                outputs = answer(model, inputs, gather_of(collator), **options)
            yield numbers, inputs, outputs


def _batches(ids: Sequence[list[Any]], sequences: int) -> list[list[int]]:
    """Numbers of rows of like length, of so many sequences at the most, or one row."""
    sizes = sorted((length(row), number, _sequences(row)) for number, row in enumerate(ids))
    found: list[list[int]] = []
    room = 0
    for _, number, own in sizes:
        if own > room:
            found.append([])
            room = sequences
        found[-1].append(number)
        room -= own
    return found


def in_order(values: Tensor, numbers: list[int]) -> Tensor:
    """Row ``numbers[i]`` of the result is row i of ``values``."""
    return torch.empty_like(values).index_copy_(0, torch.tensor(numbers), values)


def length(ids: list[Any]) -> int:
    """Tokens of a row, over all its sequences."""
    return sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)


def _sequences(ids: list[Any]) -> int:
    return len(ids) if ids and isinstance(ids[0], list) else 1


@contextmanager
def _evaluating(model: Callable[..., Any]) -> Iterator[torch.device]:
    """Without dropout; yields where the inputs go."""
    if not isinstance(model, PreTrainedModel):
        yield torch.device("cpu")
        return
    was_training = model.training
    model.eval()
    try:
        yield model.device
    finally:
        model.train(was_training)
