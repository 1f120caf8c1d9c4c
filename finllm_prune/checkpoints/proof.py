"""Every saved checkpoint is proved: when it is written, against the model in memory; later, from its files alone."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

import finllm_prune
from finllm_prune.errors import InputError, ProofError
from finllm_prune.families import find_architecture
from finllm_prune.staging import staged

MANIFEST = "finllm_prune.json"
TOLERANCE = 1e-5


def save_proved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, format_name: str, smaller: PreTrainedModel,
    write: Callable[[PreTrainedModel, Path], None] = PreTrainedModel.save_pretrained, more: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write ``smaller`` into ``folder``, reload it with ``from_pretrained``, and hold it against ``model``.

    Args:
        write: puts config and weights into a folder.
        more: what else the manifest records.

    Raises:
        ProofError: the logits differ from the model's in memory by more than 1e-5, or zeros are missing; then no folder
            is left behind.
    """
    with staged(folder) as partial:
        write(smaller, partial)
        tokenizer.save_pretrained(partial)
        probe = _probe(model)
        expected = _logits(model, probe)
        reloaded = _load(partial)
        _compare(_logits(reloaded, probe), expected, folder)
        zeros = zero_counts(smaller)
        written = reloaded.state_dict()
        if any(not torch.equal(value.cpu(), written[name]) for name, value in smaller.state_dict().items()):
            raise ProofError(f"{folder}: the reloaded weights are not those of the saved model; nothing was kept")
        manifest = {
            "format": format_name,
            "format_version": 1,
            "versions": {"finllm_prune": finllm_prune.__version__, "transformers": transformers.__version__},
            "zeros": zeros,
            "sha256": {path.name: sha256(path) for path in sorted(partial.iterdir()) if path.is_file()},
            "probe": {"input_ids": probe["input_ids"].tolist(), "logits": expected.tolist(), "tolerance": TOLERANCE},
            **(more or {}),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest))


def verify(folder: Path) -> dict[str, Any]:
    """Prove a saved checkpoint again from its files alone: hashes, zeros, logits of the recorded probe.

    Returns:
        The manifest.

    Raises:
        ProofError: a file, a zero or a logit is not what the manifest says.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        hashes, zeros, _ = dict(manifest["sha256"]), dict(manifest["zeros"]), manifest["format"]
        ids, logits = (torch.tensor(manifest["probe"][key]) for key in ("input_ids", "logits"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} holds no {MANIFEST}: it is not a checkpoint that finllm-prune exported") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ProofError(f"{folder / MANIFEST} is damaged ({error}); export the checkpoint anew") from error
    for name, expected in hashes.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise ProofError(f"{folder / name} is missing or is not the file that was proved; export it anew")
    model = _load(folder)
    if zero_counts(model) != zeros:
        raise ProofError(f"{folder}: the weights have other zeros than the manifest says; export it anew")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _compare(_logits(model, inputs), logits, folder)
    return manifest


def zero_counts(model: PreTrainedModel) -> dict[str, int]:
    """Path -> number of exact zeros, for every prunable linear layer of the model."""
    linears = find_architecture(model.config.model_type).linears(model)
    return {path: int((linear.weight == 0).sum()) for path, linear in linears.items()}


def logit_difference(model: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
    """The largest difference between the logits of two models on the probe, and the largest of the first one's logits."""
    probe = _probe(model)
    expected = _logits(model, probe)
    return float((_logits(other, probe) - expected).abs().max()), float(expected.abs().max())


def sha256(path: Path) -> str:
    """The hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _probe(model: PreTrainedModel) -> dict[str, Tensor]:
    """Four rows of token ids, the same on every machine; no text of anybody's data is in them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (4, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    was_training = model.training
    model.eval()
    logits: Tensor = model(**{key: value.to(model.device) for key, value in inputs.items()}).logits.float().cpu()
    model.train(was_training)
    return logits


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder)
    return model


def _compare(got: Tensor, expected: Tensor, folder: Path) -> None:
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
    if not difference <= TOLERANCE:
        raise ProofError(
            f"{folder}: its logits differ by {difference:.2g} from the model that was evaluated (allowed: {TOLERANCE}); "
            "do not use it"
        )
