"""Our tensors beside the Trainer's checkpoints: written whole or not at all, and missed where they are not."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.staging import save_tensors


def save_beside(
    args: TrainingArguments, state: TrainerState, name: str, tensors: Callable[[], dict[str, Tensor]]
) -> None:
    """Write a file into the checkpoint of this step, on the rank that saves; the others make no tensors."""
    if args.should_save:
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        save_tensors(tensors(), folder / name)


def load_beside(args: TrainingArguments, state: TrainerState, name: str) -> dict[str, Tensor]:
    """Read a file of the checkpoint that the Trainer has just loaded.

    Raises:
        InputError: the checkpoint does not hold it, or lies in no known place.
    """
    for candidate in (args.resume_from_checkpoint, f"{args.output_dir}/checkpoint-{state.global_step}"):
        if isinstance(candidate, str) and _step_of(Path(candidate)) == state.global_step:
            if not (Path(candidate) / name).is_file():
                raise InputError(
                    f"{candidate}: there is no {name}, so its run cannot be resumed exactly; "
                    "resume from another checkpoint or start afresh"
                )
            return load_file(Path(candidate) / name)
    raise InputError(
        f"the checkpoint of step {state.global_step} lies in no known place; set resume_from_checkpoint in the "
        "TrainingArguments to the folder that train() is given"
    )


def _step_of(folder: Path) -> int | None:
    try:
        step: int = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError):
        return None
    return step
