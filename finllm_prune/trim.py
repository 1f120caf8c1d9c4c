"""A finished model with a smaller vocabulary: read, trimmed, proved again from its files, whole or not at all."""

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from finllm_prune.checkpoints import find_format
from finllm_prune.checkpoints.manifest import MANIFEST, read_manifest
from finllm_prune.checkpoints.quantizer import widths
from finllm_prune.errors import InputError, one_line
from finllm_prune.families import is_causal
from finllm_prune.hub.base_model import locate
from finllm_prune.loading import load_config, load_tokenizer
from finllm_prune.staging import staged
from finllm_prune.tasks import read_texts
from finllm_prune.vocabulary import Change, Trimmed, held_out, trim


def trim_saved(
    name: str, folder: Path, texts: str, unseen: str | None, min_count: int, column: str, overwrite: bool
) -> tuple[Trimmed, Change | None]:
    """Write a model with the tokens of some texts into a folder, in the format that it has, with a manifest for ``verify``.

    A model without a manifest becomes "masked", or "ragged" if its blocks have several widths. Not covered: a manifest for
    what is neither classifier nor language model, as an encoder without a head, for nothing that is proved has no logits.

    Args:
        name: a saved model or Hub id.
        texts: a file, or a folder of splits, of which the train split counts.
        unseen: the same, with validation and test splits; None measures nothing.
        column: of the text, in files that have columns.

    Returns:
        The trimmed vocabulary, and what it changes in the unseen texts.

    Raises:
        InputError: something cannot be read or trimmed, or the folder exists.
        ProofError: the model is not what its manifest says, or what was written gives other outputs; then no folder is left
            behind.
    """
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists; use --overwrite to replace it, or name another folder")
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{folder} exists and holds no model, so it is left alone; name another folder")
    used = read_texts(texts, "--texts", ("train",), column)
    others = read_texts(unseen, "--held-out", ("validation", "test"), column) if unseen else None
    location, _ = locate(name)
    format_name = _format(Path(location))
    config = load_config(location)
    tokenizer = load_tokenizer(location)
    model = _load(location, config)
    trimmed = trim(model, tokenizer, used, min_count)
    with staged(folder) as partial:
        if _has_logits(config):
            format_name = format_name or ("ragged" if widths(model) else "masked")
            find_format(format_name)(model, trimmed.tokenizer, partial)
        else:
            model.save_pretrained(partial)
            trimmed.tokenizer.save_pretrained(partial)
        trimmed.prove(_load(str(partial), config), load_tokenizer(str(partial)))
    return trimmed, None if others is None else held_out(tokenizer, trimmed, others)


def _format(folder: Path) -> str | None:
    """Of a folder that was exported, whose files are hashed again."""
    return str(read_manifest(folder)["format"]) if (folder / MANIFEST).is_file() else None


def _has_logits(config: PreTrainedConfig) -> bool:
    """Whether ``verify`` could read the model with its head."""
    return is_causal(config) or any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _load(location: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model as the class that saved it: a trimmed language model stays one."""
    name = str((config.architectures or ["AutoModel"])[0])
    try:
        found: Any = transformers.AutoModel if name == "AutoModel" else getattr(transformers, name)
        if name != "AutoModel" and not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            raise ValueError("transformers has no such model")
        model: PreTrainedModel = found.from_pretrained(location, dtype="auto", trust_remote_code=False)
    except (AttributeError, OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"{location}: {name} cannot be loaded: {one_line(error)}") from error
    if model.config.is_encoder_decoder:
        raise InputError(f"{location}: models with an encoder and a decoder cannot be trimmed; name one without")
    return model
