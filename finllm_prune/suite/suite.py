"""A suite: YAML and ``key.sub=value`` overrides -> sets on which two models are compared; strict, as a recipe is."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finllm_prune.errors import InputError
from finllm_prune.evaluation import GATES
from finllm_prune.evaluation.evidence import Questions
from finllm_prune.evaluation.non_inferiority import NonInferiority, refuse_none, refuse_wide
from finllm_prune.evaluation.perturbations import PERTURBATIONS, Perturbation, changes
from finllm_prune.evaluation.slices import SLICES
from finllm_prune.settings import build, mapping, parse_file, refuse_unknown, typed
from finllm_prune.tasks import Task, find_task


@dataclass(frozen=True)
class Published:
    """A figure that others have published on the same data, shown beside those that are measured, never tested against them.

    Args:
        model: that they measured.
        metric: by its name here.
        value: of it.
        source: where it stands, and what differs.
    """

    model: str
    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class Speed:
    """How latency is measured, at a set's median length.

    Args:
        batch: sequences at a time.
        rounds: how many pairs are counted, the models in turn.
    """

    batch: int = 1
    rounds: int = 20

    def __post_init__(self) -> None:
        for key in ("batch", "rounds"):
            if getattr(self, key) < 1:
                raise InputError(
                    f"speed.{key}: at least one is needed, not {getattr(self, key)}; speed: false measures none"
                )


@dataclass(frozen=True)
class Entry:
    """One set of a suite.

    Args:
        name: that the tables show.
        task: with its data, as in a recipe.
        slices: ``length``, ``numbers``, ``negation``, or columns of the data.
        perturbations: of ``PERTURBATIONS``, by name or as a mapping with ``name``.
        published: figures of others.
        margin: of non-inferiority; None takes the suite's.
        model, baseline: which models are compared here; None takes those of the command line.
    """

    name: str
    task: Task
    slices: list[str]
    perturbations: list[Perturbation]
    published: list[Published] = field(default_factory=list)
    margin: float | None = None
    model: str | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Suite:
    """Sets, and what is asked of all of them.

    Args:
        sets: at least one.
        non_inferiority: the test that is the headline.
        gates: measured value -> threshold, on each set that has the value; ``non_inferiority: true`` asks for that verdict.
        speed: None (``speed: false``) measures no latency.
        seed: of the bootstrap and the perturbations.
        resamples: of the bootstrap.
        bins: of the calibration error.
        resolved: the suite as it was read.
    """

    sets: list[Entry]
    non_inferiority: NonInferiority = field(default_factory=NonInferiority)
    gates: dict[str, float] = field(default_factory=dict)
    speed: Speed | None = field(default_factory=Speed)
    seed: int = 0
    resamples: int = 999
    bins: int = 15
    resolved: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def load(path: Path, overrides: Sequence[str] = ()) -> "Suite":
        """Read and check a YAML file; data and models are looked at later.

        Raises:
            InputError: one sentence with the file, the key and the remedy.
        """
        return parse_file(path, overrides, "suite", parse)


def parse(data: dict[str, Any]) -> Suite:
    """A suite from plain data; raises InputError as ``Suite.load`` does, without a file name."""
    refuse_unknown(data, [f.name for f in dataclasses.fields(Suite) if f.name != "resolved"], "")
    given = data.get("sets")
    if not isinstance(given, list) or not given:
        raise InputError(
            "sets: a list of at least one set is needed, as {name: mine, task: {name: sentiment, dataset: data/mine}}"
        )
    sets = [_entry(each, f"sets.{number}") for number, each in enumerate(given)]
    names = [entry.name for entry in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"sets: two of them are called '{twice}'; give each a name of its own")
    speed = data.get("speed", {})
    others = {key: typed(int, data[key], key) for key in ("seed", "resamples", "bins") if key in data}
    for key, value in others.items():
        if value < (0 if key == "seed" else 1):
            raise InputError(f"{key}: a whole number above {-1 if key == 'seed' else 0} is needed, not {value}")
    suite = Suite(
        sets=sets,
        non_inferiority=build(NonInferiority, data.get("non_inferiority") or {}, "non_inferiority"),
        gates=typed(dict[str, float], data.get("gates") or {}, "gates"),
        speed=None if speed in (None, False) else build(Speed, speed, "speed"),
        resolved=data,
        **others,
    )
    for entry in suite.sets:
        if entry.margin is None:
            refuse_wide(suite.non_inferiority.margin, entry.task, "non_inferiority.margin")
    _check_gates(suite)
    return suite


def _entry(data: Any, where: str) -> Entry:
    settings = mapping(data, where)
    refuse_unknown(settings, [f.name for f in dataclasses.fields(Entry)], where)
    for key in ("name", "task"):
        if key not in settings:
            raise InputError(f"{where}.{key}: this key is missing")
    asked = settings["task"]
    task = mapping({"name": asked} if isinstance(asked, str) else asked, f"{where}.task")
    if "name" not in task:
        raise InputError(f"{where}.task.name: this key is missing; name a task, as sentiment")
    names = typed(list[str], settings.get("slices", list(SLICES)), f"{where}.slices")
    asked_changes = typed(list[Any], settings.get("perturbations", list(PERTURBATIONS)), f"{where}.perturbations")
    perturbations = changes(asked_changes, f"{where}.perturbations")
    columns = Questions(slices=names, perturbations=perturbations).columns()
    published = typed(list[Any], settings.get("published") or [], f"{where}.published")
    optional = {key: typed(str | None, settings.get(key), f"{where}.{key}") for key in ("model", "baseline")}
    margin = typed(float | None, settings.get("margin"), f"{where}.margin")
    read = _task(task, columns, where)
    if margin is not None:
        refuse_none(margin, f"{where}.margin")
        refuse_wide(margin, read, f"{where}.margin")
    return Entry(
        name=typed(str, settings["name"], f"{where}.name"),
        task=read,
        slices=names,
        perturbations=perturbations,
        published=[build(Published, each, f"{where}.published.{i}") for i, each in enumerate(published)],
        margin=margin,
        **optional,
    )


def _task(data: dict[str, Any], columns: list[str], where: str) -> Task:
    """A task that keeps these columns beside its texts."""
    settings = {key: value for key, value in data.items() if key != "name"}
    if columns:
        settings["keep_columns"] = list(dict.fromkeys([*settings.get("keep_columns", []), *columns]))
    try:
        return build(find_task(data["name"]), settings, f"{where}.task")
    except InputError as error:
        said = str(error)  # a task speaks of its keys as those of a recipe
        raise InputError(f"{where}.{said}" if said.startswith("task.") else said) from None


def _check_gates(suite: Suite) -> None:
    refuse_unknown(suite.gates, ["non_inferiority", *GATES], "gates")
    if "latency_ratio" in suite.gates and suite.speed is None:
        raise InputError("gates.latency_ratio: no latency is measured with speed: false; remove one of the two")
