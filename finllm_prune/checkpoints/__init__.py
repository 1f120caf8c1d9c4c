"""Checkpoint formats: one file each, found by its name, with a ``save`` that proves what it wrote."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.proof import verify, zero_counts
from finllm_prune.errors import InputError

Save = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], PreTrainedModel]

__all__ = ["find_format", "formats", "verify", "zero_counts"]


def find_format(name: str) -> Save:
    """The ``save`` of ``finllm_prune/checkpoints/<name>.py``, with underscores for hyphens."""
    try:
        save: Save = importlib.import_module(_path(name)).save
    except (ModuleNotFoundError, AttributeError):
        raise InputError(f"export: unknown format '{name}'; known: {', '.join(formats())}") from None
    return save


def formats() -> list[str]:
    """The names of all formats."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name.replace("_", "-") for name in modules if hasattr(importlib.import_module(_path(name)), "save")]


def _path(name: str) -> str:
    return f"{__name__}.{name.replace('-', '_')}"
