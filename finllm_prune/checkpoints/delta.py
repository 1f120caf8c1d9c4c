"""delta: what one task changes in a dense base model, beside which many tasks lie: bitmasks, and values where they differ.

One base in memory becomes each of its tasks in turn, bit for bit the model that the delta was made of::

    model = AutoModelForSequenceClassification.from_pretrained("base")
    task = delta.apply(model, "deltas/sentiment")
    task.remove()  # the base again
    task = delta.apply(model, "deltas/esg")

Of each tensor there lies: nothing, where it is the base's; a bitmask of zeros, where all that is kept is the base's (score
movement gives exactly that, https://arxiv.org/abs/2210.06210: 1/32 of an fp32 matrix); otherwise bitmasks and values. The
head lies there whole, so tasks may have other classes. Not covered: smaller models (``compact``), whose shapes are not the
base's; a tokenizer, for the base's own is that of every task.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import finllm_prune
from finllm_prune.checkpoints import bitmask
from finllm_prune.checkpoints.manifest import (
    DELTA,
    FORMAT_VERSION,
    MANIFEST,
    damaged,
    read_manifest,
    sha256,
    tensors_sha256,
)
from finllm_prune.errors import InputError, ProofError, one_line
from finllm_prune.staging import staged

WEIGHTS = DELTA
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Parts = dict[str, Tensor]
"""What is stored of a tensor: "zeros" and "changed" are bitmasks; "values" go where "changed" says, or where no zeros do."""


def write(base: PreTrainedModel, model: PreTrainedModel, folder: Path) -> dict[str, int]:
    """Write what turns ``base`` into ``model``, and prove that it does.

    Returns:
        How many tensors are the base's ("equal"), differ by zeros alone ("zeros"), or have values of their own ("values").

    Raises:
        InputError: the two are not of one architecture and shape.
        ProofError: the files do not give the model; then no folder is left behind.
    """
    _refuse_unlike(base, model)
    ours, head = base.state_dict(), head_names(model)
    stored: dict[str, Tensor] = {}
    counts, seen = {"equal": 0, "zeros": 0, "values": 0}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue  # a head that is tied to the embeddings, as in the base
        seen.add(tensor.data_ptr())
        parts = {"values": tensor} if name in head else _difference(ours[name].cpu(), tensor.cpu())
        counts["values" if "values" in parts else "zeros" if parts else "equal"] += 1
        stored |= {f"{name}.{kind}": part.cpu().contiguous() for kind, part in parts.items()}
    with staged(folder) as partial:
        save_file(stored, partial / WEIGHTS, metadata={"format": "pt"})
        manifest = {
            "format": "delta",
            "format_version": FORMAT_VERSION,
            "versions": {"finllm_prune": finllm_prune.__version__, "transformers": transformers.__version__},
            "base": {"model_type": base.config.model_type, "sha256": base_sha256(base)},
            "model": {"sha256": tensors_sha256(model.state_dict().items()), "labels": _labels(model)},
            "tensors": counts,
            "sha256": {WEIGHTS: sha256(partial / WEIGHTS)},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest))
        apply(copy.deepcopy(base), partial)
    return counts


@dataclass
class Applied:
    """A model that is its base with a delta.

    Args:
        model: the one that was given, changed in place.
        replaced: name, where the delta changed that tensor (None: everywhere), and what was there, in the order of change.
        labels: the base's own.
    """

    model: PreTrainedModel
    replaced: list[tuple[str, Tensor | None, Tensor]]
    labels: list[str]

    def remove(self) -> None:
        """Give the base back, to the bit; a second call changes nothing."""
        while self.replaced:
            _put(self.model, *self.replaced.pop())
            _set_labels(self.model, self.labels)


def apply(model: PreTrainedModel, folder: str | Path) -> Applied:
    """Turn a base model in memory, on any device, into the model of a delta.

    Raises:
        InputError: the folder holds no delta, or the model is not the base that it was made from.
        ProofError: the files are damaged, or the result is not the model that the delta was made of; then the model is the
            base again.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest["format"] != "delta":
        raise InputError(f"{folder} holds a {manifest['format']} checkpoint and no delta; load it with from_pretrained")
    try:
        wanted, made = {key: str(manifest["base"][key]) for key in ("model_type", "sha256")}, dict(manifest["model"])
        labels = [str(name) for name in made["labels"]]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error
    if base_sha256(model) != wanted["sha256"]:
        raise InputError(
            f"{folder}: the model in memory is not this delta's base, a {wanted['model_type']} model with the sha256 "
            f"{wanted['sha256'][:12]}…; load that base with the dtype of its files, and remove another delta first"
        )
    applied = Applied(model, [], _labels(model))
    try:
        state = model.state_dict()
        for name, parts in _read(folder / WEIGHTS).items():
            for where, values in _changes(parts, state[name].shape):
                applied.replaced.append((name, where, _put(model, name, where, values)))
        _set_labels(model, labels)
        if tensors_sha256(model.state_dict().items()) != made.get("sha256"):
            raise ValueError("the result is not the model that it was made of")
    except (ValueError, KeyError, IndexError, RuntimeError, TypeError, SafetensorError) as error:
        applied.remove()
        raise ProofError(f"{folder / WEIGHTS} cannot be applied: {one_line(error)}; make the delta anew") from error
    return applied


def base_sha256(model: PreTrainedModel) -> str:
    """What identifies a base: the hash of all its tensors but the head's, which each task has of its own."""
    head = head_names(model)
    return tensors_sha256((name, tensor) for name, tensor in model.state_dict().items() if name not in head)


def _difference(base: Tensor, model: Tensor) -> Parts:
    """What is to be stored of a tensor, in the fewest bytes. Compared are bits: -0.0 is another value than 0.0."""
    bits = model.view(_WORDS[model.element_size()])
    differs = bits != base.view(bits.dtype)
    zeros = differs & (bits == 0)
    changed = differs & ~zeros
    if not bool(changed.any()):
        return {"zeros": bitmask.pack(zeros)} if bool(zeros.any()) else {}
    choices: list[Parts] = [
        {"values": model},
        {"values": model[differs], "changed": bitmask.pack(differs)},
        {"values": model[~zeros], "zeros": bitmask.pack(zeros)},
        {"values": model[changed], "changed": bitmask.pack(changed), "zeros": bitmask.pack(zeros)},
    ]
    return min(choices, key=lambda parts: sum(part.nbytes for part in parts.values()))


def _changes(parts: Parts, shape: torch.Size) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Where (None: everywhere) which values go."""
    where = None
    if "zeros" in parts:
        zeros = bitmask.unpack(parts["zeros"], shape)
        yield zeros, torch.zeros(())
        where = ~zeros
    if "values" in parts:
        yield bitmask.unpack(parts["changed"], shape) if "changed" in parts else where, parts["values"]


def _put(model: PreTrainedModel, name: str, where: Tensor | None, values: Tensor) -> Tensor:
    """Change a parameter or buffer in place; returns what was there. Whole ones may take another shape: a head's classes."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, kind)
    before: Tensor = tensor.data
    values = values.to(device=before.device, dtype=before.dtype)
    if where is not None:
        where = where.to(before.device)
        replaced = before[where]
        before[where] = values
        return replaced
    if values.ndim != before.ndim:  # said before anything is changed
        raise ValueError(f"{name} has {before.ndim} axes, not {values.ndim}")
    tensor.data, tensor.grad = values, None
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    return before


def _read(path: Path) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for key, tensor in load_file(path).items():
        name, _, kind = key.rpartition(".")
        found.setdefault(name, {})[kind] = tensor
    return found


def head_names(model: PreTrainedModel) -> set[str]:
    """The names of the tensors outside the base model."""
    inside = f"{model.base_model_prefix}."
    return set() if model.base_model is model else {name for name in model.state_dict() if not name.startswith(inside)}


def _labels(model: PreTrainedModel) -> list[str]:
    names: dict[Any, str] = dict(model.config.id2label or {})
    return [names[number] for number in sorted(names)]


def _set_labels(model: Any, labels: list[str]) -> None:
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: number for number, name in enumerate(labels)}
    model.num_labels = len(labels)


def _refuse_unlike(base: PreTrainedModel, model: PreTrainedModel) -> None:
    head = head_names(model)
    ours, theirs = (
        {name: None if name in head else (tuple(t.shape), t.dtype) for name, t in each.state_dict().items()}
        for each in (base, model)
    )
    if ours != theirs:
        unlike = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name, 0) != theirs.get(name, 0))
        raise InputError(
            f"delta: the model's tensors are not the base's in name, shape and dtype ({unlike[0]} and {len(unlike) - 1} more); "
            "name the masked folder of a model that was pruned from this base"
        )
