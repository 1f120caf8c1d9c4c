"""What quality costs: models on a plane, and which of them none other beats in both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finllm_prune.evaluation.pareto import front
from finllm_prune.metrics import ERRORS
from finllm_prune.pages.charts import Chart, Line, Mark, axis
from finllm_prune.pages.finished import Finished
from finllm_prune.pages.wording import metric

COSTS = {
    "time": "CPU time of a batch",
    "size": "weights on disk",
    "weights": "weights kept in the encoder's linear layers",
}


@dataclass(frozen=True)
class Model:
    """A point: its value in a metric, with the interval, and its costs as parts of the dense model's."""

    name: str
    value: float
    interval: Sequence[float]
    costs: Mapping[str, float]
    dense: bool = False


def of_formats(run: Finished, name: str) -> list[Model]:
    """The dense model and each format of a run; of time those that were timed."""
    times = {each["model"]: each["ratio"] for each in reversed(run.report["latency"])}
    sizes = run.report["bytes"]
    models = _dense([run], name)
    for each, size in sizes.items():
        found = run.quality_of(each)
        if each != "dense" and found is not None:
            costs = {"size": size / sizes["dense"]} | ({"time": times[each]} if each in times else {})
            models.append(Model(each, found[name]["pruned"], found[name]["pruned_interval"], costs))
    return models


def of_runs(runs: Sequence[Finished], name: str) -> list[Model]:
    """The dense models, then the pruned one of each run by its number, at the size of its smallest format."""
    models = _dense(runs, name)
    for number, run in enumerate(runs, start=1):
        costs = {"time": run.report["latency_ratio"], "weights": run.kept}
        costs |= {"size": run.exact[run.smallest]} if run.smallest else {}
        models.append(Model(str(number), run.metrics[name]["pruned"], run.metrics[name]["pruned_interval"], costs))
    return models


def _dense(runs: Sequence[Finished], name: str) -> list[Model]:
    """One for each value, as runs share their dense model or have the like."""
    values = {run.metrics[name]["dense"]: run.metrics[name]["dense_interval"] for run in runs}
    return [Model("dense", value, reach, dict.fromkeys(COSTS, 1.0), dense=True) for value, reach in values.items()]


def unbeaten(models: Sequence[Model], cost: str, name: str) -> list[Model]:
    """Those on the front, the cheapest first; a model without this cost is on none."""
    models, sign = [each for each in models if cost in each.costs], -1 if name in ERRORS else 1
    return [models[place] for place in front([(each.costs[cost], sign * each.value) for each in models])]


def tradeoff(models: Sequence[Model], cost: str, name: str) -> Chart | None:
    """None where none but the dense model has this cost."""
    models = [each for each in models if cost in each.costs]
    if all(each.dense for each in models):
        return None
    best = unbeaten(models, cost, name)

    def kind(each: Model) -> str:
        return "dense" if each.dense else "front" if each in best else "beaten"

    marks = [Mark(each.costs[cost], each.value, kind(each), each.name, each.interval) for each in models]
    ends = [end for each in models for end in (each.value, *each.interval)]
    return Chart(
        f"{metric(name)} against {COSTS[cost].removesuffix(' of a batch')}: on the front {_listed(best)}",
        axis(f"{COSTS[cost]}, dense = 1", [0.0, *(mark.x for mark in marks)], zero=True),
        axis(metric(name) + (", less is better" if name in ERRORS else ""), ends, turned=name in ERRORS),
        lines=[Line([(each.costs[cost], each.value) for each in best], "front")],
        marks=marks,
        height=230,
    )


def _listed(models: Sequence[Model]) -> str:
    names = list(dict.fromkeys(each.name for each in models))
    return ("is " if len(names) == 1 else "are ") + ", ".join(names)
