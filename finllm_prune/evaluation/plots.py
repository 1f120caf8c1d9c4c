"""Figures of a run, as PNG."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(layers: list[dict[str, Any]], history: list[dict[str, Any]], folder: Path) -> None:
    """``sparsity.png`` (sparsity and loss over steps) and ``density.png`` (kept weights, block by matrix)."""
    folder.mkdir(parents=True, exist_ok=True)
    _sparsity(history, folder / "sparsity.png")
    _density(layers, folder / "density.png")


def _sparsity(history: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    steps = [entry["step"] for entry in history]
    axis.plot(steps, [100 * entry["sparsity"] for entry in history], color="tab:blue")
    axis.set(xlabel="optimizer step", ylim=(0, 100))
    axis.set_ylabel("sparsity of the targeted weights, %", color="tab:blue")
    axis.grid(alpha=0.3)
    loss = axis.twinx()
    loss.plot(steps, [entry["loss"] for entry in history], color="tab:orange", alpha=0.8)
    loss.set_ylabel("training loss", color="tab:orange")
    loss.set_ylim(bottom=0)
    axis.set_title("Pruning over the run")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _density(layers: list[dict[str, Any]], path: Path) -> None:
    blocks: dict[str, dict[str, float]] = {}
    for layer in layers:
        block, matrix = _place(layer["layer"])
        blocks.setdefault(block, {})[matrix] = layer["density"]
    names = list(dict.fromkeys(name for row in blocks.values() for name in row))
    grid = np.array([[row.get(name, np.nan) for name in names] for row in blocks.values()])
    lists = {block.rpartition(".")[0] for block in blocks}
    figure, axis = plt.subplots(figsize=(7, 1.6 + 0.4 * len(grid)), layout="constrained")
    image = axis.imshow(100 * grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(blocks)), [block.rpartition(".")[2] if len(lists) == 1 else block for block in blocks])
    axis.set(ylabel="block", title="Density: weights that are kept, %")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if not np.isnan(value):
                axis.text(
                    x, y, f"{100 * value:.0f}", ha="center", va="center", color="white" if value < 0.6 else "black"
                )
    figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _place(layer: str) -> tuple[str, str]:
    """``bert.encoder.layer.3.output.dense`` -> ``("bert.encoder.layer.3", "output.dense")``."""
    parts = layer.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])
