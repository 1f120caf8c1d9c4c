"""Figures of a run, as PNG."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from finllm_prune.evaluation.sparsity import place_of


def draw(layers: list[dict[str, Any]], history: list[dict[str, Any]], folder: Path) -> None:
    """``sparsity.png`` (sparsity and loss over steps) and ``density.png`` (kept weights, block by matrix)."""
    folder.mkdir(parents=True, exist_ok=True)
    _sparsity(history, folder / "sparsity.png")
    _density(layers, folder / "density.png")


def draw_record(record: Path, folder: Path) -> None:
    """``density_over_steps.png``, ``churn.png`` and ``scores.png``, from the table of the flight recorder."""
    table = pd.read_parquet(record)
    folder.mkdir(parents=True, exist_ok=True)
    _density_over_steps(table, folder / "density_over_steps.png")
    _churn(table, folder / "churn.png")
    _scores(table, folder / "scores.png")


def _density_over_steps(table: pd.DataFrame, path: Path) -> None:
    grid = table.pivot_table(index="layer", columns="step", values="density", aggfunc="last", sort=False)
    figure, axis = plt.subplots(figsize=(7, 1.6 + 0.2 * len(grid)), layout="constrained")
    # A moment stands for the steps since the moment before.
    edges = [0, *grid.columns]
    image = axis.pcolormesh(edges, range(len(grid) + 1), 100 * grid.to_numpy(), vmin=0, vmax=100, cmap="viridis")
    axis.set_yticks(np.arange(len(grid)) + 0.5, _short(grid.index), fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="optimizer step", title="Density over the run: units that are kept, %")
    figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _churn(table: pd.DataFrame, path: Path) -> None:
    churn = 100 * table["churn"].groupby(table["step"]).agg(["min", "max", "mean"])
    regrown = 100 * (table["regrown"] / table["units"]).groupby(table["step"]).mean()
    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axis.fill_between(churn.index, churn["min"], churn["max"], alpha=0.2, label="churn, lowest to highest layer")
    axis.plot(churn.index, churn["mean"], label="churn: units cut or regrown, mean over layers")
    axis.plot(regrown.index, regrown, label="of these regrown: cut before, kept again")
    axis.set(xlabel="optimizer step", ylabel="% of the units per interval", title="Mask flips over the run")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _scores(table: pd.DataFrame, path: Path) -> None:
    """One panel per kind of layer: rules may differ between kinds, and with them the scale of the scores."""
    scored = table[table.groupby("layer")["score_q50"].transform("count") > 0]  # filled layers begin without scores
    table = table if scored.empty else scored
    kinds = table.groupby(table["layer"].map(lambda layer: place_of(layer)[1]), sort=False)
    rows = -(-len(kinds) // 3)
    figure, axes = plt.subplots(
        rows, min(3, len(kinds)), figsize=(7, 0.8 + 2.2 * rows), layout="constrained", squeeze=False, sharex=True
    )
    for axis, (kind, part) in zip(axes.flat, kinds, strict=False):
        means = part.groupby("step")[[name for name in part if name.startswith("score_q")]].mean()
        axis.fill_between(
            means.index, means["score_q05"], means["score_q95"], alpha=0.2, color="tab:blue", label="5–95 %"
        )
        axis.fill_between(
            means.index, means["score_q25"], means["score_q75"], alpha=0.4, color="tab:blue", label="25–75 %"
        )
        axis.plot(means.index, means["score_q50"], color="tab:blue", label="median")
        axis.set_title(kind, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.suptitle("Score quantiles until the masks freeze, mean over blocks", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
        block, matrix = place_of(layer["layer"])
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


def _short(layers: Iterable[str]) -> list[str]:
    """Names without what comes before the number of the block."""
    return [f"{block.rpartition('.')[2]} {matrix}".strip() for block, matrix in map(place_of, layers)]
