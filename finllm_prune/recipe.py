"""A recipe: YAML and ``key.sub=value`` overrides -> typed values; everything that is wrong is said before training.

The keys are the fields of the dataclasses that use them. A field that names a class (a structure, a criterion, a budget, a
schedule) is the class's name, or a mapping with ``name`` and the class's own fields.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from finllm_prune.checkpoints import find_engine, find_format
from finllm_prune.errors import InputError
from finllm_prune.evaluation import Target, check_gates
from finllm_prune.evaluation.evidence import Questions
from finllm_prune.evaluation.non_inferiority import refuse_wide
from finllm_prune.evaluation.perturbations import PERTURBATIONS, changes
from finllm_prune.hub.governance import Governance
from finllm_prune.hub.push import Hub
from finllm_prune.pruning import (
    BUDGETS,
    CRITERIA,
    ONESHOT,
    REGULARIZERS,
    SCHEDULES,
    STRUCTURES,
    Criterion,
    Cubic,
    Magnitude,
    OneShot,
    Rule,
    Schedule,
    SparseGPT,
    refuse_unfillable,
    refuse_unfit,
)
from finllm_prune.settings import build, mapping, named, parse_file, plain, refuse_unknown, typed
from finllm_prune.tasks import Task, find_task
from finllm_prune.training import (
    Cosines,
    Distillation,
    Lora,
    Recording,
    Recovery,
    refuse_beside_lora,
    refuse_unless_part,
    refuse_unrecoverable,
)
from finllm_prune.vocabulary import Trim

T = typing.TypeVar("T")

_OWNED = {
    "output_dir": "output", "resume_from_checkpoint": "--resume", "do_train": "the run itself", "do_eval": "the run itself",
    "push_to_hub": "the recipe's own hub", "hub_model_id": "the recipe's own hub",
    "hub_token": "`hf auth login` or HF_TOKEN, as a recipe is written beside the model",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """The base model.

    Args:
        name: a local folder or Hub id.
        keep_layers: the blocks to keep, ascending (``[0, 2, 4]``); the others are dropped before pruning starts.
        license: declared for the pruned model; None takes it from the base model's own card.
    """

    name: str
    keep_layers: list[int] | None = None
    license: str | None = None


@dataclass(frozen=True)
class Dense:
    """The dense baseline: teacher, starting point of the pruned model, and what it is compared with.

    Args:
        checkpoint: a model that is already fine-tuned on the task; None trains one first.
        training: what differs from the recipe's ``training`` while it is trained.
        dropout: in all its dropout layers meanwhile, 0 to below 1; None leaves what its config says.
    """

    checkpoint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    dropout: float | None = None

    def __post_init__(self) -> None:
        refuse_unless_part(self.dropout, "dense.dropout")


@dataclass(frozen=True)
class Pruning:
    """How fast, and what: see ``finllm_prune.pruning``.

    Args:
        oneshot: chooses the final masks before training, which then tunes what is left (or nothing, with
            ``training.num_train_epochs: 0``); the criteria of the rules and the schedule do not matter then.
        fill: when the masks freeze, heads and neurons of which anything is left are dense again and the others go
            (``finllm_prune.pruning.filling``); the final sparsity is what results.
        target: what the pruned model is to cost, as a part of the dense one's time, bytes or FLOPs; the rules for heads and
            neurons have no sparsity of their own then.
    """

    rules: list[Rule]
    schedule: Schedule = field(default_factory=Cubic)
    oneshot: OneShot | None = None
    fill: bool = False
    target: Target | None = None


@dataclass(frozen=True)
class Recipe:
    """One run.

    Args:
        model: the base model; a plain string is its name.
        task: ``name`` and the task's own fields.
        pruning: schedule and rules.
        output: the folder that appears when the run is complete.
        dense: the baseline.
        cosines: what a reranker learns from a sentence encoder beside the labels, dense and pruned; None learns nothing of it.
        vocabulary: which tokens stay, in the dense model and all that comes of it; None keeps all.
        distillation: what the pruned model learns from the teacher; None trains on labels alone.
        peft: trains adapters and the head beside frozen weights, in the dense baseline too; None (the default) trains all
            weights. ``training`` is meant for them then.
        recovery: trains on without the dead heads and neurons; None (the default) trains at full size to the end. Beside
            ``keep_moments`` its keys are those of ``training``.
        recording: of the flight recorder; None (``recording: false``) records nothing.
        training: ``transformers.TrainingArguments`` by their own names.
        export: formats to write.
        evidence: what is asked of both models beside their metrics; None (``evidence: false``) asks nothing. Of a reranker no
            texts are changed unless the recipe names perturbations: each asks for the scores of all its pairs anew.
        gates: measured value -> threshold; a miss ends the run with exit code 3 after everything is written.
        governance: what people say of the model, for the card.
        hub: where the model is pushed when the run is complete and its gates passed; None pushes nothing.
        resolved: the whole recipe as plain data, as it is saved beside the weights.
    """

    model: Model
    task: Task
    pruning: Pruning
    output: Path
    dense: Dense = field(default_factory=Dense)
    cosines: Cosines | None = None
    vocabulary: Trim | None = None
    distillation: Distillation | None = field(default_factory=Distillation)
    peft: Lora | None = None
    recovery: Recovery | None = None
    recording: Recording | None = field(default_factory=Recording)
    training: dict[str, Any] = field(default_factory=dict)
    export: list[str] = field(default_factory=lambda: ["masked", "compact"])
    evidence: Questions | None = field(default_factory=Questions)
    gates: dict[str, float] = field(default_factory=dict)
    governance: Governance = field(default_factory=Governance)
    hub: Hub | None = None
    resolved: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def load(path: Path, overrides: typing.Sequence[str] = ()) -> "Recipe":
        """Read a YAML file, apply ``key.sub=value`` overrides (values are YAML), and check everything.

        Raises:
            InputError: one sentence with the file, the key and the remedy.
        """
        return parse_file(path, overrides, "recipe", parse)


def parse(data: dict[str, Any]) -> Recipe:
    """A recipe from plain data; raises InputError as ``Recipe.load`` does, without a file name."""
    data = mapping(data, "the recipe")
    known = [f.name for f in dataclasses.fields(Recipe) if f.name != "resolved"]
    refuse_unknown(data, known, "")
    for key in ("model", "task", "pruning", "output"):
        if data.get(key) is None:
            raise InputError(f"{key}: this key is missing; see recipes/quickstart.yaml for a whole recipe")
    model = {"name": data["model"]} if isinstance(data["model"], str) else data["model"]
    task = mapping({"name": data["task"]} if isinstance(data["task"], str) else data["task"], "task")
    if "name" not in task:
        raise InputError("task.name: this key is missing; name a task, as sentiment")
    evidence = _evidence(data.get("evidence", {}), find_task(task["name"]))
    dense = build(Dense, data.get("dense") or {}, "dense")
    training = _training(data.get("training") or {}, "training")
    read = _task(task, [] if evidence is None else evidence.columns())
    if evidence is not None:
        refuse_wide(evidence.margin, read, "evidence.margin")
    recipe = Recipe(
        model=build(Model, model, "model"),
        task=read,
        pruning=_pruning(data["pruning"]),
        output=Path(typed(str, data["output"], "output")),
        dense=dataclasses.replace(dense, training=_training(dense.training, "dense.training")),
        cosines=_optional(Cosines, data.get("cosines"), "cosines"),
        vocabulary=_optional(Trim, data.get("vocabulary"), "vocabulary"),
        distillation=_optional(Distillation, data.get("distillation", {}), "distillation"),
        peft=_optional(Lora, data.get("peft"), "peft"),
        recovery=_recovery(data.get("recovery")),
        recording=_optional(Recording, data.get("recording", {}), "recording"),
        training=training,
        export=typed(list[str], data.get("export", ["masked", "compact"]), "export"),
        evidence=evidence,
        gates=typed(dict[str, float], data.get("gates") or {}, "gates"),
        governance=build(Governance, data.get("governance") or {}, "governance"),
        hub=_optional(Hub, {"repo_id": hub} if isinstance(hub := data.get("hub"), str) else hub, "hub"),
    )
    if recipe.output.name in ("", ".."):
        raise InputError(f"output: '{recipe.output}' is no folder that can be made anew; name one, as outputs/mine")
    for name in recipe.export:
        find_format(name)
    check_gates(recipe.gates)
    if recipe.recovery is not None:
        _check_recovery(recipe, recipe.recovery)
    if recipe.peft is not None:
        _check_peft(recipe, recipe.peft)
    couples = recipe.pruning.fill or any(rule.structure.couples for rule in recipe.pruning.rules)
    shrinks = recipe.model.keep_layers or couples
    for name in ("compact", "ragged", "ragged-remote"):
        if name in recipe.export and not shrinks:
            raise InputError(
                f"export: no rule removes whole neurons, heads or layers, so {name} would be as large as masked; "
                f"drop {name} from export, or add a rule with structure: neuron"
            )
    if "latency_ratio" in recipe.gates and not {"compact", "ragged", "ragged-remote"} & set(recipe.export):
        raise InputError(
            "gates.latency_ratio: only a compact or ragged model is faster; add one to export or drop the gate"
        )
    return dataclasses.replace(recipe, resolved=_plain(recipe))


def _task(data: dict[str, Any], columns: list[str]) -> Task:
    """A task that keeps these columns beside its texts."""
    settings = {key: value for key, value in data.items() if key != "name"}
    if columns:
        settings["keep_columns"] = list(dict.fromkeys([*settings.get("keep_columns", []), *columns]))
    return build(find_task(data["name"]), settings, "task")


def _evidence(data: Any, task: type[Task]) -> Questions | None:
    if data in (None, False):
        return None
    settings = mapping({} if data is True else data, "evidence")
    hints = typing.get_type_hints(Questions)
    refuse_unknown(settings, list(hints), "evidence")
    asked = [] if task.pipeline_tag == "text-ranking" else list(PERTURBATIONS)
    asked = typed(list[Any], settings.pop("perturbations", asked), "evidence.perturbations")
    given = {key: typed(hints[key], value, f"evidence.{key}") for key, value in settings.items()}
    return Questions(**given, perturbations=changes(asked, "evidence.perturbations"))


def _pruning(data: Any) -> Pruning:
    settings = mapping(data, "pruning")
    refuse_unknown(settings, [f.name for f in dataclasses.fields(Pruning)], "pruning")
    given = settings.get("rules")
    if not isinstance(given, list) or not given:
        raise InputError(
            "pruning.rules: a list of at least one rule is needed, as {target: mlp, structure: neuron, sparsity: 0.5}"
        )
    rules = [_rule(rule, f"pruning.rules.{i}") for i, rule in enumerate(given)]
    schedule = named(SCHEDULES, settings.get("schedule", "cubic"), "pruning.schedule")
    fill = typed(bool, settings.get("fill", False), "pruning.fill")
    target = _optional(Target, settings.get("target"), "pruning.target")
    if target is not None and target.runtime != "torch":
        find_engine(target.runtime)
    _refuse_beside_target(target, rules, settings)
    if fill:
        refuse_unfillable(rules)
    if settings.get("oneshot") in (None, False):
        return Pruning(rules, schedule, fill=fill, target=target)
    if fill:
        raise InputError(
            "pruning.fill: masks that are chosen in one shot leave something of every head and neuron; remove fill or oneshot"
        )
    oneshot = named(ONESHOT, settings["oneshot"], "pruning.oneshot")
    refuse_unfit(oneshot, rules)
    if any(rule.regularizer is not None for rule in rules):
        raise InputError(
            "pruning.oneshot: masks are fixed before a regularizer could pull; remove the regularizer or oneshot"
        )
    # A criterion that waits for gradients would only hold memory.
    criterion = oneshot if isinstance(oneshot, Criterion) else Magnitude()
    return Pruning([dataclasses.replace(rule, criterion=criterion) for rule in rules], schedule, oneshot)


def _refuse_beside_target(target: Target | None, rules: list[Rule], settings: dict[str, Any]) -> None:
    for i, rule in enumerate(rules):
        where = f"pruning.rules.{i}.sparsity"
        if target is None and rule.sparsity is None:
            raise InputError(f"{where}: this key is missing")
        if target is not None and rule.structure.couples and rule.sparsity is not None:
            raise InputError(f"{where}: pruning.target decides how many heads and neurons stay; remove the key")
    if target is None:
        return
    if all(rule.sparsity is not None for rule in rules):
        raise InputError(
            "pruning.target: no rule cuts heads or neurons; add {target: mlp, structure: neuron, criterion: taylor}"
        )
    for key in ("oneshot", "fill"):
        if settings.get(key):
            raise InputError(
                f"pruning.{key}: pruning.target needs masks that are chosen while training; remove one of the two"
            )


def _rule(data: Any, where: str) -> Rule:
    rule = mapping(data, where)
    parts: dict[str, tuple[Mapping[str, type[Any]], str]] = {
        "structure": (STRUCTURES, "unstructured"),
        "criterion": (CRITERIA, "movement"),
        "budget": (BUDGETS, "uniform"),
    }
    refuse_unknown(rule, ["target", "sparsity", "regularizer", "regrow", *parts], where)
    if "target" not in rule:
        raise InputError(f"{where}.target: this key is missing")
    built = {key: named(table, rule.get(key, default), f"{where}.{key}") for key, (table, default) in parts.items()}
    if (penalty := rule.get("regularizer")) is not None:
        built["regularizer"] = named(REGULARIZERS, penalty, f"{where}.regularizer")
    if rule.get("sparsity") is None and not built["structure"].couples:
        raise InputError(f"{where}.sparsity: this key is missing")
    sparsity = typed(float | None, rule.get("sparsity"), f"{where}.sparsity")
    regrow = typed(bool, rule.get("regrow", True), f"{where}.regrow")
    return Rule(target=typed(str, rule["target"], f"{where}.target"), sparsity=sparsity, regrow=regrow, **built)


def _recovery(data: Any) -> Recovery | None:
    if data in (None, False):
        return None
    settings = mapping({} if data is True else data, "recovery")
    keep = typed(bool, settings.pop("keep_moments", True), "recovery.keep_moments")
    return Recovery(_training(settings, "recovery"), keep)


def _check_recovery(recipe: Recipe, recovery: Recovery) -> None:
    pruning, training = recipe.pruning, recipe.training
    refuse_unrecoverable(pruning.rules, recovery, pruning.fill, pruning.oneshot is not None, pruning.schedule.freeze)
    if training.get("save_only_model") or training.get("save_strategy") == "best":
        raise InputError(
            "recovery: it starts from a whole checkpoint at the freeze, so save_only_model and save_strategy: best do not go "
            "with it; remove them from training"
        )


def _check_peft(recipe: Recipe, lora: Lora) -> None:
    pruning = recipe.pruning
    for key, used in {
        "recovery": recipe.recovery is not None,
        "pruning.oneshot": isinstance(pruning.oneshot, SparseGPT),
        "pruning.fill": pruning.fill,
        "pruning.schedule.rewind": pruning.schedule.rewind,
    }.items():
        if used:
            raise InputError(
                f"{key}: this is not done beside adapters, whose weights are frozen; change it, or remove peft"
            )
    if lora.gradients == "lora" and pruning.target is not None:
        raise InputError(
            "pruning.target: it adds up what cuts cost the loss, which gradients estimated from adapters tell up to a factor; "
            "set peft.gradients: exact"
        )
    phases = (recipe.training, recipe.training | recipe.dense.training)
    if lora.base_dtype == "bfloat16" and not all(phase.get("bf16") for phase in phases):
        raise InputError(
            "peft.base_dtype: bfloat16 weights beside fp32 adapters need autocast; set training.bf16: true"
        )
    refuse_beside_lora(pruning.rules, lora, fp16=bool(recipe.training.get("fp16")))


def _optional(cls: type[T], data: Any, where: str) -> T | None:
    return None if data in (None, False) else build(cls, data, where)


def _training(data: Any, where: str) -> dict[str, Any]:
    """Keys and types of TrainingArguments; their own checks run when the run builds them."""
    settings = mapping(data, where)
    hints = typing.get_type_hints(TrainingArguments)
    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    for key in settings:
        if key in _OWNED:
            raise InputError(f"{where}.{key}: this is set by {_OWNED[key]}; remove the key")
    refuse_unknown(settings, names, where)
    # YAML reads an unquoted `no` as false.
    settings = {key: "no" if value is False and key.endswith("_strategy") else value for key, value in settings.items()}
    return {key: typed(hints[key], value, f"{where}.{key}", keep=True) for key, value in settings.items()}


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as data that YAML and JSON can hold and ``Recipe.load`` can read."""
    names: dict[type, str] = {
        cls: name
        for table in (STRUCTURES, CRITERIA, BUDGETS, SCHEDULES, REGULARIZERS, ONESHOT, PERTURBATIONS)
        for name, cls in table.items()
    }

    data: dict[str, Any] = plain(recipe, names, lambda _: ["resolved"])
    if recipe.recovery is not None:
        data["recovery"] = {"keep_moments": recipe.recovery.keep_moments, **data["recovery"]["training"]}
    data["task"] = {"name": type(recipe.task).__module__.rpartition(".")[2], **data["task"]}
    return data
