"""What runs against dense eager PyTorch in turn, and the table of how much faster it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

BASELINE = "dense, eager"


@dataclass(frozen=True)
class Contestant:
    """Something to measure: its size, and how to make the callable for a number of threads (torch has that many)."""

    bytes: int
    engine: Callable[[int], Callable[..., Any]]


def size(model: PreTrainedModel) -> int:
    """Bytes of the weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def table(contestants: dict[str, Contestant], times: dict[str, NDArray[np.float64]], batch: int) -> str:
    """Markdown."""
    lines = ["| | MB | ms, median [quartiles] | texts/s | × dense eager |", "|---|---|---|---|---|"]
    for name, series in times.items():
        low, median, high = np.percentile(series, [25, 50, 75])
        faster = np.median(times[BASELINE] / series)
        lines.append(
            f"| {name} | {contestants[name].bytes / 1e6:.1f} | {median:.1f} [{low:.1f}, {high:.1f}] | "
            f"{1e3 * batch / median:.1f} | {faster:.2f} |"
        )
    return "\n".join(lines)
