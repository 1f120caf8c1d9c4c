"""The tokens at the ends of long texts, without those between: a filing of a megabyte costs what its kept part costs."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_CHARACTERS = 8  # that are looked at for each token; most texts have four to six
_MARGIN = 16  # tokens of a first word that was taken out of its text

Ids = list[int]


def first_tokens(texts: Sequence[str], limit: int, tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """The first ``limit`` tokens of each text, special ones included, as the tokenizer cuts the whole text."""
    if tokenizer.truncation_side != "right":
        return _encode(texts, tokenizer, limit)
    starts = [start_of(text, limit) for text in texts]
    found = _encode(starts, tokenizer, limit)
    # Few tokens of many characters: white space, or a word without end.
    short = [i for i, ids in enumerate(found) if len(ids) < limit and len(starts[i]) < len(texts[i])]
    for i in short:
        found[i] = _encode([texts[i]], tokenizer, limit)[0]
    return found


def both_ends(texts: Sequence[str], limit: int, head: float, tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """The first and the last tokens, together ``limit``; ``head`` is the part of them that comes from the beginning.

    The special tokens at both ends stay where the model looks for them.
    """
    first = min(max(1, round(head * limit)), limit - 1)
    return [_both_ends(text, first, limit - first, tokenizer) for text in texts]


def columns_of(ids: list[Ids]) -> dict[str, list[Ids]]:
    """What a model takes of single texts, none of them padded."""
    return {"input_ids": ids, "attention_mask": [[1] * len(own) for own in ids]}


def _both_ends(text: str, first: int, last: int, tokenizer: PreTrainedTokenizerBase) -> Ids:
    if len(text) > 2 * _CHARACTERS * (first + last):
        start, end = _encode([start_of(text, first + last), _end_of(text, first + last)], tokenizer)
        if len(start) > first and len(end) > last + _MARGIN:
            return start[:first] + end[-last:]
    (ids,) = _encode([text], tokenizer)
    return ids if len(ids) <= first + last else ids[:first] + ids[-last:]


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Ids]:
    cut = {"truncation": False} if limit is None else {"truncation": True, "max_length": limit}
    ids: list[Ids] = tokenizer(list(texts), verbose=False, **cut)["input_ids"]
    return ids


def start_of(text: str, tokens: int) -> str:
    """Characters that mostly hold so many tokens, cut before a white space, so that no word is cut in two."""
    length = _CHARACTERS * tokens
    if len(text) <= length:
        return text
    words = text[:length].rsplit(None, 1)
    return words[0] if len(words) == 2 else text


def _end_of(text: str, tokens: int) -> str:
    """The same of the last tokens, from a white space on."""
    end = text[-_CHARACTERS * tokens :]
    words = end.split(None, 1)
    return end[len(end) - len(words[1]) - 1 :] if len(words) == 2 else text
