"""Logits that are kept in a folder, so that a suite which was killed goes on where it was."""

import dataclasses
import hashlib
import json
from pathlib import Path

import datasets
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from finllm_prune.checkpoints.manifest import sha256
from finllm_prune.saved import Saved
from finllm_prune.staging import save_tensors

_MODEL_FILES = (".safetensors", ".onnx", ".json", ".txt", ".model")


class Kept:
    """What models have answered before: found again by the model's files, the task, the rows and the versions.

    Args:
        folder: where it lies; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._models: dict[str, str] = {}

    def logits(self, saved: Saved, rows: datasets.Dataset) -> Tensor:
        """As ``Saved.logits``; a model that has answered all of this before is not even loaded."""
        if self.folder is None:
            return saved.logits(rows)
        path = self.folder / f"{self._key(saved, rows)}.safetensors"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors({"logits": saved.logits(rows).contiguous()}, path)
        return load_file(path)["logits"]

    def _key(self, saved: Saved, rows: datasets.Dataset) -> str:
        model = self._models.setdefault(saved.location, _fingerprint(saved))
        task = [type(saved.task).__module__, dataclasses.asdict(saved.task)]  # type: ignore[call-overload]
        content = [model, task, saved.examples.labels, rows.to_dict(), torch.__version__, transformers.__version__]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:32]


def _fingerprint(saved: Saved) -> str:
    """Of the files of a folder, or the commit of a Hub model."""
    folder = Path(saved.location)
    if not folder.is_dir():
        return f"{saved.location} {saved.config._commit_hash}"
    files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES)
    return json.dumps([[path.name, sha256(path)] for path in files])
