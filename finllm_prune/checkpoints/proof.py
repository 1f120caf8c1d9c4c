"""Every saved checkpoint is proved: when it is written, against the model in memory; later, from its files alone."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DataCollator, PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune import inference
from finllm_prune.checkpoints.formats import FORMATS, LOSSY, SERVED, find_format, serve
from finllm_prune.checkpoints.manifest import DELTA, MANIFEST, damaged, manifest_alone, read_manifest, write_manifest
from finllm_prune.errors import ProofError, one_line
from finllm_prune.families import auto_class, find_architecture
from finllm_prune.staging import staged

TOLERANCE = 1e-5
ROWS = 64
# Of 64 rows, so many may tip over on another processor.
AGREEMENT_SLACK = 2 / 64
_TOKENS = 64  # of the vocabulary, whose logits a proof looks at


def save_proved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, format_name: str, smaller: PreTrainedModel,
    write: Callable[[PreTrainedModel, Path], None] = PreTrainedModel.save_pretrained, more: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write ``smaller`` into ``folder``, reload it with ``from_pretrained``, and hold it against ``model``.

    Args:
        write: puts config and weights into a folder.
        more: what else the manifest records.

    Raises:
        ProofError: the logits differ from the model's in memory by more than ``tolerance_of`` allows, or zeros are missing;
            then no folder is left behind.
    """
    with staged(folder) as partial:
        write(smaller, partial)
        tokenizer.save_pretrained(partial)
        probe = probe_of(model)
        expected = logits_of(model, probe)
        reloaded, tolerance = read_model(partial), tolerance_of(expected, model.dtype)
        compare_logits(logits_of(reloaded, probe), expected, folder, tolerance)
        zeros = zero_counts(smaller)
        written = reloaded.state_dict()
        if any(not torch.equal(value.cpu(), written[name]) for name, value in smaller.state_dict().items()):
            raise ProofError(f"{folder}: the reloaded weights are not those of the saved model; nothing was kept")
        write_manifest(partial, format_name, zeros, probe, expected, tolerance, more)


def prove_rows(
    served: Callable[..., Any], model: PreTrainedModel, rows: datasets.Dataset, collator: DataCollator, folder: Path,
    source: str,
) -> None:  # fmt: skip
    """Hold what was made of a folder against the model in memory on the first 64 of these rows: real texts, as padded in use.

    What came of it lies in the manifest as "rows" afterwards. Of what is another model (``LOSSY``) it is measured alone.

    Args:
        source: where the rows come from, in words.

    Raises:
        ProofError: their logits differ by more than the manifest in the folder allows for its probe, or are no numbers.
    """
    manifest, few = manifest_alone(folder), rows.select(range(min(ROWS, len(rows))))
    expected, got = (inference.logits_of(each, few, collator) for each in (in_fp32(model), served))
    lossy = manifest["format"] in LOSSY
    compare_logits(got, expected, folder, float("inf") if lossy else float(manifest["probe"]["tolerance"]))
    measured = {"difference": float((got - expected).abs().max()), "agreement": agreement(got, expected)}
    told = manifest | {"rows": {"source": source, "count": len(few), **measured}}
    (folder / MANIFEST).write_text(json.dumps(told))


def verify(folder: Path) -> dict[str, Any]:
    """Prove a saved checkpoint again from its files alone: hashes, zeros, logits of the recorded probe.

    The hashes are of all that a loader reads, so shapes and dtypes need no record of their own.
    A delta has a model only beside its base: its hashes are proved here, the rest where it is applied.

    Returns:
        The manifest.

    Raises:
        InputError: the folder was not exported by finllm-prune, or a package is missing that its format needs.
        ProofError: a file, a zero or a logit is not what the manifest says, or a file lies there that it does not name.
    """
    manifest = read_manifest(folder)
    if manifest["format"] == "delta" and list(manifest["sha256"]) == [DELTA]:
        return manifest
    try:
        if manifest["format"] not in FORMATS:
            raise ValueError(f"no model has the format {manifest['format']!r}")
        zeros, format_name = dict(manifest["zeros"]), str(manifest["format"])
        tolerance, agreed = float(manifest["probe"]["tolerance"]), float(manifest.get("agreement", 0.0))
        ids, logits = (torch.tensor(manifest["probe"][key]) for key in ("input_ids", "logits"))
        inputs = {"input_ids": ids.long(), "attention_mask": torch.ones_like(ids.long())}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise damaged(folder, error) from error
    if format_name in SERVED:
        find_format(format_name)  # that a package is missing is no fault of the files
    try:
        model = serve(folder) if format_name in SERVED else read_model(folder)
        got = logits_of(model, inputs)
    except Exception as error:  # a damaged config or graph makes their libraries trip over anything
        raise ProofError(f"{folder}: its files cannot be loaded: {one_line(error)}; export it anew") from error
    if isinstance(model, PreTrainedModel) and zero_counts(model) != zeros:
        raise ProofError(f"{folder}: the weights have other zeros than the manifest says; export it anew")
    compare_logits(got, logits, folder, tolerance)
    if agreement(got, logits) < agreed - AGREEMENT_SLACK:
        raise ProofError(f"{folder}: it predicts other classes for the probe than when it was exported; export it anew")
    return manifest


def proved(manifest: dict[str, Any]) -> str:
    """What ``verify`` has proved, in words."""
    if manifest["format"] == "delta":
        return "delta holds: hashes; what it makes of its base is proved whenever it is applied."
    zeros = sum(manifest["zeros"].values())
    return f"{manifest['format']} checkpoint holds: hashes, {zeros:,} zeros, logits of the probe."


def zero_counts(model: PreTrainedModel) -> dict[str, int]:
    """Path -> number of exact zeros, for every prunable linear layer of the model."""
    linears = find_architecture(model.config.model_type).linears(model)
    return {path: int((linear.weight == 0).sum()) for path, linear in linears.items()}


def logit_difference(model: PreTrainedModel, other: PreTrainedModel) -> tuple[float, float]:
    """The largest difference between the logits of two models on the probe, and the largest of the first one's logits."""
    probe = probe_of(model)
    expected = logits_of(model, probe)
    return float((logits_of(other, probe) - expected).abs().max()), float(expected.abs().max())


def probe_of(model: PreTrainedModel, rows: int = 4, tokens: int = 16) -> dict[str, Tensor]:
    """Rows of token ids, the same on every machine; no text of anybody's data is in them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def logits_of(model: PreTrainedModel | Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """What a model, or what serves one in its place, makes of the inputs, as fp32 on the CPU, shape (rows, classes).

    Of a language model: (rows, tokens, some), evenly spaced over its vocabulary, as all of them would make a huge manifest.
    """
    if not isinstance(model, PreTrainedModel):
        served: Tensor = model(**inputs).logits
        return served
    was_training = model.training
    model.eval()
    logits: Tensor = model(**{key: value.to(model.device) for key, value in inputs.items()}).logits.float().cpu()
    model.train(was_training)
    return some_of(logits)


def in_fp32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy where its weights are of other precision: what a graph, which is fp32, is held against."""
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return model
    whole = copy.deepcopy(model)
    nn.Module.to(whole, dtype=torch.float32)
    whole.config.dtype = torch.float32
    return whole


def some_of(logits: Tensor) -> Tensor:
    """Of a classifier all; of a language model (rows, tokens, some), evenly spaced over its vocabulary."""
    return logits if logits.ndim == 2 else logits[..., :: -(-logits.shape[-1] // _TOKENS)]


def tolerance_of(logits: Tensor, dtype: torch.dtype) -> float:
    """How far two ways to add the same numbers up may lie apart: in half precision the steps between numbers are larger."""
    return max(TOLERANCE, 4 * torch.finfo(dtype).eps * float(logits.abs().max()))


def agreement(got: Tensor, expected: Tensor) -> float:
    """The part of the rows for which both logits name the same class."""
    return float((got.argmax(-1) == expected.argmax(-1)).float().mean())


def read_model(folder: Path) -> PreTrainedModel:
    """A finished model with its head, by transformers alone."""
    kind = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    model: PreTrainedModel = kind.from_pretrained(folder, trust_remote_code=False)
    return model


def compare_logits(got: Tensor, expected: Tensor, folder: Path, tolerance: float) -> None:
    """Raise ProofError where the logits of a folder are not those that are expected."""
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
    if not difference <= tolerance:
        raise ProofError(
            f"{folder}: its logits differ by {difference:.2g} from the model that was evaluated (allowed: {tolerance:.2g}); "
            "do not use it"
        )
