"""Models, configs and tokenizers from folders; what is damaged or missing is one sentence with the recipe's key."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GenericForSequenceClassification

from finllm_prune.errors import InputError, one_line
from finllm_prune.families import is_causal
from finllm_prune.tasks import Task

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_model(task: Task, location: str, labels: list[str]) -> PreTrainedModel:
    """A model with a head for these labels; the report on its fresh head is not a warning here."""
    try:
        with without_load_report():
            model: PreTrainedModel = task.auto_class.from_pretrained(
                location,
                **task.head_config(labels),
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers trips over a damaged file in many ways
        raise InputError(f"model: the weights of {location} cannot be loaded: {one_line(error)}") from error
    return model


@contextmanager
def without_load_report() -> Iterator[None]:
    """transformers lists missing and unexpected weights at length; whoever loads here knows them or looks at them itself."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def load_config(location: str, key: str = "model") -> PreTrainedConfig:
    """The config of a model; a damaged one is one sentence with the recipe's key."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # as above
        raise InputError(f"{key}: the config of {location} cannot be read: {one_line(error)}") from error
    return config


def load_tokenizer(location: str, key: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer of a model; where a folder has none, transformers would silently make one that knows no words."""
    if Path(location).is_dir() and not any((Path(location) / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(f"{key}: {location} holds no tokenizer; save the model's tokenizer into the same folder")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # as above
        raise InputError(f"{key}: the tokenizer of {location} cannot be read: {one_line(error)}") from error
    return tokenizer


def refuse_no_padding(location: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError where texts of several lengths make no batch."""
    # Encoders are told by the attention mask what is padding; these look for its token.
    seeks_padding = isinstance(model, GenericForSequenceClassification) and model.config.pad_token_id is None
    if seeks_padding or tokenizer.pad_token is None:
        raise InputError(
            f"model: {location} has no padding token, which batches need; set pad_token in its tokenizer and pad_token_id "
            "in its config (the end-of-text token will do) and save both"
        )


def tell_limit(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that reads less than was asked for, as that of an earlier run with shorter texts, is told."""
    if (max_length := getattr(task, "max_length", 0)) > tokenizer.model_max_length:
        logger.warning(
            "task.max_length: the model's tokenizer reads %d tokens at most, and %d were asked for; texts are cut there. Raise "
            "model_max_length in its tokenizer_config.json if the model reads more.", tokenizer.model_max_length, max_length,
        )  # fmt: skip


def refuse_too_long(model: PreTrainedModel, splits: Iterable[datasets.Dataset]) -> None:
    """Raise InputError where a tokenized row is longer than the positions that the model has learned."""
    learned = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    table = next((module for module in learned if isinstance(module, nn.Embedding)), None)
    if table is None:
        return
    # RoBERTa counts from behind the padding token's id.
    most = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    for rows in splits:
        for ids in rows["input_ids"]:
            longest = max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)
            if longest > most:
                raise InputError(
                    f"task.max_length: a text has {longest} tokens, and the model reads at most {most}; set max_length to "
                    f"{most} or less"
                )


class OtherLabels(InputError):
    """A model that was fine-tuned on other classes than the data has."""


def label_order(config: PreTrainedConfig, labels: list[str], must_match: str | None = None) -> list[str]:
    """The checkpoint's own order where it was trained on the same classes, as FinBERT's (positive, negative, neutral).

    Raises:
        OtherLabels: they are other classes, and ``must_match`` names a checkpoint that has to know them.
    """
    exact = class_names(config)
    if sorted(exact) == sorted(labels):
        return exact
    own = [name.lower() for name in exact]
    if len(labels) == 1 and (len(own) == 1 or is_causal(config)):
        return labels  # one output means the same whatever it is called
    by_name = {label.lower(): label for label in labels}
    if len(by_name) == len(labels) and sorted(own) == sorted(by_name):
        return [by_name[name] for name in own]
    if must_match is not None:
        raise OtherLabels(
            f"{must_match} predicts {', '.join(own)}, but the data has {', '.join(labels)}; "
            + (
                "list the model's classes in task.labels"
                if set(by_name) < set(own)
                else "name a model that was fine-tuned on these labels"
            )
        )
    return labels


def class_names(config: PreTrainedConfig) -> list[str]:
    """The class names of a checkpoint, by index."""
    names: dict[Any, str] = dict(config.id2label or {})
    return [str(names[i]) for i in sorted(names)]
