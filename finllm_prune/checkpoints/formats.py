"""Which formats there are, and how one is found by its name."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.manifest import MANIFEST
from finllm_prune.errors import InputError

Save = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], PreTrainedModel]

FORMATS = ("masked", "compact", "ragged", "ragged-remote", "packed", "packed-int8", "onnx", "onnx-int8")
SERVED = ("onnx", "onnx-int8")  # what runs without PyTorch, and loads through ``serve``
PLUGGED = ("ragged", "ragged-remote", "packed", "packed-int8")  # what loads after ``import finllm_prune``
LOSSY = ("packed-int8", "onnx-int8")  # what is another model than the one in memory
GRAPH = "model.onnx"  # what the served formats write


def find_format(name: str) -> Save:
    """The ``save`` of ``finllm_prune/checkpoints/<name>.py``, a dash in the name being an underscore in the file's.

    Raises:
        InputError: there is no such format, or a package that it needs is missing.
    """
    if name not in FORMATS:
        raise InputError(f"export: unknown format '{name}'; known: {', '.join(FORMATS)}")
    save: Save = _room(name).save
    return save


def find_engine(name: str) -> Callable[[PreTrainedModel], Callable[..., Any]]:
    """What makes a served format of a model in memory, without tokenizer, proof or folder, to be called like the model.

    Raises:
        InputError: a package is missing that it needs.
    """
    engine: Callable[[PreTrainedModel], Callable[..., Any]] = _room(name).engine
    return engine


def serve(folder: Path, threads: int = 0) -> Callable[..., Any]:
    """A folder of a served format behind the call of a model: see ``finllm_prune.checkpoints.onnx.Served``."""
    served: Callable[..., Any] = _room("onnx").Served(folder, threads)
    return served


def is_served(folder: Path) -> bool:
    """Whether a folder was exported in a served format."""
    return (folder / GRAPH).is_file() and (folder / MANIFEST).is_file()


def _room(name: str) -> Any:
    try:
        return importlib.import_module(f"finllm_prune.checkpoints.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"export: {name} needs the package {error.name}, which is not installed: pip install 'finllm-prune[onnx]'"
        ) from None
