"""One cell, from the dense model of its seed to its row."""

import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bench.cells import Cell, Row, claimed
from bench.methods import METHODS
from bench.protocol import Protocol
from finllm_prune.evaluation import compare, measure, removed
from finllm_prune.families import find_family, shrink, without_effect
from finllm_prune.inference import logits_of
from finllm_prune.loading import load_model
from finllm_prune.prepare import Prepared, prepare
from finllm_prune.provenance import provenance
from finllm_prune.pruning import Pruner
from finllm_prune.run import dense as dense_of
from finllm_prune.run import prune, taught_rows
from finllm_prune.training import Teacher, drop_out


def run(cell: Cell, protocol: Protocol) -> Row:
    """Train, cut and measure."""
    began = time.time()
    method = METHODS[cell.method]
    source = protocol.dense_model(cell.seed)
    plan = protocol.recipe(
        method, cell.sparsity, cell.seed, cell.learning_rate, protocol.out / "work" / cell.key, source
    )
    ready = prepare(plan, resume=False, overwrite=True)
    student, dense = (load_model(plan.task, str(source), ready.examples.labels) for _ in range(2))
    if plan.distillation is not None:
        drop_out(student, plan.distillation.dropout)
    family = find_family(student.config.model_type)
    layers = range(len(family.layers(student)))
    parts: dict[str, Any] = {}
    if plan.distillation is not None and plan.recovery is None:
        teacher = parts["teacher"] = Teacher(dense, plan.distillation, layers)
        teacher.to(ready.arguments.device)
        rows, collator = taught_rows(ready, dense), plan.task.collator(ready.tokenizer)
        with claimed(protocol.out, f"teacher-{source.name}", wait=True):
            parts["train_dataset"] = teacher.keep_answers(rows, collator, protocol.out / "teachers")
    pruner = None
    if plan.recovery is None and "pruning" in method.recipe:
        rules = plan.pruning.rules
        fill = family.whole_units(student, rules) if plan.pruning.fill else []
        pruner = parts["pruner"] = Pruner(family.groups(student, rules), plan.pruning.schedule, fill, ready.costs)
    if method.peer:
        parts["callbacks"] = [method.peer(cell.sparsity)]
    started = time.time()
    if plan.recovery is not None:
        dense_of(ready)
        started = time.time()
        student, pruner, _, history = prune(ready, {})
        steps = max(entry["step"] for entry in history)
    else:
        steps = protocol.train(ready, student, {}, **parts).state.global_step
    trained = time.time()
    small = shrink(student, without_effect(student)) if pruner else student
    smaller = sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    made_of = provenance(ready)
    shutil.rmtree(ready.work)
    nn.Module.to(dense, device=student.device)
    return {
        "key": cell.key,
        **asdict(cell),
        "validation": on_validation(ready, dense, student),
        "test": on_test(ready, dense, student),
        "sparsity_of": ({"targeted": pruner.sparsity()} if pruner else {}) | removed(dense, student),
        "latency": [measure(dense, small, batch).to_dict() for batch in (1, 16)] if smaller else [],
        "steps": steps,
        "train_seconds": round(trained - started, 1),
        "seconds": round(time.time() - began, 1),
        "versions": made_of["versions"] | peer_version(cell.method),
        "machine": made_of["machine"],
        "commit": made_of["commit"],
    }


def on_validation(ready: Prepared, dense: PreTrainedModel, student: PreTrainedModel) -> dict[str, dict[str, float]]:
    """The metrics by which a learning rate is chosen: no intervals."""
    rows, collator = ready.tokens["validation"], ready.recipe.task.collator(ready.tokenizer)
    judge = ready.recipe.task.judge(ready.examples, "validation")
    models = (("dense", dense), ("pruned", student))
    found = {kind: judge.answers(logits_of(model, rows, collator)) for kind, model in models}
    return {name: {kind: judge.value(name, answers) for kind, answers in found.items()} for name in judge.metrics}


def on_test(ready: Prepared, dense: PreTrainedModel, student: PreTrainedModel) -> dict[str, Any]:
    """The student beside its dense teacher: metrics with intervals, agreement, flips, collapse."""
    rows, collator = ready.tokens["test"], ready.recipe.task.collator(ready.tokenizer)
    judge = ready.recipe.task.judge(ready.examples)
    found = compare(judge, logits_of(dense, rows, collator), logits_of(student, rows, collator))
    return {**found.metrics, **{key: value for key, value in asdict(found).items() if key != "metrics"}}


def peer_version(method: str) -> dict[str, str]:
    """The version of the package that a peer comes from, where it is not torch itself."""
    return {"torch-pruning": version("torch-pruning")} if method.startswith("torch_pruning") else {}
