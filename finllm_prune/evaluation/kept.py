"""Logits that are kept, so that what was killed goes on where it was, and no model answers the same questions twice."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from finllm_prune.checkpoints.manifest import tensors_sha256
from finllm_prune.staging import save_tensors

_OF_FILES = ("_name_or_path", "transformers_version")


class Kept:
    """What models have answered before, in files that are named after all that an answer depends on.

    Args:
        folder: where they lie; None keeps nothing.
        slower_than: seconds; what was answered sooner is not kept.
    """

    def __init__(self, folder: Path | None, slower_than: float = 0.0):
        self.folder = folder
        self.slower_than = slower_than

    def logits(self, of: Callable[[], list[Any]], ask: Callable[[], Tensor]) -> Tensor:
        """The answer of ``ask``.

        Args:
            of: what it depends on beside the versions of torch and transformers: the model, the task, the rows; plain data.
            ask: called where nothing is kept.
        """
        if self.folder is None:
            return ask()
        content = [of(), torch.__version__, transformers.__version__]
        path = self.folder / f"{hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:32]}.safetensors"
        if path.is_file():
            return load_file(path)["logits"]
        began = time.monotonic()
        logits = ask()
        if time.monotonic() - began >= self.slower_than:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors({"logits": logits.contiguous()}, path)
        return logits


def fingerprint(model: PreTrainedModel) -> list[Any]:
    """A model in memory: its class, its config, and the hash of its tensors and their names."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _OF_FILES}
    return [type(model).__qualname__, config, tensors_sha256(model.state_dict().items())]
