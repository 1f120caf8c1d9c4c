"""What a recipe will come to, told before anything is trained: size, speed, time and memory."""

import copy
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finllm_prune.checkpoints.packed import pack_all
from finllm_prune.evaluation import Target, cpu_threads, flops, measured_table, parameter_bytes
from finllm_prune.families import Architecture, Family, find_architecture, narrow
from finllm_prune.inference import logits_of
from finllm_prune.loading import load_model
from finllm_prune.prepare import Prepared, engine_of, read, training_arguments
from finllm_prune.pruning import Group, Pruner, equal_widths
from finllm_prune.recipe import Recipe
from finllm_prune.training import PruningTrainer, Teacher, adapt

_STEPS = 4

Widths = dict[str, list[int]]


@dataclass(frozen=True)
class Plan:
    """Predictions. Where widths are open, all blocks are taken as equally narrow; the run will spread them by score.

    Args:
        parameters, flops: ``dense`` and ``pruned`` (without cut heads and neurons; of one text of ``tokens``); ``not_zero``
            leaves out single weights too.
        bytes: of the weights, ``dense`` and in each format to be exported; a graph takes some more.
        latency: of a forward pass on this machine's CPU, from its table; None where no whole heads or neurons are cut.
        seconds: ``dense``, ``teacher`` (where its answers are kept, or label texts), ``pruning`` and ``recovery``, from a few
            real steps; without evaluation and export.
        peak_bytes: of weights, gradients, optimizer, scores, teacher and activations, at once. Python, its libraries and the
            making of ONNX graphs come on top, in host memory.
        kept_bytes: of the teacher's hidden states on disk, until the run is complete; 0 where none are kept.
        target: kind, asked, and the lowest that these rules can reach; None without a target.
    """

    parameters: dict[str, int]
    flops: dict[str, float]
    bytes: dict[str, float]
    latency: dict[str, Any] | None
    seconds: dict[str, float]
    peak_bytes: int
    kept_bytes: int
    target: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str]]:
        """The table: what, dense, pruned."""
        small = self.parameters["pruned"]
        rows = [("parameters", f"{self.parameters['dense']:,}", f"{small:,}")]
        if self.parameters["not_zero"] < small:
            rows.append(("  of these not zero", "", f"{self.parameters['not_zero']:,}"))
        what = f"GFLOPs, {self.flops['tokens']:.0f} tokens"
        rows.append((what, f"{self.flops['dense'] / 1e9:.3f}", f"{self.flops['pruned'] / 1e9:.3f}"))
        for name, size in self.bytes.items():
            if name != "dense":
                rows.append((f"weights on disk, {name}", f"{self.bytes['dense'] / 1e6:.1f} MB", f"{size / 1e6:.1f} MB"))
        if (fast := self.latency) is not None:
            plural = "" if fast["threads"] == 1 else "s"
            what = f"CPU latency, {fast['batch']} × {fast['tokens']} tokens, {fast['threads']} thread{plural}"
            rows.append((what, f"{fast['dense_ms']:.1f} ms", f"{fast['pruned_ms']:.1f} ms, ratio {fast['ratio']:.2f}"))
        rows.append(("training time", f"{self.seconds['dense']:.0f} s", f"{self.seconds['pruning']:.0f} s"))
        if "teacher" in self.seconds:
            rows.append(("  the teacher's answers before it", "", f"{self.seconds['teacher']:.0f} s"))
        if "recovery" in self.seconds:
            rows.append(("  recovery after it", "", f"{self.seconds['recovery']:.0f} s"))
        rows.append(("peak memory of the training's tensors", "", f"{self.peak_bytes / 1e9:.2f} GB"))
        if self.kept_bytes > 0:
            rows.append(("teacher's hidden states, on disk", "", f"{self.kept_bytes / 1e9:.2f} GB"))
        if self.target is not None:
            what = f"target {self.target['kind']} {self.target['asked']:g}"
            rows.append((what, "", f"can be reached; lowest {self.target['lowest']:.3f}"))
        return rows


def plan(recipe: Recipe) -> Plan:
    """Read everything as a run does, count, time a few steps, and write nothing.

    Raises:
        InputError: what a run would refuse, a target out of reach included.
    """
    ready = read(recipe)
    student = copy.deepcopy(ready.model)
    architecture = find_architecture(student.config.model_type)
    depth = architecture.depth_of(student.config)
    if recipe.model.keep_layers is not None:
        architecture.keep_layers(student, recipe.model.keep_layers)
    groups = architecture.groups(student, recipe.pruning.rules)
    widths = _widths(ready, groups)
    _cut_single(groups)
    small = narrow(student, widths) if widths else student
    equal = narrow(student, _equal(architecture, widths)) if widths else student
    forms = {"masked": student, "compact": equal}
    shape = recipe.pruning.target or Target(size=0.5)
    tokens = min(shape.tokens, getattr(student.config, "max_position_embeddings", shape.tokens))
    costs = ready.costs
    return Plan(
        parameters={
            "dense": _count(ready.model), "pruned": _count(small), "not_zero": _count(small) - _single_zeros(groups),
        },
        flops={"tokens": tokens, "dense": flops(ready.model, tokens), "pruned": flops(small, tokens)},
        bytes={"dense": parameter_bytes(ready.model)}
        | {name: _size(name, forms.get(name, small)) for name in recipe.export},
        latency=_latency(ready.model, student, widths, shape, tokens),
        kept_bytes=ready.kept_bytes,
        target=None
        if costs is None
        else {"kind": shape.kind, "asked": shape.ratio, "lowest": costs.lowest},
        **_training(ready, student, small, groups, depth),
    )  # fmt: skip


def _widths(ready: Prepared, groups: list[Group]) -> Widths:
    """Units that stay, by part and block; a part that no rule cuts as a whole is not named."""
    kept = {}
    if (costs := ready.costs) is not None:
        open_groups = [group for group in groups if group.rule.sparsity is None]
        tables = [costs.tables[group.name] for group in open_groups]
        found = equal_widths(tables, costs.limit - costs.rest)
        kept = {group.name: units for group, units in zip(open_groups, found, strict=True)}
    widths: Widths = {}
    for group in groups:
        part, sparsity = group.rule.structure.couples, group.rule.sparsity
        if part in ("attention", "mlp"):
            units = kept[group.name] if sparsity is None else max(1, round((1.0 - sparsity) * group.mask.numel()))
            widths.setdefault(part, []).append(units)
    return widths


def _equal(architecture: Architecture, widths: Widths) -> Widths:
    """What a plain config can say: one width for all blocks, heads only where they are free."""
    assert isinstance(architecture, Family)
    parts = ("attention", "mlp") if architecture.free_heads else ("mlp",)
    return {part: [max(widths[part])] * len(widths[part]) for part in parts if part in widths}


def _single(groups: list[Group]) -> list[tuple[nn.Parameter, float]]:
    """The matrices that a rule cuts within, and which part of each."""
    fine = [group for group in groups if group.rule.structure.couples is None]
    return [(group.slots[0].parameter, float(group.rule.sparsity or 0.0)) for group in fine]


def _single_zeros(groups: list[Group]) -> int:
    return sum(round(sparsity * matrix.numel()) for matrix, sparsity in _single(groups))


@torch.no_grad()
def _cut_single(groups: list[Group]) -> None:
    """Zeros anywhere, for formats whose size is a matter of how many there are."""
    for matrix, sparsity in _single(groups):
        matrix.mul_(torch.rand(matrix.shape) >= sparsity)


def _size(name: str, model: PreTrainedModel) -> float:
    """Bytes of the model in a format."""
    if name == "onnx-int8":  # a byte for each entry of a matrix or an embedding, and a scale for each column
        return sum(p.numel() + 4.0 * p.shape[1] if p.ndim == 2 else p.nbytes for p in model.parameters())
    if name not in ("packed", "packed-int8"):
        return parameter_bytes(model)
    packed = pack_all(model, int8=name == "packed-int8")
    saved = sum(model.get_parameter(f"{path}.weight").nbytes - matrix.bytes for path, matrix in packed.items())
    return parameter_bytes(model) - saved


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _latency(
    dense: PreTrainedModel, student: PreTrainedModel, widths: Widths, shape: Target, tokens: int
) -> dict[str, Any] | None:
    if not widths:
        return None
    with cpu_threads(shape.threads):
        table = measured_table(dense, student, shape.batch, tokens, set(widths), shape.runtime, engine_of(shape))
        threads = torch.get_num_threads()
    surface = table.surface()
    whole = {"attention": table.heads[-1:], "mlp": table.neurons[-1:]} | widths
    ratio = float(np.mean([surface[h, n] for h in whole["attention"] for n in whole["mlp"]]))
    return {
        "batch": shape.batch, "tokens": tokens, "threads": threads, "dense_ms": table.dense_ms,
        "pruned_ms": ratio * table.dense_ms, "ratio": ratio,
    }  # fmt: skip


def _training(
    ready: Prepared, student: PreTrainedModel, small: PreTrainedModel, groups: list[Group], depth: int
) -> dict[str, Any]:
    """Seconds and peak memory, by a few steps of each phase."""
    recipe = ready.recipe
    seconds = {"dense": 0.0}
    if recipe.dense.checkpoint is None:
        model = adapt(copy.deepcopy(ready.model), recipe.peft, ready.arguments.seed)
        seconds["dense"], _ = _few_steps(ready, model, ready.tokens["train"], "dense", recipe.dense.training)
    with tempfile.TemporaryDirectory() as folder:
        teacher, rows = _teacher(ready, student, depth, Path(folder), seconds)
        pruner = Pruner(groups, recipe.pruning.schedule, costs=ready.costs)
        adapted = adapt(student, recipe.peft, ready.arguments.seed, groups)
        # Scores, and the values of cut weights, which are parked; both are gone when the masks freeze.
        carried = _bytes(pruner.state_dict().values()) + sum(_parked(group) for group in groups)
        listeners = recipe.peft.callbacks(pruner) if recipe.peft else []
        seconds["pruning"], peak = _few_steps(
            ready, adapted, rows, "prune", {}, listeners, pruner=pruner, teacher=teacher
        )
        if (recovery := recipe.recovery) is not None:
            seconds["recovery"], _ = _few_steps(ready, small, rows, "recover", recovery.training, teacher=teacher)
            if not recovery.of_its_own:  # but a part of the training
                seconds["pruning"] *= recipe.pruning.schedule.freeze
                seconds["recovery"] *= 1.0 - recipe.pruning.schedule.freeze
    return {"seconds": seconds, "peak_bytes": peak + carried}


def _teacher(
    ready: Prepared, student: PreTrainedModel, depth: int, folder: Path, seconds: dict[str, float]
) -> tuple[Teacher | None, datasets.Dataset]:
    """Whom the student imitates; and the training rows, few and with its answers where these are kept.

    What it answers before the training, to be kept or to label texts, goes into ``seconds``.
    """
    recipe, args, every = ready.recipe, ready.arguments, ready.taught
    if recipe.distillation is None:
        return None, every
    model = copy.deepcopy(ready.model)
    if ready.teacher is not None:
        model = load_model(recipe.task, ready.teacher, ready.examples.labels)
    teacher = Teacher.of(model, recipe.distillation, student, recipe.model.keep_layers, depth)
    cache, collator = recipe.distillation.cache, recipe.task.collator(ready.tokenizer)
    answers = len(every) * cache + len(ready.unlabelled or ())
    if answers == 0:
        return teacher, every
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = every.select(range(min(len(every), _STEPS * batch)))
    teacher.to(args.device)
    began = time.perf_counter()
    taught = teacher.keep_answers(rows, collator, folder) if cache else every
    if not cache:
        logits_of(model, rows, collator)
    seconds["teacher"] = (time.perf_counter() - began) * answers / len(rows)
    return teacher, taught


def _few_steps(
    ready: Prepared, model: PreTrainedModel, rows: datasets.Dataset, phase: str, changes: dict[str, Any],
    callbacks: Sequence[TrainerCallback] = (), **parts: Any,
) -> tuple[float, int]:  # fmt: skip
    """The seconds of a whole phase, and its peak of bytes."""
    short = {"max_steps": _STEPS, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
    short |= {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True}
    watch = _Watch()
    with tempfile.TemporaryDirectory() as folder:
        whole = training_arguments(ready.recipe, Path(folder), phase, changes)
        args = training_arguments(ready.recipe, Path(folder), phase, changes | short)
        trainer = PruningTrainer(
            model, args, train_dataset=rows, data_collator=ready.recipe.task.collator(ready.tokenizer),
            processing_class=ready.tokenizer, callbacks=[watch, *callbacks],
            task_loss=ready.recipe.task.loss(ready.examples), **parts,
        )  # fmt: skip
        every = ready.tokens["train"] if phase == "dense" else ready.taught
        batches = len(trainer.get_train_dataloader()) * len(every) / len(rows)
        per_epoch = max(1, int(batches) // whole.gradient_accumulation_steps)
        trainer.remove_callback(PrinterCallback)  # a plan is one table
        with watch.activations():
            trainer.train()
    steps = whole.max_steps if whole.max_steps > 0 else int(np.ceil(whole.num_train_epochs * per_epoch))
    return float(np.median(watch.seconds[1:])) * steps, watch.peak + _held(trainer)


def _held(trainer: PruningTrainer) -> int:
    """Bytes of everything that lives across steps."""
    assert isinstance(trainer.model, nn.Module)
    assert trainer.optimizer is not None
    tensors: list[Tensor] = [*trainer.model.parameters()]
    tensors += [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]  # their gradients
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    if isinstance(trainer.teacher, Teacher) and trainer.teacher.model is not None:
        tensors += [*trainer.teacher.model.parameters()]
    return _bytes(tensors)


def _parked(group: Group) -> int:
    """The most that waits beside a group's weights: cut rows and columns alone, or as much as the weights, or nothing."""
    if not group.rule.regrow:
        return 0
    part = group.rule.sparsity if group.rule.structure.sliced else None
    return int((part or 1.0) * _bytes(slot.parameter for slot in group.slots))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Watch(TrainerCallback):
    """The seconds of each step, and the most bytes that a backward pass waits for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak = 0
        self._saved: dict[int, int] = {}
        self._weights: set[int] = set()
        self._began = 0.0

    @contextmanager
    def activations(self) -> Iterator[None]:
        """Count what autograd keeps, weights aside."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in kwargs["model"].parameters()}
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self._settle()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._settle()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _settle(self) -> None:
        self.peak = max(self.peak, sum(self._saved.values()))
        self._saved = {}
