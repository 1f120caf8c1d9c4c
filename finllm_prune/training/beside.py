"""Our tensors beside the Trainer's checkpoints: written whole or not at all, and missed where they are not.

What is split among ranks lies in a folder of safetensors, one of each rank, by ``torch.distributed.checkpoint``: it can be
read again by any number of ranks. The file beside it, of the same name, holds the rest and is written last.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard, empty
from transformers import TrainerState, TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.pruning import split_mesh
from finllm_prune.staging import save_tensors


def save_beside(
    args: TrainingArguments, state: TrainerState, name: str, tensors: Callable[[], dict[str, Tensor]], split: bool = False
) -> None:  # fmt: skip
    """Write a file into the checkpoint of this step, on the rank that saves.

    Args:
        tensors: makes them, among them DTensors; the other ranks make none unless the model is ``split``.
    """
    file = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / name
    made = tensors() if split or args.should_save else {}
    parts = {key: tensor for key, tensor in made.items() if isinstance(tensor, DTensor)}
    if parts:
        writer = HuggingFaceStorageWriter(str(file.with_suffix("")), save_distributed=True)
        save(cast(dict[str, Any], parts), storage_writer=writer)
    # The others' files, as of their random numbers, are there before the one that tells that a checkpoint is complete.
    PartialState().wait_for_everyone()
    if args.should_save:
        save_tensors({key: tensor for key, tensor in made.items() if key not in parts}, file)


def load_beside(
    args: TrainingArguments, state: TrainerState, name: str, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """Read a file of the checkpoint that the Trainer has just loaded.

    Args:
        model: where it is split, so are those tensors that were when they were saved, by whatever number of ranks.

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
            return load_file(Path(candidate) / name) | _load_parts((Path(candidate) / name).with_suffix(""), model)
    raise InputError(
        f"the checkpoint of step {state.global_step} lies in no known place; set resume_from_checkpoint in the "
        "TrainingArguments to the folder that train() is given"
    )


def _load_parts(folder: Path, model: nn.Module | None) -> dict[str, Tensor]:
    if not folder.is_dir():
        return {}
    reader = HuggingFaceStorageReader(str(folder))
    kinds = reader.read_metadata().state_dict_metadata
    mesh = None if model is None else split_mesh(model)
    tensors: dict[str, Tensor] = {}
    for key, kind in kinds.items():
        assert isinstance(kind, TensorStorageMetadata)
        if mesh is None:
            tensors[key] = torch.empty(kind.size, dtype=kind.properties.dtype)
        else:
            tensors[key] = empty(kind.size, dtype=kind.properties.dtype, device_mesh=mesh, placements=[Shard(0)])
    load(cast(dict[str, Any], tensors), storage_reader=reader)
    return tensors


def _step_of(folder: Path) -> int | None:
    try:
        step: int = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError):
        return None
    return step
