"""The folder in which a run works until it is complete, and what must be so for a killed one to go on."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.recipe import Recipe
from finllm_prune.vocabulary import Trimmed

CHECKPOINTS = "checkpoints"
EVENTS = "runs"  # transformers' own name for it
_KEPT = "vocabulary.json"
_BATCH = "batch.json"
_SHARING = ("per_device_train_batch_size", "gradient_accumulation_steps", "ddp_backend")
REMEDY = "use --overwrite to replace it, or set another output"


def check_output(recipe: Recipe, work: Path, resume: bool, overwrite: bool) -> None:
    """Nothing is replaced unless that is asked for, and only a run of the same recipe goes on."""
    output = recipe.output
    refuse_foreign(output)
    if resume:
        if not work.is_dir():
            raise InputError(f"--resume: there is no unfinished run in {work}; start it without --resume")
        if not (work / "recipe.yaml").is_file():
            raise InputError(f"--resume: {work} holds no recipe.yaml, so it is no run; start afresh with --overwrite")
        if changed := changed_keys(recipe, work):
            raise InputError(
                f"--resume: the run in {work} was started with another recipe (it differs in {', '.join(changed)}); "
                "resume with that one, or start afresh with --overwrite"
            )
    elif not overwrite:
        if output.exists():
            raise InputError(f"output: {output} exists; {REMEDY}")
        if work.exists():
            raise InputError(f"output: an unfinished run lies in {work}; use --resume to go on with it, or --overwrite")


def refuse_foreign(output: Path) -> None:
    """What is to be written must have a place, and nothing but a run's output is ever replaced."""
    if any(parent.is_file() for parent in output.absolute().parents):
        raise InputError(f"output: {output} lies below a file; name a folder that can be made")
    if output.exists() and not (output / "recipe.yaml").is_file():
        raise InputError(
            f"output: {output} exists and is not the output of a run, so it is left alone; set another output"
        )


def changed_keys(recipe: Recipe, folder: Path) -> list[str]:
    """In what the recipe that a run left in its folder differs from this one; how processes share a step does not count."""
    started, now = _unsplit(yaml.safe_load((folder / "recipe.yaml").read_text())), _unsplit(recipe.resolved)
    return [key for key in now if started.get(key) != now[key]]


def check_batch(work: Path, arguments: TrainingArguments) -> None:
    """The rows of a step are those that the run was started with, however many processes share them."""
    kept = work / CHECKPOINTS / _BATCH
    if kept.is_file() and (rows := json.loads(kept.read_text())) != _step_rows(arguments):
        raise InputError(
            f"--resume: a step of the run in {work} takes {rows} rows, and would take {_step_rows(arguments)}; set "
            f"training.per_device_train_batch_size so that, times processes and gradient_accumulation_steps, it makes {rows}"
        )


def open_work(
    recipe: Recipe, work: Path, arguments: TrainingArguments, vocabulary: Trimmed | None, resume: bool
) -> None:  # fmt: skip
    """On the first rank alone: the recipe, and what a resumed run is held against."""
    checkpoints = work / CHECKPOINTS
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        (work / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved, sort_keys=False))
        (checkpoints / _BATCH).write_text(json.dumps(_step_rows(arguments)))
    if vocabulary is not None:
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / _KEPT).write_text(json.dumps(vocabulary.old))


def close_work(work: Path, into: Path) -> None:
    """Drop the checkpoints, but for what TensorBoard wrote beside them: it goes to ``runs/<phase>`` of ``into``."""
    for events in sorted((work / CHECKPOINTS).glob(f"*/{EVENTS}")):
        (into / EVENTS).mkdir(exist_ok=True)
        events.rename(into / EVENTS / events.parent.name)
    shutil.rmtree(work / CHECKPOINTS, ignore_errors=True)


def check_vocabulary(work: Path, trimmed: Trimmed) -> None:
    """Checkpoints of other tokens would load, and mean something else."""
    kept = work / CHECKPOINTS / _KEPT
    if not kept.is_file() or tuple(json.loads(kept.read_text())) != trimmed.old:
        raise InputError(
            f"--resume: the texts that choose the vocabulary have changed since the run in {work} was started; bring them "
            "back, or start afresh with --overwrite"
        )


def _unsplit(resolved: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what says how many processes share a step, which may be others when a run goes on."""
    training = {key: value for key, value in (resolved.get("training") or {}).items() if key not in _SHARING}
    return resolved | {"training": training}


def _step_rows(arguments: TrainingArguments) -> int:
    rows: int = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    return rows
