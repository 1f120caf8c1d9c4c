"""The kinds of tokenizers: what each needs beside the tokens that are used, so that these come out as before.

A kind is made from the ``model`` part of a tokenizer's JSON. Each keeps all entries of one character (or byte), so that
whatever could be encoded still can be, only in more pieces.
"""

import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Protocol

Data = dict[str, Any]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Kind(Protocol):
    """A kind of tokenizer, over the ``model`` part of its JSON."""

    def ids(self) -> dict[str, int]:
        """Token -> id, without the added tokens."""
        ...

    def needed(self, used: Set[str]) -> set[str]:
        """The entries without which a used token would not come out, or a text could not be encoded."""
        ...

    def only(self, ids: dict[str, int]) -> Data:
        """The part of the JSON with these entries and ids alone."""
        ...


@dataclass(frozen=True)
class WordPiece:
    """The longest entry first (BERT, DistilBERT, ELECTRA): an entry that is the longest of all is so among fewer."""

    model: Data

    def ids(self) -> dict[str, int]:
        return dict(self.model["vocab"])

    def needed(self, used: Set[str]) -> set[str]:
        return _indivisible(self.model["vocab"], self._characters)

    def only(self, ids: dict[str, int]) -> Data:
        return self.model | {"vocab": ids}

    def _characters(self, token: str) -> list[str]:
        prefix: str = self.model["continuing_subword_prefix"]
        start = prefix if token.startswith(prefix) and token != prefix else ""
        first, *others = list(token.removeprefix(start))
        return [start + first, *(prefix + character for character in others)]


@dataclass(frozen=True)
class BytePair:
    """Merges in order (RoBERTa, ModernBERT, Llama, Qwen, Gemma): all parts of a used token stay, and theirs.

    A merge stays where both parts and the result stay. In a text of used tokens these are all merges that were carried out,
    and they have the same order.
    """

    model: Data

    def ids(self) -> dict[str, int]:
        return dict(self.model["vocab"])

    def needed(self, used: Set[str]) -> set[str]:
        parts: dict[str, list[str]] = {}
        for left, right in self.model["merges"]:
            parts.setdefault(self._merged(left, right), []).extend((left, right))
        # What no merge makes is where every text begins: single characters and bytes.
        waiting = [token for token in self.model["vocab"] if token not in parts or token in used]
        kept: set[str] = set()
        while waiting:
            token = waiting.pop()
            if token not in kept:
                kept.add(token)
                waiting += parts.get(token, [])
        return kept

    def only(self, ids: dict[str, int]) -> Data:
        pairs = self.model["merges"]
        merges = [pair for pair in pairs if ids.keys() >= {*pair, self._merged(*pair)}]
        return self.model | {"vocab": ids, "merges": merges}

    def _merged(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.model["continuing_subword_prefix"] or "")


@dataclass(frozen=True)
class Unigram:
    """The most likely pieces (XLM-R, DeBERTa-v3, ALBERT): what is most likely of all is so among fewer."""

    model: Data

    def ids(self) -> dict[str, int]:
        return {token: i for i, (token, _) in enumerate(self.model["vocab"])}

    def needed(self, used: Set[str]) -> set[str]:
        vocab = self.model["vocab"]
        # An unknown character costs as much as the least likely piece and a constant more.
        rarest = min(vocab, key=lambda entry: entry[1])[0]
        # transformers' own classes expect the unknown token at its place.
        first = [token for token, _ in vocab[: (self.model["unk_id"] or 0) + 1]]
        return _indivisible(self.ids(), list) | {rarest, *first}

    def only(self, ids: dict[str, int]) -> Data:
        vocab, unknown = self.model["vocab"], self.model["unk_id"]
        number = None if unknown is None else ids[vocab[unknown][0]]
        return self.model | {"vocab": [entry for entry in vocab if entry[0] in ids], "unk_id": number}


def _indivisible(vocab: dict[str, int], characters: Callable[[str], list[str]]) -> set[str]:
    """Entries of one character or byte, and those with a character that has no entry of its own."""
    return {
        token
        for token in vocab
        if token and (len(parts := characters(token)) == 1 or _BYTE.fullmatch(token) or not vocab.keys() >= set(parts))
    }


KINDS: dict[str, Callable[[Data], Kind]] = {"WordPiece": WordPiece, "BPE": BytePair, "Unigram": Unigram}
