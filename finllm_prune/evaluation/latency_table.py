"""How long a forward pass takes with fewer heads and neurons: measured once per machine, then read from a file."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
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

from finllm_prune.evaluation.latency import Engine, measure, on_cpu
from finllm_prune.families import alive, find_family, narrow
from finllm_prune.families.shrinking import PARTS

CACHE = Path(HF_HOME) / "finllm_prune"
_STEPS = {"attention": (0.0, 0.25, 0.5, 0.75, 1.0), "mlp": (0.0, 0.05, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)}
# Each width of another runtime is a graph of its own, which takes seconds to make.
_FEW_STEPS = {"attention": (0.0, 0.5, 1.0), "mlp": (0.0, 0.125, 0.25, 0.5, 1.0)}
_KERNEL = 8  # matrix kernels work on that many columns at a time: neurons between two multiples cost no time
_ROUNDS = 16


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

    def surface(self) -> NDArray[np.float64]:
        """The latency for each number of heads and neurons, shape (heads + 1, neurons + 1); it never falls along either.

        Straight lines join what was measured. Entry 0 is that of 1, and neurons count by whole eights.
        """
        axes = [axis if len(axis) > 1 else [0, *axis] for axis in (self.heads, self.neurons)]
        grid = _rising(np.array(self.ratios))
        for number, axis in enumerate((self.heads, self.neurons)):
            grid = grid if len(axis) > 1 else np.repeat(grid, 2, axis=number)
        heads, neurons = (np.maximum(1, np.arange(axis[-1] + 1)) for axis in (self.heads, self.neurons))
        neurons = np.minimum(-(-neurons // _KERNEL) * _KERNEL, self.neurons[-1])
        places = np.stack(np.meshgrid(heads, neurons, indexing="ij"), axis=-1)
        surface: NDArray[np.float64] = RegularGridInterpolator(axes, grid)(places)
        return surface


def equal_blocks(surface: NDArray[np.float64], ratio: float) -> tuple[int, int]:
    """Heads and neurons, the same part of each, of the widest blocks that take that part of the time, or of the narrowest."""
    parts = np.linspace(0.0, 1.0, 1001)
    heads, neurons = (np.maximum(1, np.round(parts * (size - 1))).astype(int) for size in surface.shape)
    last = max(0, int(np.searchsorted(surface[heads, neurons], ratio, side="right")) - 1)
    return int(heads[last]), int(neurons[last])


def _rising(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest table that falls along neither axis: fewer units cannot take longer, so what does is noise."""
    found = np.minimum(ratios, ratios[-1, -1])
    for _ in range(50):
        for axis in (0, 1):
            found = np.apply_along_axis(isotonic_regression, axis, found)
    rising: NDArray[np.float64] = np.maximum.accumulate(found, axis=0)  # what the last of the passes left over
    return rising


def measured_table(
    dense: PreTrainedModel, model: PreTrainedModel, batch: int, tokens: int, parts: set[str],
    runtime: str = "torch", engine: Engine = on_cpu,
) -> LatencyTable:  # fmt: skip
    """The table of this machine, runtime, model shape, input shape and number of threads; measured where it is not known yet.

    Whole models are timed, in turn with the dense one, because weights that come from memory cost more than those of a block
    that runs alone. The first rank measures for all.

    Args:
        dense: what the ratios are relative to.
        model: what is narrowed.
        batch, tokens: the shape of the input.
        parts: what may be narrowed: "attention", "mlp".
        runtime: its name, and what makes of a model what it runs; the dense one runs in it too.
    """
    family = find_family(model.config.model_type)
    widths, steps = [], _STEPS if runtime == "torch" else _FEW_STEPS
    for part in PARTS:
        units = len(alive(model, family, part, 0))
        widths.append(sorted({max(1, round(step * units)) for step in steps[part]}) if part in parts else [units])
    values = torch.zeros(1 + len(widths[0]) * len(widths[1]))
    if PartialState().is_main_process:
        key = _key(dense, model, batch, tokens, widths, runtime)
        file = CACHE / f"{model.config.model_type}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
        table = _read(file)
        if table is None:
            table = _measure(dense, model, batch, tokens, widths[0], widths[1], engine)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"of": key, **asdict(table)}, indent=1) + "\n")
        values = torch.tensor([table.dense_ms, *np.ravel(table.ratios)])
    # Masks must be equal on all ranks.
    dense_ms, *ratios = broadcast(values.to(PartialState().device, torch.float32)).tolist()
    return LatencyTable(widths[0], widths[1], np.reshape(ratios, (len(widths[0]), -1)).tolist(), dense_ms)


def _measure(
    dense: PreTrainedModel, model: PreTrainedModel, batch: int, tokens: int, heads: list[int], neurons: list[int],
    engine: Engine,
) -> LatencyTable:  # fmt: skip
    blocks = len(find_family(model.config.model_type).layers(model))
    ratios, times = np.zeros((len(heads), len(neurons))), []
    whole = engine(dense)
    cells = [(i, j) for i in range(len(heads)) for j in range(len(neurons))]
    for i, j in tqdm(cells, desc="latency table", leave=False, disable=None):
        small = narrow(model, {"attention": [heads[i]] * blocks, "mlp": [neurons[j]] * blocks})
        same = small.num_parameters() == dense.num_parameters()
        found = measure(
            dense, dense if same else small, batch, tokens, _ROUNDS, engine=lambda m: whole if m is dense else engine(m)
        )
        ratios[i, j] = 1.0 if same else found.ratio
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
    dense: PreTrainedModel, model: PreTrainedModel, batch: int, tokens: int, widths: list[list[int]], runtime: str
) -> dict[str, Any]:
    shapes = [[list(parameter.shape) for parameter in m.parameters()] for m in (dense, model)]
    return {
        "shapes": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(), "attention": model.config._attn_implementation,
        "batch": batch, "tokens": tokens, "threads": torch.get_num_threads(), "runtime": runtime, "dtype": "float32",
        "torch": torch.__version__, "processor": _processor(), "widths": widths, "rounds": _ROUNDS,
    } | ({} if runtime == "torch" else {"onnxruntime": version("onnxruntime")})  # fmt: skip


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
