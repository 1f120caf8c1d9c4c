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
    starts = [_start(text, _CHARACTERS * limit) for text in texts]
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


def _both_ends(text: str, first: int, last: int, tokenizer: PreTrainedTokenizerBase) -> Ids:
    looked_at = _CHARACTERS * (first + last)
    if len(text) > 2 * looked_at:
        start, end = _encode([_start(text, looked_at), _end(text, looked_at)], tokenizer)
        if len(start) > first and len(end) > last + _MARGIN:
            return start[:first] + end[-last:]
    (ids,) = _encode([text], tokenizer)
    return ids if len(ids) <= first + last else ids[:first] + ids[-last:]


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Ids]:
    cut = {"truncation": False} if limit is None else {"truncation": True, "max_length": limit}
    ids: list[Ids] = tokenizer(list(texts), verbose=False, **cut)["input_ids"]
    return ids


def _start(text: str, length: int) -> str:
    """The first characters; cut before a white space, so that no word is cut in two."""
    if len(text) <= length:
        return text
    words = text[:length].rsplit(None, 1)
    return words[0] if len(words) == 2 else text


def _end(text: str, length: int) -> str:
    """The last characters, from a white space on."""
    end = text[-length:]
    words = end.split(None, 1)
    return end[len(end) - len(words[1]) - 1 :] if len(words) == 2 else text
