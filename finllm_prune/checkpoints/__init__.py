"""Checkpoint formats: one file each, found by its name, with a ``save`` that proves what it wrote."""

import importlib
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.proof import verify, zero_counts
from finllm_prune.errors import InputError

Save = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], PreTrainedModel]

__all__ = ["find_format", "verify", "zero_counts"]


def find_format(name: str) -> Save:
    """The ``save`` of ``finllm_prune/checkpoints/<name>.py``."""
    try:
        save: Save = importlib.import_module(f"finllm_prune.checkpoints.{name}").save
    except (ModuleNotFoundError, AttributeError):
        raise InputError(f"export: unknown format '{name}'; known: masked, compact") from None
    return save
