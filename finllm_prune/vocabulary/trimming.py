"""A model and its tokenizer with the tokens that a corpus uses; proved equal on texts that use these alone."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.errors import InputError, ProofError
from finllm_prune.vocabulary.tokenizer import trim_tokenizer

TOLERANCE = 1e-5
_WITNESSES, _LENGTH, _BATCH = 32, 128, 8


@dataclass(frozen=True)
class Trim:
    """What decides on the tokens that stay, beside special tokens and single characters.

    Args:
        texts: of the data set: "train", or "all" splits (then nothing of it is held out).
        extra: a .txt (a text a line), .jsonl, .csv or .parquet file, or a folder of splits, with more texts.
        min_count: a token stays if it occurs this often in them.
    """

    texts: Literal["train", "all"] = "train"
    extra: str | None = None
    min_count: int = 1

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise InputError(
                f"vocabulary.min_count: a token that stays occurs at least once, not {self.min_count} times"
            )


@dataclass(frozen=True)
class Trimmed:
    """A smaller vocabulary, with what proves it.

    Args:
        tokenizer: the smaller one.
        old: the old id of each of its tokens.
        whole: how many tokens there were.
        bytes: of the model's weights, "before" and "after".
        texts: up to 32 texts of kept tokens alone.
        outputs: what the whole model gave for them.
    """

    tokenizer: PreTrainedTokenizerBase
    old: tuple[int, ...]
    whole: int
    bytes: dict[str, int]
    texts: list[str]
    outputs: list[Tensor]

    @property
    def share(self) -> float:
        """The part of the model's bytes that is left."""
        return self.bytes["after"] / self.bytes["before"]

    def prove(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ProofError where the outputs for the texts differ by more than 1e-5 (and the rounding of a float)."""
        for got, expected in zip(outputs(model, tokenizer, self.texts), self.outputs, strict=True):
            if expected.shape[-1] > got.shape[-1] == len(self.old):  # logits of tokens
                expected = expected[..., list(self.old)]
            rounding = torch.finfo(model.dtype).eps
            if got.shape != expected.shape or not torch.allclose(got, expected, atol=TOLERANCE, rtol=rounding):
                raise ProofError("the model with the trimmed vocabulary gives other logits; nothing was kept")


def trim(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], min_count: int = 1
) -> Trimmed:
    """Cut the model's embeddings (and tied head) in place to the tokens of these texts, and prove it on up to 32 of them.

    Raises:
        InputError: the tokenizer cannot be trimmed, or no text would be left as it is.
        ProofError: the smaller model gives other outputs.
    """
    counts = Counter(token for row in encode(tokenizer, texts) for token in row)
    used = {token for token, count in counts.items() if count >= min_count}
    smaller, old = trim_tokenizer(tokenizer, used | _fixed(model))
    rows = _table(model).num_embeddings
    if max(old) >= rows:
        raise InputError(f"vocabulary: the tokenizer knows {len(tokenizer)} tokens, the model {rows}; they do not fit")
    # A word that has no pieces may have some when a longer first piece is gone: nothing is promised of unknown tokens.
    kept = frozenset(old) - {tokenizer.unk_token_id}
    unchanged = (text for text, row in zip(texts, encode(tokenizer, texts), strict=True) if kept.issuperset(row))
    if not (witnesses := list(islice(unchanged, _WITNESSES))):
        raise InputError(
            "vocabulary.min_count: no text keeps all of its tokens, so nothing can be proved; lower min_count"
        )
    expected = list(outputs(model, tokenizer, witnesses))
    before = model.get_memory_footprint(return_buffers=False)
    _cut(model, old)
    sizes = {"before": before, "after": model.get_memory_footprint(return_buffers=False)}
    trimmed = Trimmed(smaller, old, len(tokenizer), sizes, witnesses, expected)
    trimmed.prove(model, smaller)
    return trimmed


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each text, whole and without special tokens."""
    for start in range(0, len(texts), 1000):
        some = list(texts[start : start + 1000])
        yield from tokenizer(some, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]


@torch.inference_mode()
def outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[Tensor]:
    """Logits, or hidden states where there is no head, in padded batches if the tokenizer can pad."""
    was_training = model.training
    model.eval()
    limit = min(_LENGTH, tokenizer.model_max_length)
    padding = tokenizer.pad_token is not None
    size = _BATCH if padding else 1
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        inputs = tokenizer(some, padding=padding, truncation=True, max_length=limit, return_tensors="pt").to(
            model.device
        )
        yield model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0].float().cpu()
    model.train(was_training)


def _fixed(model: PreTrainedModel) -> set[int]:
    """Ids that the configs name; and those up to the padding token's where positions are counted from it (RoBERTa)."""
    named = {token for config in _configs(model) for value in _ids(config).values() for token in value}
    padding = model.config.get_text_config().pad_token_id
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    others = [table for table in tables if table is not _table(model)]
    counted = padding is not None and any(table.padding_idx is not None for table in others)
    return named | set(range(padding + 1)) if counted else named


def _cut(model: PreTrainedModel, old: tuple[int, ...]) -> None:
    rows = torch.tensor(old, device=model.device)
    table, head = _table(model), model.get_output_embeddings()
    parts = [table.weight, *(() if head is None else (head.weight, head.bias))]
    with torch.no_grad():
        for part in {id(part): part for part in parts if part is not None}.values():
            part[: len(rows)] = part[rows]
    # It cuts off what lies behind, ties the head again, and tells the config.
    model.resize_token_embeddings(len(rows))
    new = {token: number for number, token in enumerate(old)}
    for config in _configs(model):
        for key, tokens in _ids(config).items():
            known = [new[token] for token in tokens if token in new]
            setattr(config, key, known if isinstance(getattr(config, key), list) else next(iter(known), None))
    table.padding_idx = model.config.get_text_config().pad_token_id


def _table(model: PreTrainedModel) -> nn.Embedding:
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig | GenerationConfig]:
    found: list[PreTrainedConfig | GenerationConfig] = [model.config, model.config.get_text_config()]
    if model.can_generate():
        found.append(model.generation_config)
    return list({id(config): config for config in found}.values())


def _ids(config: PreTrainedConfig | GenerationConfig) -> dict[str, list[int]]:
    """The keys of a config that name tokens by id."""
    named = {key: value for key, value in vars(config).items() if key.endswith("_token_id") and value is not None}
    return {key: value if isinstance(value, list) else [value] for key, value in named.items()}
