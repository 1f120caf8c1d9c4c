"""One run, top to bottom: dense teacher, pruning with distillation, proof, evaluation, export, card."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import unwrap_peft_model

from finllm_prune.checkpoints.apart import save_apart
from finllm_prune.conclusion import conclude
from finllm_prune.errors import ProofError
from finllm_prune.evaluation import Report
from finllm_prune.families import expand, find_architecture, shrink, without_effect
from finllm_prune.inference import answer, gather_of
from finllm_prune.judges import Judge
from finllm_prune.loading import load_model
from finllm_prune.prepare import Prepared, prepare, training_arguments
from finllm_prune.pruning import Calibrated, Pruner, Sensitivity, split_mesh
from finllm_prune.recipe import Recipe
from finllm_prune.staging import staged
from finllm_prune.tasks.classification import Classification
from finllm_prune.training import (
    COSINES,
    PruningTrainer,
    Recorder,
    Seam,
    SmallerCallback,
    Teacher,
    adapt,
    drop_out,
    hand_over,
    measure_sensitivity,
    merge,
    prune_once,
    sample_batches,
    with_kept_logits,
    with_teacher_logits,
)
from finllm_prune.training.teacher_logits import TEACHER_LOGITS
from finllm_prune.training.trainer import complete_checkpoint
from finllm_prune.workfolder import CHECKPOINTS


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Report | None:
    """Carry a recipe out; ``recipe.output`` appears when everything in it is complete and proved.

    Until then all files lie in ``<output>.partial``; a killed run goes on from there with ``resume``.

    Args:
        resume: go on with an unfinished run of the same recipe.
        overwrite: replace a finished output, and drop an unfinished one.

    Returns:
        What was measured; None on ranks other than the first.

    Raises:
        InputError: before any training, with what is wrong and the remedy.
    """
    ready = prepare(recipe, resume=resume, overwrite=overwrite)
    clock = {"started": time.time()}
    baseline = dense(ready)
    clock["dense"] = time.time()
    student, pruner, recorder, history = prune(ready, clock)
    clock["trained"] = time.time()
    main = PartialState().is_main_process
    report = conclude(ready, baseline, student, pruner, recorder, history, clock) if main else None
    PartialState().wait_for_everyone()
    return report


def dense(ready: Prepared) -> PreTrainedModel:
    """The dense baseline, from an earlier part of this run, from a checkpoint, or trained now."""
    folder = ready.work / "dense"
    exists = folder.is_dir()
    PartialState().wait_for_everyone()
    if not exists:
        model = ready.model
        if ready.recipe.dense.checkpoint is None:
            drop_out(model, ready.recipe.dense.dropout)
            adapted = adapt(model, ready.recipe.peft, ready.arguments.seed)
            rows = _with_cosines(ready, ready.tokens["train"])
            _trainer(ready, adapted, "dense", ready.recipe.dense.training, train_dataset=rows).go_on()
            model = merge(adapted)
        _save_plain(model, ready.tokenizer, folder)
    return load_model(ready.recipe.task, str(folder), ready.examples.labels)


def _with_cosines(ready: Prepared, tokenized: datasets.Dataset) -> datasets.Dataset:
    """The training rows with cosines beside the tokens, where the recipe asks for them."""
    cosines, rows = ready.recipe.cosines, ready.examples.splits["train"]
    if cosines is None or ready.encoder is None:
        return tokenized
    encoder, tokens, width = ready.encoder, ready.tokenizer.model_max_length, len(tokenized[0]["labels"])
    return with_kept_logits(
        tokenized, ready.work / CHECKPOINTS, cosines.fingerprint(rows, tokens),
        lambda: cosines.of(rows, encoder, tokens, width, ready.arguments), COSINES,
    )  # fmt: skip


def prune(
    ready: Prepared, clock: dict[str, float]
) -> tuple[PreTrainedModel, Pruner, Recorder | None, list[dict[str, Any]]]:
    """The pruned and recovered model, from the dense one; with the masks final, what was recorded, and the training's log.

    ``clock`` is told when it was ``pruned``.
    """
    recipe = ready.recipe
    student = load_model(recipe.task, str(ready.work / "dense"), ready.examples.labels)
    if recipe.distillation is not None:
        drop_out(student, recipe.distillation.dropout)
    architecture = find_architecture(student.config.model_type)
    depth = architecture.depth_of(student.config)
    if recipe.model.keep_layers is not None:
        architecture.keep_layers(student, recipe.model.keep_layers)
    teacher, rows = _teacher(ready, student, depth)
    rows = _with_cosines(ready, rows)
    rules = recipe.pruning.rules
    fill = architecture.whole_units(student, rules) if recipe.pruning.fill else []
    pruner = Pruner(architecture.groups(student, rules), recipe.pruning.schedule, fill, ready.costs)
    adapted = adapt(student, recipe.peft, ready.arguments.seed, pruner.groups)
    seam = [Seam(pruner, recipe.recovery)] if recipe.recovery else []
    trainer = _trainer(
        ready, adapted, "prune", {}, pruner=pruner, teacher=teacher, train_dataset=rows, recording=recipe.recording,
        callbacks=[*seam, *(recipe.peft.callbacks(pruner) if recipe.peft else [])],
    )  # fmt: skip
    if trainer.args.resume_from_checkpoint is None:  # a checkpoint holds the outcome
        _calibrate(ready, unwrap_peft_model(adapted), pruner)
    trainer.go_on()
    student = _whole(ready, _merged(ready, adapted), pruner)
    if recipe.peft is not None:
        pruner.finish()  # the merged products have filled single zeros
    log = trainer.state.log_history
    clock["pruned"] = time.time()
    if recipe.recovery is not None:
        log = _recover(ready, student, pruner, teacher, rows, log)
    if not pruner.holds():
        raise ProofError("the trained model has weights where its masks have none; nothing was exported")
    return student, pruner, trainer.recorder, [entry for entry in log if "sparsity" in entry]


def _merged(ready: Prepared, adapted: Any) -> PreTrainedModel:
    """The plain model; what it consists of is written apart too, where the recipe asks for that."""
    lora = ready.recipe.peft
    if lora is None or not lora.keep_adapter or not PartialState().is_main_process:
        return merge(adapted)
    return save_apart(adapted, ready.tokenizer, ready.work / "lora")


def _recover(
    ready: Prepared, student: PreTrainedModel, pruner: Pruner, teacher: Teacher | None, rows: datasets.Dataset,
    log: list[dict[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Train on without the dead heads and neurons, and bring the result back into the full-size model; returns the log."""
    recovery = ready.recipe.recovery
    assert recovery is not None
    PartialState().wait_for_everyone()  # the other ranks' part of the checkpoint is there
    checkpoints = ready.work / CHECKPOINTS
    last = complete_checkpoint(str(checkpoints / "prune"), pruned=True)
    assert last is not None, "the seam leaves one"
    seam, folder = Path(last), checkpoints / "recover"
    cuts = without_effect(student)
    small = shrink(student, cuts)

    def begin() -> None:
        if complete_checkpoint(str(folder), pruned=False) is None:
            hand_over(seam, small, folder)

    if not recovery.of_its_own:
        _once(begin)
    trainer = _trainer(
        ready, small, "recover", recovery.training, teacher=teacher, train_dataset=rows,
        callbacks=[SmallerCallback(cuts, pruner, seam)],
    )  # fmt: skip
    trainer.go_on()
    expand(small, student, cuts)
    done, cut = (max((e["step"] for e in log), default=0), {"sparsity": pruner.sparsity()})
    if not recovery.of_its_own:  # the log of the pruning phase came along with its checkpoint
        return [cut | entry if "loss" in entry else entry for entry in trainer.state.log_history]
    own = [entry | cut | {"step": done + entry["step"]} for entry in trainer.state.log_history if "loss" in entry]
    return log + own


def _teacher(ready: Prepared, student: PreTrainedModel, depth: int) -> tuple[Teacher | None, datasets.Dataset]:
    """Whom the student imitates, block by block of its first ``depth``; and the training rows, with its answers if kept."""
    recipe = ready.recipe
    if recipe.distillation is None:
        return None, ready.tokens["train"]
    model = load_model(recipe.task, ready.teacher or str(ready.work / "dense"), ready.examples.labels)
    rows = taught_rows(ready, model)
    teacher = Teacher.of(model, recipe.distillation, student, recipe.model.keep_layers, depth)
    if recipe.distillation.cache:
        teacher.to(ready.arguments.device)
        rows = teacher.keep_answers(rows, recipe.task.collator(ready.tokenizer), ready.work / CHECKPOINTS)
    return teacher, rows


def taught_rows(ready: Prepared, teacher: PreTrainedModel) -> datasets.Dataset:
    """What the pruned model learns from; of texts without labels what the teacher says is right."""
    if ready.unlabelled is None:
        return ready.taught
    task = ready.recipe.task
    assert isinstance(task, Classification), "no other task takes such texts"
    nn.Module.to(teacher, device=ready.arguments.device)
    rows = with_teacher_logits(teacher, ready.unlabelled, task.collator(ready.tokenizer), ready.work / CHECKPOINTS)
    labels = task.labels_of(torch.tensor(rows[TEACHER_LOGITS]))
    train, texts = ready.tokens["train"], ready.unlabelled.remove_columns("labels")
    answered = texts.add_column("labels", labels, feature=train.features["labels"])
    return datasets.concatenate_datasets([train, answered])


def _calibrate(ready: Prepared, student: PreTrainedModel, pruner: Pruner) -> None:
    """What rules ask of data before training: the loss of each matrix's cut, or the final masks in one shot."""

    def sample(count: int) -> list[dict[str, Tensor]]:
        return sample_batches(ready.tokens["train"], count, ready.recipe.task.collator(ready.tokenizer), seed)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = answer(model, batch, gather_of(ready.recipe.task.collator(ready.tokenizer)))
        assert task_loss is not None
        return task_loss(outputs["logits"], batch["labels"])

    task_loss = ready.recipe.task.loss(ready.examples)
    rules, method, seed = ready.recipe.pruning.rules, ready.recipe.pruning.oneshot, ready.arguments.seed
    asked = [rule.budget.rows for rule in rules if isinstance(rule.budget, Sensitivity)]
    lora = ready.recipe.peft
    mixed = lora is not None and lora.base_dtype == "bfloat16"  # the head is fp32
    with torch.autocast(student.device.type, torch.bfloat16, enabled=mixed):
        if asked:
            measure_sensitivity(student, pruner.groups, sample(max(asked)), loss if task_loss is not None else None)
        if method is not None:
            batches = sample(method.rows) if isinstance(method, Calibrated) else []
            prune_once(student, find_architecture(student.config.model_type), pruner, method, batches)


def _trainer(
    ready: Prepared, model: PreTrainedModel, phase: str, changes: dict[str, Any], **parts: Any
) -> PruningTrainer:
    arguments = training_arguments(ready.recipe, ready.work, phase, changes)
    arguments.resume_from_checkpoint = complete_checkpoint(
        arguments.output_dir, pruned="pruner" in parts, projected=_projected(parts)
    )
    judge = ready.recipe.task.judge(ready.examples, "validation")
    return PruningTrainer(
        model, arguments, description=phase, eval_dataset=ready.tokens["validation"],
        data_collator=ready.recipe.task.collator(ready.tokenizer), processing_class=ready.tokenizer,
        compute_metrics=lambda result: _scores(result, judge), task_loss=ready.recipe.task.loss(ready.examples),
        cosines=ready.recipe.cosines, **parts,
    )  # fmt: skip


def _projected(parts: dict[str, Any]) -> bool:
    teacher = parts.get("teacher")
    return teacher is not None and teacher.projection is not None


def _scores(result: EvalPrediction, judge: Judge) -> dict[str, float]:
    logits = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
    answers = judge.answers(torch.as_tensor(logits))
    return {name: judge.value(name, answers) for name in judge.metrics}


def _once(write: Callable[[], None]) -> None:
    """Write on the first rank while the others wait."""
    if PartialState().is_main_process:
        write()
    PartialState().wait_for_everyone()


def _save_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """On the first rank; a model that is split is gathered there, matrix by matrix, in host memory."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = None if split_mesh(model) is None else get_model_state_dict(model, options=options)

    def write() -> None:
        with staged(folder) as partial:
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)

    _once(write)


def _whole(ready: Prepared, model: PreTrainedModel, pruner: Pruner) -> PreTrainedModel:
    """A model that FSDP has split, whole on each rank, and the Pruner on it; by way of the disk, so as to hold it once."""
    if split_mesh(model) is None:
        return model
    folder = ready.work / CHECKPOINTS / "whole"
    _save_plain(model, ready.tokenizer, folder)
    whole = load_model(ready.recipe.task, str(folder), ready.examples.labels)
    nn.Module.to(whole, device=ready.arguments.device)
    pruner.follow(whole)
    return whole
