"""How long a forward pass takes with fewer heads and neurons: measured once per machine, then read from a file."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from huggingface_hub.constants import HF_HOME
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator
from sklearn.isotonic import isotonic_regression
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from finllm_prune.evaluation.latency import measure
from finllm_prune.families import alive, find_family, narrow
from finllm_prune.families.shrinking import PARTS

CACHE = Path(HF_HOME) / "finllm_prune"
_STEPS = {"attention": (0.0, 0.25, 0.5, 0.75, 1.0), "mlp": (0.0, 0.05, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)}
_ROUNDS = 10


@dataclass(frozen=True)
class LatencyTable:
    """Latency of models whose blocks all have the same widths, as parts of the dense model's.

    Args:
        heads, neurons: the widths that were measured, ascending; the last is the dense one.
        ratios: shape (heads, neurons).
        dense_ms: the dense model's median.
    """

    heads: list[int]
    neurons: list[int]
    ratios: list[list[float]]
    dense_ms: float

    def at(self, heads: float, neurons: float) -> float:
        """Between what was measured, by straight lines."""
        axes = [axis if len(axis) > 1 else [0, *axis] for axis in (self.heads, self.neurons)]
        grid = np.array(self.ratios)
        for number, axis in enumerate((self.heads, self.neurons)):
            grid = grid if len(axis) > 1 else np.repeat(grid, 2, axis=number)
        return float(RegularGridInterpolator(axes, grid)((heads, neurons)))

    def meeting(self, ratio: float) -> tuple[float, float]:
        """Heads and neurons of the narrowest equal blocks that take that part of the time, or of the narrowest at all."""
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self.at(*self._along(middle)) > ratio else (middle, high)
        return self._along(low)

    def slice(self, part: str, place: tuple[float, float]) -> NDArray[np.float64]:
        """Entry k: the latency with k units of a part and the other part as in ``place``; it never falls with k."""
        axis = self.heads if part == "attention" else self.neurons
        found = [self.at(k, place[1]) if part == "attention" else self.at(place[0], k) for k in axis]
        smooth: NDArray[np.float64] = np.interp(np.arange(axis[-1] + 1), axis, isotonic_regression(np.array(found)))
        return smooth

    def _along(self, part: float) -> tuple[float, float]:
        heads, neurons = (axis[0] + part * (axis[-1] - axis[0]) for axis in (self.heads, self.neurons))
        return heads, neurons


def measured_table(
    dense: PreTrainedModel, model: PreTrainedModel, batch: int, tokens: int, parts: set[str]
) -> LatencyTable:
    """The table of this machine, model shape, input shape and number of threads; measured where it is not known yet.

    Whole models are timed, in turn with the dense one, because weights that come from memory cost more than those of a block
    that runs alone. The first rank measures for all.

    Args:
        dense: what the ratios are relative to.
        model: what is narrowed.
        batch, tokens: the shape of the input.
        parts: what may be narrowed: "attention", "mlp".
    """
    family = find_family(model.config.model_type)
    widths = []
    for part in PARTS:
        units = len(alive(model, family, part, 0))
        widths.append(sorted({max(1, round(step * units)) for step in _STEPS[part]}) if part in parts else [units])
    values = torch.zeros(1 + len(widths[0]) * len(widths[1]))
    if PartialState().is_main_process:
        key = _key(dense, model, batch, tokens, widths)
        file = CACHE / f"{model.config.model_type}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
        table = _read(file)
        if table is None:
            table = _measure(dense, model, batch, tokens, widths[0], widths[1])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"of": key, **asdict(table)}, indent=1) + "\n")
        values = torch.tensor([table.dense_ms, *np.ravel(table.ratios)])
    # Masks must be equal on all ranks.
    dense_ms, *ratios = broadcast(values.to(PartialState().device, torch.float32)).tolist()
    return LatencyTable(widths[0], widths[1], np.reshape(ratios, (len(widths[0]), -1)).tolist(), dense_ms)


def _measure(
    dense: PreTrainedModel, model: PreTrainedModel, batch: int, tokens: int, heads: list[int], neurons: list[int]
) -> LatencyTable:
    blocks = len(find_family(model.config.model_type).layers(model))
    ratios, times = np.zeros((len(heads), len(neurons))), []
    cells = [(i, j) for i in range(len(heads)) for j in range(len(neurons))]
    for i, j in tqdm(cells, desc="latency table", leave=False, disable=None):
        small = narrow(model, {"attention": [heads[i]] * blocks, "mlp": [neurons[j]] * blocks})
        found = measure(dense, small, batch, tokens, _ROUNDS)
        ratios[i, j] = found.ratio
        times.append(found.dense_ms)
    return LatencyTable(heads, neurons, ratios.tolist(), float(np.median(times)))


def _read(file: Path) -> LatencyTable | None:
    """A file that a kill cut short, or another version wrote, is measured anew."""
    try:
        content = json.loads(file.read_text())
        return LatencyTable(content["heads"], content["neurons"], content["ratios"], content["dense_ms"])
    except (OSError, ValueError, KeyError):
        return None


def _key(
    dense: PreTrainedModel, model: PreTrainedModel, batch: int, tokens: int, widths: list[list[int]]
) -> dict[str, Any]:
    shapes = [[list(parameter.shape) for parameter in m.parameters()] for m in (dense, model)]
    return {
        "shapes": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(), "attention": model.config._attn_implementation,
        "batch": batch, "tokens": tokens, "threads": torch.get_num_threads(), "runtime": "torch", "dtype": "float32",
        "torch": torch.__version__, "processor": _processor(), "widths": widths, "rounds": _ROUNDS,
    }  # fmt: skip


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
