"""Batches of texts of like length in random order: little padding, and no drift of length within an epoch."""

from collections.abc import Iterator, Sequence

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollator

_CHUNK = 16


class BucketSampler(Sampler[int]):
    """Row indices of an epoch: shuffled, sorted by length within chunks of 16 batches, then the batches shuffled.

    transformers' own length grouping walks each chunk from its longest to its shortest batch, so that the loss, and with it
    the scores of a pruner, swing with the length of the texts.

    Args:
        lengths: tokens per row.
        batch_size: rows per optimizer step over all ranks, so that these get like lengths too.
        seed: of the order; the epoch is added to it, so a resumed run sees the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        batches: list[torch.Tensor] = []
        for chunk in order.split(_CHUNK * self.batch_size):
            batches += chunk[self.lengths[chunk].argsort(stable=True)].split(self.batch_size)
        # A short last batch stays last, so that all others are whole.
        tail = batches.pop() if len(batches[-1]) < self.batch_size else order[:0]
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        yield from torch.cat([*shuffled, tail]).tolist()


def sample_batches(
    rows: datasets.Dataset, count: int, collator: DataCollator, seed: int, batch_size: int = 16
) -> list[dict[str, Tensor]]:
    """Batches of a random sample of tokenized rows, the same on any number of ranks."""
    sample = rows.shuffle(seed=seed).select(range(min(count, len(rows))))
    return list(DataLoader(sample, batch_size, collate_fn=collator))
