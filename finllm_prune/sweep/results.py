"""What the cells of a sweep measured: one result each, their means over seeds, the Pareto fronts, the smallest that passes."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finllm_prune.evaluation.pareto import front
from finllm_prune.metrics import ERRORS
from finllm_prune.pages import Finished
from finllm_prune.sweep.grid import Cell

# What a pruned model costs, as parts of the dense one: its encoder's weights that are not zero, bytes, CPU latency.
COSTS = ("weights", "bytes", "latency")


@dataclass(frozen=True)
class Result:
    """What one cell measured on the test split; all of it is read from its report.

    Args:
        cell: its name.
        value: the sparsity, or the target.
        seed: of the training.
        dense, pruned: the headline metric, each with its 95 % interval.
        retention: pruned / dense.
        agreement: the part of units for which both decide alike.
        format: the smallest that is exactly the pruned model.
        weights: of the encoder's linear layers, the part that is not zero.
        bytes: of that format, of the dense model's.
        latency: of the fastest format in PyTorch, of the dense model's.
        gates: name -> threshold, value, passed.
        passed: all gates, and no collapse.
    """

    cell: str
    value: float
    seed: int
    dense: float
    dense_interval: list[float]
    pruned: float
    pruned_interval: list[float]
    retention: float
    agreement: float
    format: str
    weights: float
    bytes: float
    latency: float
    gates: dict[str, dict[str, Any]]
    passed: bool


@dataclass(frozen=True)
class Setting:
    """One sparsity or target: the results of its seeds, of which those of failed cells are missing."""

    value: float
    results: list[Result]
    missing: int

    def mean(self, name: str) -> float:
        """Over seeds."""
        return statistics.fmean(getattr(result, name) for result in self.results)

    def spread(self, name: str) -> float:
        """The standard deviation over seeds; NaN of one."""
        values = [getattr(result, name) for result in self.results]
        return statistics.stdev(values) if len(values) > 1 else float("nan")

    @property
    def passed(self) -> bool:
        """With every seed."""
        return not self.missing and all(result.passed for result in self.results)


@dataclass(frozen=True)
class Results:
    """All settings of which anything was measured.

    Args:
        axis: what is varied: "sparsity" or "target".
        metric: the headline of the first run (``Finished.headline``).
        failed: cell -> why there is no result of it.
    """

    axis: str
    metric: str
    settings: list[Setting]
    failed: dict[str, str]

    @staticmethod
    def of(cells: Sequence[Cell], failed: Mapping[str, str]) -> "Results":
        """Of the cells that are not among the failed ones, from the reports in their folders."""
        runs = {cell.name: Finished.read(cell.recipe.output, texts=False) for cell in cells if cell.name not in failed}
        metric = next((run.headline for run in runs.values()), "")
        settings = []
        for value in dict.fromkeys(cell.value for cell in cells):
            mine = [cell for cell in cells if cell.value == value]
            found = [_result(cell, runs[cell.name], metric) for cell in mine if cell.name in runs]
            if found:
                settings.append(Setting(value, found, len(mine) - len(found)))
        return Results(cells[0].axis, metric, settings, dict(failed))

    def fronts(self) -> dict[str, list[float]]:
        """Cost -> the values of the settings that no other beats in both this cost and the headline, means over seeds."""
        sign = -1 if self.metric in ERRORS else 1
        out = {}
        for cost in COSTS:
            places = front([(each.mean(cost), sign * each.mean("pruned")) for each in self.settings])
            out[cost] = [self.settings[place].value for place in places]
        return out

    def smallest(self) -> Result | None:
        """Of the setting of fewest bytes (then weights, then latency) of which every seed passed, the first seed's.

        No seed is chosen by what it reached on the test split.
        """
        passed = [each for each in self.settings if each.passed]
        best = min(passed, key=lambda each: [each.mean(cost) for cost in ("bytes", "weights", "latency")], default=None)
        return best.results[0] if best else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the means."""
        measured = ("dense", "pruned", "retention", "agreement", *COSTS)
        fronts = self.fronts()
        return {
            "axis": self.axis,
            "metric": self.metric,
            "settings": [
                {
                    self.axis: each.value,
                    "seeds": [result.seed for result in each.results],
                    "mean": {name: each.mean(name) for name in measured},
                    "deviation": {name: each.spread(name) for name in measured} if len(each.results) > 1 else None,
                    "passed": each.passed,
                    "pareto": [cost for cost, values in fronts.items() if each.value in values],
                }
                for each in self.settings
            ],
            "cells": [asdict(result) for each in self.settings for result in each.results],
            "failed": self.failed,
        }

    def title(self) -> str:
        """Of the table, with what all rows are held against."""
        dense = [result.dense for each in self.settings for result in each.results]
        shown = f"; dense {self.metric} {statistics.fmean(dense):.3f}, costs 1" if dense else ""
        return f"pruned models on the test split{shown}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows for a terminal: each cell, and below those of a setting with several seeds their mean.

        The last column names the costs in which the setting lies on the Pareto front.
        """
        heads = [self.axis, "seed", self.metric, "retained", "agrees", *COSTS, "gates", "front"]
        fronts, rows = self.fronts(), []
        for each in self.settings:
            on = ", ".join(cost for cost, values in fronts.items() if each.value in values)
            several = len(each.results) > 1
            for result in each.results:
                spread = "[{:.3f}, {:.3f}]".format(*result.pruned_interval)
                figures = _figures(Setting(each.value, [result], 0), spread)
                rows.append([f"{each.value:g}", str(result.seed), *figures, _verdict(result), "" if several else on])
            if several:
                figures = _figures(each, f"± {each.spread('pruned'):.3f}")
                rows.append([f"{each.value:g}", "mean", *figures, "passed" if each.passed else "FAILED", on])
        return heads, rows


def _figures(each: Setting, spread: str) -> list[str]:
    parts = [f"{each.mean(part):.1%}" for part in ("retention", "agreement", "weights")]
    return [f"{each.mean('pruned'):.3f} {spread}", *parts, f"{each.mean('bytes'):.2f}", f"{each.mean('latency'):.2f}"]


def _verdict(result: Result) -> str:
    failed = [name for name, gate in result.gates.items() if not gate["passed"]]
    return "passed" if result.passed else f"FAILED {', '.join(failed) or 'collapsed'}"


def _result(cell: Cell, run: Finished, metric: str) -> Result:
    return Result(
        cell=cell.name, value=cell.value, seed=cell.seed, **{
            name: run.metrics[metric][name] for name in ("dense", "dense_interval", "pruned", "pruned_interval")
        },
        retention=run.report[f"{metric}_retention"],
        agreement=run.report["agreement"],
        format=run.smallest or "dense",
        weights=run.kept,
        bytes=run.exact[run.smallest] if run.smallest else 1.0,
        latency=run.report["latency_ratio"],
        gates=run.report["gates"],
        passed=run.report["passed"],
    )  # fmt: skip
