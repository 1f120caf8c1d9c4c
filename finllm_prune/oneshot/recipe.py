"""The recipe of ``finllm-prune oneshot``: which model, which texts, what is cut and how it is chosen, what is measured."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finllm_prune.checkpoints import FORMATS
from finllm_prune.errors import InputError
from finllm_prune.oneshot.likelihood import Labels
from finllm_prune.oneshot.streamed import Memory
from finllm_prune.oneshot.texts import Calibration, Windows
from finllm_prune.pruning import (
    ONESHOT,
    STRUCTURES,
    Calibrated,
    Magnitude,
    OneShot,
    Rule,
    refuse_unfit,
)
from finllm_prune.settings import build, hint, mapping, named, parse_file, plain, refuse_unknown, typed

STREAMED = ("masked", "compact")
_OF_A_RULE = ("target", "structure", "sparsity")
WRITTEN = (*STREAMED, "ragged", "packed")  # the others hold the whole model while they are written


@dataclass(frozen=True)
class Base:
    """The language model that is pruned.

    Args:
        name: a local folder or Hub id; a plain string is this.
        license: of the model, for the card; None takes it from the model's own card.
    """

    name: str
    license: str | None = None


@dataclass(frozen=True)
class Cut:
    """What is cut, and by which method.

    Args:
        oneshot: magnitude, wanda, sparsegpt or activations.
        rules: target, structure and sparsity of each.
    """

    oneshot: OneShot
    rules: list[Rule]


@dataclass(frozen=True)
class Evaluation:
    """What is measured, of the dense model and of the files that were written.

    Args:
        perplexity: texts; None (``false``) measures none.
        labels: classification by the likelihood of labels; None measures none.
    """

    perplexity: Windows | None = field(default_factory=Windows)
    labels: Labels | None = None


@dataclass(frozen=True)
class OneShotRecipe:
    """One pruning without training.

    Args:
        model: what is pruned.
        pruning: what is cut.
        output: the folder that appears when everything is complete and proved.
        calibration: texts that a method looks at; None for magnitude.
        evaluate: what is measured.
        memory: where blocks run.
        export: formats to write, masked among them.
        resolved: the whole recipe as plain data.
    """

    model: Base
    pruning: Cut
    output: Path
    calibration: Calibration | None = None
    evaluate: Evaluation = field(default_factory=Evaluation)
    memory: Memory = field(default_factory=Memory)
    export: list[str] = field(default_factory=lambda: ["masked"])
    resolved: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def load(path: Path, overrides: Sequence[str] = ()) -> "OneShotRecipe":
        """Read a YAML file and apply ``key.sub=value`` overrides; raises InputError with the file, the key and the remedy."""
        return parse_file(path, overrides, "recipe", parse)


def parse(data: dict[str, Any]) -> OneShotRecipe:
    """A recipe from plain data; raises InputError."""
    data = mapping(data, "the recipe")
    if "task" in data or "training" in data:
        raise InputError(
            f"{'task' if 'task' in data else 'training'}: oneshot trains nothing; remove the key, or use run"
        )
    refuse_unknown(data, [f.name for f in dataclasses.fields(OneShotRecipe) if f.name != "resolved"], "")
    for key in ("model", "pruning", "output"):
        if data.get(key) is None:
            raise InputError(f"{key}: this key is missing; see recipes/oneshot/wanda_qwen3.yaml for a whole recipe")
    pruning = _cut(data["pruning"])
    calibration = _calibration(data.get("calibration"), pruning.oneshot)
    if calibration is not None and isinstance(pruning.oneshot, Calibrated) and calibration.rows is not None:
        pruning = Cut(dataclasses.replace(pruning.oneshot, rows=calibration.rows), pruning.rules)
    recipe = OneShotRecipe(
        model=build(Base, {"name": data["model"]} if isinstance(data["model"], str) else data["model"], "model"),
        pruning=pruning,
        output=Path(typed(str, data["output"], "output")),
        calibration=calibration,
        evaluate=_evaluation(data.get("evaluate") or {}),
        memory=build(Memory, data.get("memory") or {}, "memory"),
        export=_formats(data.get("export", ["masked"]), pruning.rules),
    )
    if recipe.output.name in ("", ".."):
        raise InputError(f"output: '{recipe.output}' is no folder that can be made anew; name one, as outputs/mine")
    return dataclasses.replace(recipe, resolved=_plain(recipe))


def _cut(data: Any) -> Cut:
    settings = mapping(data, "pruning")
    refuse_unknown(settings, [f.name for f in dataclasses.fields(Cut)], "pruning")
    if settings.get("oneshot") is None:
        raise InputError(f"pruning.oneshot: this key is missing; name a method, one of {', '.join(ONESHOT)}")
    chosen = settings["oneshot"]
    if isinstance(chosen, dict) and "rows" in chosen:
        raise InputError("pruning.oneshot.rows: set calibration.rows, which says how many windows of text are taken")
    rules = settings.get("rules")
    if not isinstance(rules, list) or not rules:
        raise InputError("pruning.rules: at least one rule is needed, as {target: encoder, sparsity: 0.5}")
    method = named(ONESHOT, chosen, "pruning.oneshot")
    cut = Cut(method, [_rule(rule, f"pruning.rules.{i}") for i, rule in enumerate(rules)])
    refuse_unfit(method, cut.rules)
    return cut


def _rule(data: Any, where: str) -> Rule:
    rule = mapping(data, where)
    refuse_unknown(rule, _OF_A_RULE, where)
    for key in ("target", "sparsity"):
        if rule.get(key) is None:
            raise InputError(f"{where}.{key}: this key is missing")
    return Rule(
        target=typed(str, rule["target"], f"{where}.target"),
        sparsity=typed(float, rule["sparsity"], f"{where}.sparsity"),
        structure=named(STRUCTURES, rule.get("structure", "unstructured"), f"{where}.structure"),
        criterion=Magnitude(),
    )


def _calibration(data: Any, method: OneShot) -> Calibration | None:
    if not isinstance(method, Calibrated):
        if data not in (None, False):
            raise InputError("calibration: magnitude looks at no text; remove the key, or use wanda")
        return None
    if data in (None, False):
        raise InputError(
            f"calibration: {type(method).__name__.lower()} looks at texts; add calibration: {{dataset: builtin}}, or texts of "
            "your own"
        )
    return build(Calibration, {"dataset": data} if isinstance(data, str) else data, "calibration")


def _evaluation(data: Any) -> Evaluation:
    settings = mapping(data, "evaluate")
    refuse_unknown(settings, [f.name for f in dataclasses.fields(Evaluation)], "evaluate")
    texts, labels = settings.get("perplexity", {}), settings.get("labels")
    if isinstance(labels, dict) and isinstance(labels.get("task"), str):
        labels = labels | {"task": {"name": labels["task"]}}
    return Evaluation(
        None
        if texts in (None, False)
        else build(Windows, {"dataset": texts} if isinstance(texts, str) else texts, "evaluate.perplexity"),
        None if labels in (None, False) else build(Labels, {} if labels is True else labels, "evaluate.labels"),
    )


def _formats(data: Any, rules: list[Rule]) -> list[str]:
    formats = typed(list[str], data, "export")
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"export: unknown format '{name}'{hint(name, WRITTEN)}")
        if name not in WRITTEN:
            raise InputError(f"export: {name} holds classifiers; of a language model {', '.join(WRITTEN)} are written")
        if name in ("compact", "ragged") and not any(rule.structure.couples for rule in rules):
            raise InputError(
                f"export: no rule removes whole neurons, heads or layers, so {name} would be as large as masked; drop {name}, "
                "or use oneshot: activations"
            )
    return list(dict.fromkeys(["masked", *formats]))


def _plain(recipe: OneShotRecipe) -> dict[str, Any]:
    """With every default, as ``parse`` can read it."""
    names: dict[type, str] = {cls: name for table in (STRUCTURES, ONESHOT) for name, cls in table.items()}

    def hidden(value: Any) -> list[str]:
        if isinstance(value, Rule):
            return [f.name for f in dataclasses.fields(value) if f.name not in _OF_A_RULE]
        return ["resolved", "rows"] if isinstance(value, Calibrated) else ["resolved"]

    data: dict[str, Any] = plain(recipe, names, hidden)
    data["evaluate"] = {key: False if value is None else value for key, value in data["evaluate"].items()}
    return {key: value for key, value in data.items() if value is not None}
