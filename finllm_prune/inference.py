"""The logits of a model on many rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollator, PreTrainedModel


def logits_of(
    model: Callable[..., Any], rows: datasets.Dataset, collator: DataCollator, batch_size: int = 64
) -> Tensor:  # fmt: skip
    """The logits (fp32, on the CPU) of each row, in order.

    Args:
        model: on the device where it is to run, or anything on the CPU that is called like one. A model's mode is as before
            afterwards.
        rows: tokenized; the columns that the collator takes.
        collator: makes a batch of rows.
        batch_size: rows at a time; rows of like length lie together.
    """
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    loader = DataLoader(rows.select(by_length), batch_size=batch_size, collate_fn=collator)
    found = []
    with _evaluating(model) as device:
        for batch in tqdm(loader, desc="predict", leave=False, disable=None):
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            found.append(model(**inputs).logits.float().cpu())
    logits = torch.cat(found)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(by_length), logits)


@contextmanager
def _evaluating(model: Callable[..., Any]) -> Iterator[torch.device]:
    """Without gradients and dropout; yields where the inputs go."""
    with torch.inference_mode():
        if not isinstance(model, PreTrainedModel):
            yield torch.device("cpu")
            return
        was_training = model.training
        model.eval()
        yield model.device
        model.train(was_training)
