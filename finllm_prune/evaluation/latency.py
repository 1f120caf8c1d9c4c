"""CPU latency of two models, measured alternately in one run, so that a drifting machine slows both."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Latency:
    """Milliseconds per forward pass: medians and quartiles; ``ratio`` is the median of the pairwise small / dense."""

    batch: int
    tokens: int
    threads: int
    rounds: int
    dense_ms: float
    dense_iqr_ms: list[float]
    small_ms: float
    small_iqr_ms: list[float]
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(dense: PreTrainedModel, small: PreTrainedModel, batch: int, tokens: int = 64, rounds: int = 20) -> Latency:
    """Forward passes of random token ids, dense and small in turn, after two warm-up rounds.

    Args:
        dense, small: models of the same vocabulary; copies of them run on the CPU in fp32.
        batch, tokens: the shape of the input.
        rounds: how many pairs are counted.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, dense.config.vocab_size, (batch, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models = [copy.deepcopy(model).cpu().float().eval() for model in (dense, small)]
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 2):
        for model, series in zip(models, times, strict=True):
            series.append(_seconds(model, inputs) * 1e3)
    first, second = (np.array(series[2:]) for series in times)
    return Latency(
        batch=batch,
        tokens=tokens,
        threads=torch.get_num_threads(),
        rounds=rounds,
        dense_ms=float(np.median(first)),
        dense_iqr_ms=np.percentile(first, [25, 75]).tolist(),
        small_ms=float(np.median(second)),
        small_iqr_ms=np.percentile(second, [25, 75]).tolist(),
        ratio=float(np.median(second / first)),
    )


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """That many threads for torch's operators inside the block; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _seconds(model: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    begin = time.perf_counter()
    model(**inputs)
    return time.perf_counter() - begin
