"""What a suite measured, frozen: the verdicts, the gates, the table and the JSON are read from it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from finllm_prune.evaluation import GATES, TITLES, Latency, Quality, with_interval
from finllm_prune.evaluation.calibration import Calibration
from finllm_prune.evaluation.non_inferiority import NonInferiority, Outcome, Verdict, holm, p_value, points
from finllm_prune.evaluation.perturbations import PERTURBATIONS
from finllm_prune.pages.wording import in_points, plural


@dataclass(frozen=True)
class SetResult:
    """Dense against pruned on one set.

    Args:
        name: of the set.
        task: its name.
        model, baseline: pruned and dense.
        source: of the data, in words.
        fingerprint: of the data.
        data: what was done to its rows and found in them: those left out, copies in other splits.
        units: how many were judged.
        unit: what one is called: row, query.
        headline: what the test and the slices look at, the mean worth of the units: a metric's name, or words.
        quality: metrics with intervals, agreement, flips, paired test.
        tested: whether pruned is not worse than dense by more than the margin.
        calibration: of ``dense`` and ``pruned``; None where there are no classes or labels.
        tax: what each class pays, that which pays most first.
        slices: ``by``, ``part``, ``units``, ``dense``, ``pruned``, ``difference``, ``interval``.
        robustness: ``change``, ``rows`` that it changed, on what part of them ``dense`` and ``pruned`` changed their mind.
        latency: at the set's median length.
        published: figures of others.
        changed: texts whose worth has changed, where they are to be shown.
    """

    name: str
    task: str
    model: str
    baseline: str
    source: str
    fingerprint: str
    data: dict[str, Any]
    units: int
    unit: str
    headline: str
    quality: Quality
    tested: Outcome
    calibration: dict[str, Calibration] | None
    tax: list[dict[str, Any]]
    slices: list[dict[str, Any]]
    robustness: list[dict[str, Any]]
    latency: Latency | None
    published: list[dict[str, Any]]
    changed: list[dict[str, Any]] | None


@dataclass(frozen=True)
class SuiteReport:
    """All sets.

    Args:
        sets: that were measured.
        left_out: set -> why it could not be.
        model, baseline: pruned and dense, as they were named.
        asked: margin and level of the headline.
        gates: thresholds.
        suite: as it was read.
        surroundings: versions, machine, commit.
    """

    sets: list[SetResult]
    left_out: dict[str, str]
    model: str
    baseline: str
    asked: NonInferiority
    gates: dict[str, float]
    suite: dict[str, Any]
    surroundings: dict[str, Any]

    def corrected(self) -> dict[str, dict[str, float]]:
        """Set -> the p-values ``not_worse`` (one-sided) and ``paired`` (two-sided), each corrected over the sets by Holm."""
        families = [[each.tested.p for each in self.sets], [each.quality.paired_p for each in self.sets]]
        pairs = zip(*map(holm, families), strict=True)
        return {each.name: {"not_worse": p, "paired": q} for each, (p, q) in zip(self.sets, pairs, strict=True)}

    def verdicts(self) -> dict[str, Verdict]:
        """Set -> the answer to the headline's question."""
        p = self.corrected()
        return {each.name: each.tested.verdict(p[each.name]["not_worse"], self.asked.alpha) for each in self.sets}

    def headline(self) -> str:
        """The answer in a sentence."""
        words = {"not worse": "shown on", "not shown": "not shown on", "worse": "worse on"}
        verdicts = self.verdicts()
        sets = {
            verdict: [each.name + self._own_margin(each) for each in self.sets if verdicts[each.name] == verdict]
            for verdict in words
        }
        parts = [f"{words[verdict]} {', '.join(names)}" for verdict, names in sets.items() if names]
        return f"Not worse by more than {points(self.asked.margin)}: {'; '.join(parts)}"

    def _own_margin(self, each: SetResult) -> str:
        """In brackets, where a set has another one than the suite."""
        return "" if each.tested.margin == self.asked.margin else f" (margin {each.tested.margin:g})"

    def gate_rows(self) -> list[dict[str, Any]]:
        """``set``, ``gate``, ``threshold``, ``value``, ``passed``, of each set that has it; what collapsed passes none."""
        rows = []
        for each in self.sets:
            for gate, threshold in self.gates.items():
                value = self._value(each, gate)
                if value is not None:
                    good = value <= threshold if GATES.get(gate) == "max" else value >= threshold
                    passed = bool(good) and not each.quality.collapsed
                    rows.append(
                        {"set": each.name, "gate": gate, "threshold": threshold, "value": value, "passed": passed}
                    )
        return rows

    def _value(self, each: SetResult, gate: str) -> float | None:
        if gate == "non_inferiority":
            return float(self.verdicts()[each.name] == "not worse")
        if gate == "agreement":
            return each.quality.agreement
        if gate == "latency_ratio":
            return each.latency.ratio if each.latency else None
        if gate.endswith("_retention"):
            return each.quality.retention.get(gate.removesuffix("_retention"))
        return each.quality.metrics.get(gate, {}).get("pruned")

    def passed(self) -> bool:
        """Whether all gates are; none that is asked for may be without any set that has its value."""
        rows = self.gate_rows()
        return all(row["passed"] for row in rows) and {row["gate"] for row in rows} == set(self.gates)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what was concluded."""
        corrected, verdicts = self.corrected(), self.verdicts()
        return {
            "headline": self.headline(),
            "passed": self.passed(),
            **{key: value for key, value in asdict(self).items() if key not in ("sets", "gates")},
            "gates": self.gate_rows(),
            "sets": [
                asdict(each) | {"corrected_p": corrected[each.name], "verdict": verdicts[each.name]}
                for each in self.sets
            ],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows for a terminal: figures down, sets across."""
        verdicts, corrected = self.verdicts(), self.corrected()
        figures: dict[str, Callable[[SetResult], str]] = {
            "units": lambda each: f"{each.units:,} {plural(each.unit)}",
            "rows left out of the set": _left_out,
            "metric": lambda each: each.headline,
            "dense": lambda each: _mean(each, "dense"),
            "pruned": lambda each: _mean(each, "pruned"),
            "published": _published,
            "difference, points": lambda each: _differ(each, each.tested.difference) + _own_unit(each),
            f"  {self.confidence()} interval": lambda each: (
                f"[{', '.join(_differ(each, end) for end in each.tested.interval)}]"
            ),
            f"not worse by {points(self.asked.margin)}": lambda each: verdicts[each.name] + self._own_margin(each),
            "  p, Holm": lambda each: p_value(corrected[each.name]["not_worse"]),
            "  units to show it": lambda each: (
                f"about {each.tested.units_needed:,}" if verdicts[each.name] == "not shown" else ""
            ),
            "collapsed": lambda each: each.quality.collapse if each.quality.collapsed else "",
            "same answer": lambda each: f"{each.quality.agreement:.1%}",
            "lost / won": lambda each: " / ".join(map(str, each.quality.flips.values())),
            "paired test, p, Holm": lambda each: p_value(corrected[each.name]["paired"]),
            "ECE, dense → pruned": partial(_calibrated, "ece"),
            "Brier, dense → pruned": partial(_calibrated, "brier"),
            "class that pays most": lambda each: _most(each, each.tax, "{label}"),
            "slice that pays most": lambda each: _most(each, each.slices, "{by}: {part}"),
            **{f"mind changed: {change}": partial(_changed_mind, change) for change in PERTURBATIONS},
            "latency, pruned / dense": lambda each: f"{each.latency.ratio:.2f}" if each.latency else "",
        }
        rows = [[what, *(cell(each) for each in self.sets)] for what, cell in figures.items()]
        return ["", *(each.name for each in self.sets)], [row for row in rows if any(row[1:])]

    def confidence(self) -> str:
        """Of the intervals of differences in worth."""
        return f"{100 - 200 * self.asked.alpha:g} %"


def _left_out(each: SetResult) -> str:
    counts = [why for key in ("bad_rows", "queries_left_out") for why in each.data.get(key, {}).values()]
    lost = sum(sum(why.values()) for why in counts)
    return f"{lost:,}" if lost else ""


def _differ(each: SetResult, value: float) -> str:
    """In points, or in the unit of an error or a likelihood."""
    return f"{100 * value:+.1f}" if in_points(each.headline) else f"{value:+.3g}"


def _own_unit(each: SetResult) -> str:
    """In brackets, where a unit's worth is no part of 1."""
    return "" if in_points(each.headline) else f" ({each.headline})"


def _mean(each: SetResult, kind: str) -> str:
    metric = each.quality.metrics.get(each.headline)
    return "" if metric is None else with_interval(metric, kind)


def _published(each: SetResult) -> str:
    """A figure a line; its source stands on the page."""
    told = [(one["model"], TITLES.get(one["metric"], one["metric"]), one["value"]) for one in each.published]
    return "\n".join(f"{model}: {metric} {value:.3f}" for model, metric, value in told)


def _calibrated(figure: str, each: SetResult) -> str:
    return " → ".join(f"{getattr(kind, figure):.3f}" for kind in each.calibration.values()) if each.calibration else ""


def _most(each: SetResult, parts: list[dict[str, Any]], name: str) -> str:
    worst = min(parts, key=lambda part: float(part["difference"]), default=None)
    if worst is None:
        return ""
    return f"{name.format(**worst)} {_differ(each, worst['difference'])}" if worst["difference"] < 0 else "none"


def _changed_mind(change: str, each: SetResult) -> str:
    row = next((row for row in each.robustness if row["change"] == change and row["rows"]), None)
    return f"{row['dense']:.1%} → {row['pruned']:.1%}" if row else ""
