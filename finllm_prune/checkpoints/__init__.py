"""Checkpoint formats: one file each, found by its name, with a ``save`` that proves what it wrote."""

import importlib
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.proof import exported_in, proved, verify, zero_counts
from finllm_prune.errors import InputError

Save = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], PreTrainedModel]

# A format is a file here that has a ``save``: told without importing, for some need packages that not everybody has.
FORMATS = tuple(
    sorted(
        path.stem.replace("_", "-")
        for path in Path(__file__).parent.glob("*.py")
        if "\ndef save(" in path.read_text(encoding="utf-8")
    )
)

__all__ = ["FORMATS", "exported_in", "find_format", "proved", "verify", "zero_counts"]


def find_format(name: str) -> Save:
    """The ``save`` of ``finllm_prune/checkpoints/<name>.py``, a dash in the name being an underscore in the file's."""
    if name not in FORMATS:
        raise InputError(f"export: unknown format '{name}'; known: {', '.join(FORMATS)}")
    save: Save = importlib.import_module(f"finllm_prune.checkpoints.{name.replace('-', '_')}").save
    return save
