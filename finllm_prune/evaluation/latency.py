"""CPU latency of models in any runtime, measured alternately in one run, so that a drifting machine slows all of them."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

Engine = Callable[[PreTrainedModel], Callable[..., Any]]
"""Makes a runtime's own form of a model, which is called like it."""

# Threads of the engine before may spin on for so many seconds.
REST = 0.005


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


def measure(
    dense: Callable[..., Any], small: Callable[..., Any], batch: int, tokens: int = 64, rounds: int = 20,
    vocabulary: int | None = None, engine: Callable[..., Callable[..., Any]] | None = None,
) -> Latency:  # fmt: skip
    """Forward passes of random token ids, dense and small in turn.

    Args:
        dense, small: models, of which copies run on the CPU in fp32, or anything that is called like one.
        batch, tokens: the shape of the input.
        rounds: how many pairs are counted.
        vocabulary: ids that both know; None takes those of ``dense``, a model.
        engine: what makes of both what is run; None is ``on_cpu``.
    """
    engine = engine or on_cpu
    inputs = token_ids(vocabulary or dense.config.vocab_size, batch, tokens)  # type: ignore[attr-defined]
    times = alternate({"dense": engine(dense), "small": engine(small)}, inputs, rounds)
    first, second = times["dense"], times["small"]
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


def alternate(
    engines: Mapping[str, Callable[..., Any]], inputs: dict[str, Tensor], rounds: int, seconds: float = math.inf
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each call ``engine(**inputs)``, shape (rounds,): all of them in turn, after two warm-up rounds.

    Args:
        engines: models, compiled ones, or a runtime's session behind such a call.
        inputs: on the CPU.
        rounds: how many are counted.
        seconds: after the warm-up; no round begins later than this, once three were counted.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 2):
        if number == 2:
            began = time.perf_counter()
        if number >= 5 and time.perf_counter() - began > seconds:
            break
        for name, engine in engines.items():
            time.sleep(REST)
            times[name].append(_seconds(engine, inputs) * 1e3)
    return {name: np.array(series[2:]) for name, series in times.items()}


def token_ids(vocabulary: int, batch: int, tokens: int) -> dict[str, Tensor]:
    """Random ``input_ids`` (batch, tokens), all attended to."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (batch, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def on_cpu(model: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a PyTorch model on the CPU in fp32; any other engine as it is.

    A language model reads a prompt and tells the next token; what it would say after each token of the prompt nobody asks.
    """
    if not isinstance(model, PreTrainedModel):
        return model
    own = copy.deepcopy(model).cpu().float().eval()
    own.config.use_cache = False  # which the Trainer turns off in what it trained
    return partial(own, logits_to_keep=1) if own.can_generate() else own


@torch.inference_mode()
def _seconds(engine: Callable[..., Any], inputs: dict[str, Tensor]) -> float:
    begin = time.perf_counter()
    engine(**inputs)
    return time.perf_counter() - begin
