"""A tokenizer with fewer tokens: its JSON in, its JSON out; ids are packed in their old order."""

import json
from collections.abc import Set
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.vocabulary.kinds import KINDS, Data, Kind

_FRAME: tuple[str, ...] = ("sep", "cls")  # of BertProcessing and RobertaProcessing: a token and its id


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, used: Set[int]
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """A tokenizer of the same class that knows the tokens of these ids and what they need.

    Returns:
        The tokenizer, and the old id of each of its tokens.

    Raises:
        InputError: it is no fast tokenizer, of a kind that cannot be trimmed, or does not come back as it was written.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"vocabulary: {type(tokenizer).__name__} has no fast form, whose vocabulary could be trimmed; keep it whole"
        )
    data, old = trim_json(json.loads(tokenizer.backend_tokenizer.to_str()), used)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        smaller: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    smaller.name_or_path = tokenizer.name_or_path
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if smaller.get_vocab() != {names[number]: i for i, number in enumerate(old)}:
        raise InputError(
            f"vocabulary: {type(tokenizer).__name__} makes other ids of a trimmed tokenizer.json; keep its vocabulary whole"
        )
    return smaller, old


def trim_json(data: Data, used: Set[int]) -> tuple[Data, tuple[int, ...]]:
    """The JSON of a tokenizer (``tokenizers.Tokenizer.to_str``) with the tokens of these ids and what they need.

    Added and special tokens stay, with new ids wherever an id is written.

    Returns:
        The JSON, and the old id of each new one.

    Raises:
        InputError: the kind of tokenizer cannot be trimmed.
    """
    kind = _kind(data)
    whole = kind.ids()
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    wanted = {token for token, number in whole.items() if number in used} | added.keys() | _named(data)
    kept = (wanted | kind.needed(wanted)) & whole.keys()
    # tokenizers numbers what its model does not know behind what it knows.
    order = [*sorted(kept, key=whole.__getitem__), *sorted(added.keys() - whole.keys(), key=added.__getitem__)]
    ids = {token: number for number, token in enumerate(order)}
    smaller = data | {
        "model": kind.only({token: ids[token] for token in order if token in whole}),
        "added_tokens": sorted(
            (token | {"id": ids[token["content"]]} for token in data["added_tokens"]), key=lambda token: token["id"]
        ),
        "post_processor": _processor(data["post_processor"], ids),
    }
    if data["padding"] is not None:
        smaller["padding"] = data["padding"] | {"pad_id": ids[data["padding"]["pad_token"]]}
    numbers = added | whole
    return smaller, tuple(numbers[token] for token in order)


def _kind(data: Data) -> Kind:
    name = data["model"]["type"]
    if name not in KINDS:
        raise InputError(
            f"vocabulary: a {name} tokenizer has no smaller pieces for a word that it does not keep; keep its vocabulary whole"
        )
    return KINDS[name](data["model"])


def _named(data: Data) -> set[str]:
    """The tokens that the other parts of the JSON name."""
    named = {data["model"].get("unk_token"), (data["padding"] or {}).get("pad_token")}
    return {token for token in (*named, *_processor_tokens(data["post_processor"])) if token is not None}


def _processor_tokens(processor: Data | None) -> list[str]:
    if processor is None:
        return []
    named = [processor[key][0] for key in _FRAME if key in processor]
    named += [token for entry in processor.get("special_tokens", {}).values() for token in entry["tokens"]]
    return named + [token for part in processor.get("processors", []) for token in _processor_tokens(part)]


def _processor(processor: Data | None, ids: dict[str, int]) -> Any:
    """A post processor with new ids: BertProcessing and RobertaProcessing, TemplateProcessing, Sequence."""
    if processor is None:
        return None
    changed: dict[str, Any] = {key: [processor[key][0], ids[processor[key][0]]] for key in _FRAME if key in processor}
    if "special_tokens" in processor:
        changed["special_tokens"] = {
            name: entry | {"ids": [ids[token] for token in entry["tokens"]]}
            for name, entry in processor["special_tokens"].items()
        }
    if "processors" in processor:
        changed["processors"] = [_processor(part, ids) for part in processor["processors"]]
    return processor | changed
