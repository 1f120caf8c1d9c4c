"""The Pareto plot of a sweep: quality over what it costs."""

from pathlib import Path

import matplotlib

from finllm_prune.sweep.results import COSTS, Results

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_LABELS = {
    "weights": "encoder weights that are not zero",
    "bytes": "bytes of the smallest exact format",
    "latency": "CPU latency",
}


def draw_pareto(results: Results, path: Path) -> None:
    """A panel for each cost, relative to the dense model: cells with their intervals, means over seeds, the front."""
    figure, axes = plt.subplots(1, len(COSTS), figsize=(4 * len(COSTS), 3.8), layout="constrained", sharey=True)
    cells = [result for each in results.settings for result in each.results]
    dense = sum(cell.dense for cell in cells) / len(cells)
    for axis, cost in zip(axes, COSTS, strict=True):
        for cell in cells:
            low, high = cell.pruned_interval
            axis.vlines(getattr(cell, cost), low, high, color="tab:blue", alpha=0.25)
            axis.plot(getattr(cell, cost), cell.pruned, ".", color="tab:blue", alpha=0.5)
        for each in results.settings:
            place = each.mean(cost), each.mean("pruned")
            axis.plot(*place, "o" if each.passed else "x", color="tab:blue")
            axis.annotate(f"{each.value:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        best = [each for value in results.fronts()[cost] for each in results.settings if each.value == value]
        line = [each.mean(cost) for each in best], [each.mean("pruned") for each in best]
        axis.plot(*line, "o-", color="tab:orange", markersize=11, markerfacecolor="none")
        axis.axhline(dense, color="gray", linestyle="--", linewidth=1)
        axis.set_xlabel(f"{_LABELS[cost]}, of dense", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{results.metric}, test split")
    figure.suptitle(
        f"Quality over cost by {results.axis}: ● passed its gates, × did not; orange the Pareto front, dashed the dense model",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
