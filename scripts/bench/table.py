"""Rows -> the table and the plot."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from scipy.stats import t

from bench.cells import Row

Bar = tuple[float, float, float]
"""A mean and its 95 % interval."""

_MARKERS = "os^vDP*"
_COLUMNS = (
    "method", "sparsity", "seeds", "learning rate", "macro-F1 [95 %]", "to dense, points [95 %]", "accuracy", "MCC",
    "same as teacher", "encoder sparsity", "latency 1 / 16",
)  # fmt: skip
_FOOT = (
    "Test split. dense: fine-tuned for the same steps, batches and loss. Intervals: Student's t over the seeds; of a single "
    "seed, the bootstrap over the rows. Of several learning rates, the one with the best mean macro-F1 on validation. Latency: "
    "CPU, as a part of dense, batch 1 / 16 x 64 tokens."
)


def current(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """The rows that can be compared: of the newest protocol and of each method's newest settings; and how many are not."""
    every = list(rows)
    newest = {row["method"]: row["settings"]["method"] for row in every}
    same = [
        row
        for row in every
        if row["settings"] == {"protocol": every[-1]["settings"]["protocol"], "method": newest[row["method"]]}
    ]
    return same, len(every) - len(same)


def best(rows: list[Row]) -> list[list[Row]]:
    """For each method and sparsity its rows over the seeds, at the learning rate that validation prefers."""
    rates: dict[tuple[float, str], dict[float, list[Row]]] = {}
    for row in rows:
        rates.setdefault((row["sparsity"], row["method"]), {}).setdefault(row["learning_rate"], []).append(row)
    chosen = [
        # A rate that has not been tried on all seeds yet does not win by luck.
        max(found.values(), key=lambda group: (len(group), mean(_scores(group, "validation"))))
        for found in rates.values()
    ]
    return sorted(chosen, key=lambda group: (group[0]["sparsity"], -mean(_scores(group))))


def table(rows: Iterable[Row]) -> str:
    """Markdown: one line per method and sparsity, the best first."""
    comparable, others = current(rows)
    groups = best(comparable)
    dense = {row["seed"]: row for group in groups for row in group if row["method"] == "dense"}
    lines = [_cells(*_COLUMNS), _cells(*["---"] * len(_COLUMNS)), _teacher(comparable)]
    lines += [*(_line(group, dense) for group in groups), ""]
    if others:
        lines.append(f"Rows left out because their settings are not the newest: {others}.")
    return "\n".join([*lines, _FOOT])


def plot(rows: Iterable[Row], path: Path) -> None:
    """Macro-F1 over sparsity, with intervals; dense as a band. Models of one class for all texts lie below, and are named."""
    methods: dict[str, list[tuple[float, Bar]]] = {}
    upright: list[float] = []
    for group in best(current(rows)[0]):
        collapsed = any(row["test"]["collapsed"] for row in group)
        name = group[0]["method"] + (f" (collapsed at {100 * group[0]['sparsity']:g} %)" if collapsed else "")
        methods.setdefault(name, []).append((group[0]["sparsity"], macro_f1(group)))
        upright += [] if collapsed else [macro_f1(group)[1]]
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    figure, axis = plt.subplots(figsize=(10, 6), layout="constrained")
    for number, (method, points) in enumerate(methods.items()):
        middle, low, high = zip(*(bar for _, bar in points), strict=True)
        if points[0][0] == 0:
            axis.axhspan(low[0], high[0], color=colors[number % 20], alpha=0.12)
            axis.axhline(middle[0], color=colors[number % 20], linestyle="--", label=method)
            continue
        shift = 0.06 * (number / len(methods) - 0.5)
        # A percentile bootstrap need not hold the value itself.
        errors = [[max(0.0, m - a) for _, (m, a, _) in points], [max(0.0, b - m) for _, (m, _, b) in points]]
        places = [100 * (sparsity + shift) for sparsity, _ in points]
        axis.errorbar(
            places, middle, yerr=errors, marker=_MARKERS[number % len(_MARKERS)], capsize=2, linewidth=1, alpha=0.9,
            color=colors[number % 20], label=method, linestyle="-" if number < 10 else ":",
        )  # fmt: skip
    if upright:
        axis.set_ylim(bottom=min(upright) - 0.01)
    axis.set(
        xlabel="sparsity asked of the target, %",
        ylabel="test macro-F1, 95 % interval",
        title="Equal steps, equal batches",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bar(values: list[float]) -> Bar:
    """Student's t over seeds; a single value is its own interval."""
    middle = mean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return middle, middle - half, middle + half


def macro_f1(group: list[Row]) -> Bar:
    """Over the seeds, or over the rows of the test split where there is one seed."""
    if len(group) == 1:
        low, high = group[0]["test"]["macro_f1"]["pruned_interval"]
        return group[0]["test"]["macro_f1"]["pruned"], low, high
    return bar(_scores(group))


def _scores(group: list[Row], split: str = "test", metric: str = "macro_f1", model: str = "pruned") -> list[float]:
    return [row[split][metric][model] for row in group]


def _line(group: list[Row], dense: dict[int, Row]) -> str:
    gaps = [
        100 * (row["test"]["macro_f1"]["pruned"] - dense[row["seed"]]["test"]["macro_f1"]["pruned"])
        for row in group
        if row["seed"] in dense and row["method"] != "dense"
    ]
    collapsed = sum(row["test"]["collapsed"] for row in group)
    of_all = f" in {collapsed} of {len(group)}" if len(group) > 1 else ""
    ratios = [mean(row["latency"][batch]["ratio"] for row in group) for batch in range(len(group[0]["latency"]))]
    return _cells(
        group[0]["method"],
        f"{group[0]['sparsity']:g}",
        _seeds(group),
        f"{group[0]['learning_rate']:g}",
        _interval(macro_f1(group)) + (f" (collapsed to one class{of_all})" if collapsed else ""),
        _gap(gaps),
        *(f"{mean(_scores(group, metric=metric)):.3f}" for metric in ("accuracy", "mcc")),
        f"{mean(row['test']['agreement'] for row in group):.3f}",
        f"{mean(row['sparsity_of']['encoder_linear'] for row in group):.3f}",
        " / ".join(f"{ratio:.2f}" for ratio in ratios),
    )


def _teacher(rows: list[Row]) -> str:
    """The dense models that all start from, as they were measured beside their students."""
    each = list({row["seed"]: row for row in rows}.values())
    middle = bar(_scores(each, model="dense"))
    if len(each) == 1:
        middle = (middle[0], *each[0]["test"]["macro_f1"]["dense_interval"])
    accuracy, mcc = (f"{mean(_scores(each, metric=metric, model='dense')):.3f}" for metric in ("accuracy", "mcc"))
    rate = f"{each[0]['settings']['protocol']['dense']['learning_rate']:g}"
    return _cells("teacher: where all start", "0", _seeds(each), rate, _interval(middle), "", accuracy, mcc, "", "", "")


def _gap(gaps: list[float]) -> str:
    if not gaps:
        return ""
    middle, low, high = bar(gaps)
    return f"{middle:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if len(gaps) > 1 else "")


def _interval(of: Bar) -> str:
    return f"{of[0]:.3f} [{of[1]:.3f}, {of[2]:.3f}]"


def _seeds(group: list[Row]) -> str:
    return " ".join(str(seed) for seed in sorted(row["seed"] for row in group))


def _cells(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"
