"""What happened over the steps of a run, as charts."""

from typing import Any

import pandas as pd

from finllm_prune.evaluation.sparsity import place_of
from finllm_prune.pages.charts import Band, Chart, Line, Point, axis

_STEP = "optimizer step"


def training(history: list[dict[str, Any]]) -> list[Chart]:
    """Sparsity and loss, as far as the Trainer's log has them."""
    charts = []
    cut: list[Point] = [(each["step"], 100 * each["sparsity"]) for each in history if "sparsity" in each]
    if cut:
        reached = next(step for step, value in cut if value >= cut[-1][1] - 0.05)
        title = f"Sparsity: {cut[-1][1]:.1f} % of the targeted weights are cut, from step {reached:g} on"
        charts.append(_over_steps(title, "% of the targeted weights", [Line(cut, "pruned")]))
    losses: list[Point] = [(each["step"], each["loss"]) for each in history if "loss" in each]
    if losses:
        title = f"Training loss: {losses[0][1]:.3g} in the first entry of the log, {losses[-1][1]:.3g} in the last"
        charts.append(_over_steps(title, "loss, as it is trained on", [Line(losses, "pruned")]))
    return charts


def churn(record: pd.DataFrame) -> Chart:
    """How much of the masks changes from moment to moment."""
    by_step = record.groupby("step")["churn"].agg(["min", "mean", "max"]) * 100
    regrown = 100 * (record["regrown"] / record["units"]).groupby(record["step"]).mean()
    return _over_steps(
        f"Mask churn: {by_step['mean'].max():.1f} % of the units changed in the busiest interval, "
        f"{by_step['mean'].iloc[-1]:.1f} % in the last",
        "% of the units, from moment to moment",
        [
            Line(_points(by_step["mean"]), "pruned", "cut or regrown, mean over layers (shaded: all layers)"),
            Line(_points(regrown), "regrown", "of these regrown"),
        ],
        [Band(list(by_step[["min", "max"]].itertuples(name=None)), "whole")],
    )


def scores(record: pd.DataFrame) -> list[Chart]:
    """Quantiles until the masks freeze, one chart for each kind of matrix: rules may differ, and so their scales."""
    scored = record.dropna(subset="score_q50")
    charts = []
    for kind, part in scored.groupby(scored["layer"].map(lambda layer: place_of(layer)[1]), sort=False):
        means = part.groupby("step")[[name for name in part if name.startswith("score_q")]].mean()
        bands = [
            Band(list(means[[f"score_q{low}", f"score_q{high}"]].itertuples(name=None)), part_of)
            for low, high, part_of in (("05", "95", "whole"), ("25", "75", "middle"))
        ]
        lines = [Line(_points(means["score_q50"]), "pruned")]
        charts.append(_over_steps(str(kind) or "all", "score", lines, bands, small=True))
    return charts


def _over_steps(
    title: str, label: str, lines: list[Line], bands: list[Band] | None = None, small: bool = False
) -> Chart:
    bands, ticks = bands or [], 3 if small else 5
    points = [*(each.points for each in lines), *(each.points for each in bands)]
    x = axis(_STEP, [point[0] for each in points for point in each], ticks, zero=True)
    y = axis(label, [value for each in points for point in each for value in point[1:]], ticks, zero=not small)
    return Chart(title, x, y, lines, bands, (), *((165, 130) if small else ()))


def _points(column: "pd.Series[float]") -> list[Point]:
    return [(float(step), float(value)) for step, value in column.items()]
