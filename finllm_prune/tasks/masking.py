"""Words that a model is not to learn: names of companies, tickers, figures."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets

from finllm_prune.errors import InputError
from finllm_prune.tasks.batchwise import Batch, rewritten

_TOKEN = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
LEGAL_FORMS = (
    r"Inc|Incorporated|Corp|Corporation|Co|Company|Ltd|Limited|plc|P\.?L\.?C|L\.?L\.?C|L\.?L\.?P|L\.?P|AG|SE|SA|S\.A|ASA|AB|A/S|Oyj|Oy|"
    r"N\.?V|B\.?V|SpA|S\.p\.A|GmbH|KGaA|KK|Pty"
)
FUNCTION_WORDS = (
    "The|A|An|In|At|Of|For|And|But|As|On|By|With|From|Its|Our|Shares|Was|Is|Are|Were|Did|Does|Has|Will|Can|Should|How|Why|What|When|"
    "Which|Who"
)
_LEGAL_FORM = re.compile(rf"(?:,?\s+(?:(?:&|and)\s+)?(?:{LEGAL_FORMS})\.?)+$", re.IGNORECASE)
_NO_NAME = re.compile(rf"(?:\W|\b(?:{FUNCTION_WORDS})\b)*", re.IGNORECASE)
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Mask:
    """Names are replaced by one word, so that a model cannot learn what became of whom.

    A name counts as written, without its legal form ("Apple Inc." as "Apple" too), and in capitals, at whole words only
    ("Apple" in "Apple's" and in "APPLE", not in "apple" or "Applebee"), whatever white space lies between its words and
    whichever apostrophe it has; of two names at one place the longer one goes. All names go from all texts. What is known
    neither from the column nor from the list stays, as a ticker that is not listed does. Texts in use are to be masked in the
    same way: ``finllm_prune.saved.ask`` does it.

    Args:
        column: holds the name of each row's company, or a list of names.
        names: a file with a name or ticker a line.
        word: what stands in their place.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    column: str | None = None
    names: str | None = None
    word: str = "COMPANY"

    def __post_init__(self) -> None:
        if self.column is None and self.names is None:
            raise InputError("task.mask: name a column of names, or a file with a name a line as names")
        if not self.word.strip():
            raise InputError("task.mask.word: a name is replaced by a word, not by nothing")

    def masker(self, names: Iterable[str]) -> "Masker":
        """Of the listed names and of ``names``, each also without its legal form where a name is left."""
        whole = [*self.listed(), *names]
        short = [_LEGAL_FORM.sub("", name.strip()) for name in whole]
        return Masker([*whole, *(name for name in short if not _NO_NAME.fullmatch(name))], self.word)

    def masker_of(self, cells: Iterable[Any]) -> "Masker":
        """Of the listed names and of those in the cells of ``column``; raises InputError where it is asked for and has none."""
        names = [name for name in texts_in(cells) if name.strip()]
        if self.column is not None and not names:
            raise InputError(
                f"task.mask.column: no row holds a name as text in column '{self.column}'; name a column of names, or a file "
                "with a name a line as task.mask.names"
            )
        return self.masker(names)

    def listed(self) -> list[str]:
        """The names of the file."""
        return [] if self.names is None else listed_names(self.names, "task.mask.names")


class Masker:
    """Replaces names; the time does not depend on how many there are.

    Args:
        names: whole names; empty ones are passed over.
        word: what stands in their place.
    """

    def __init__(self, names: Iterable[str], word: str):
        self.word = word
        self.by_first: dict[str, list[str]] = {}
        plain = {one_spelling(name) for name in names} - {""}
        for name in sorted(plain | {name.upper() for name in plain}, key=lambda name: (-len(name), name)):
            first = _TOKEN.match(name)
            assert first is not None
            self.by_first.setdefault(first[0], []).append(name)

    def __call__(self, text: str, other: Callable[[str], str] | None = None) -> str:
        """The text without the names; ``other`` gives what is to stand in the place of each instead of the word."""
        parts, end = [], 0
        straight = _straight(text)
        for token in _TOKEN.finditer(straight):
            if token.start() < end:
                continue
            for name in self.by_first.get(token[0], ()):
                if (after := _end(name, straight, token.start())) is not None:
                    parts += [text[end : token.start()], self.word if other is None else other(name)]
                    end = after
                    break
        return "".join([*parts, text[end:]])


def one_spelling(text: str) -> str:
    """With single spaces for white space and straight apostrophes, as names are compared."""
    return " ".join(_straight(text).split())


def texts_in(cells: Iterable[Any]) -> Iterator[str]:
    """The texts of a column, of which a cell holds one, a list of them, or none."""
    for cell in cells:
        if isinstance(cell, str):
            yield cell
        elif isinstance(cell, list):
            yield from texts_in(cell)


def listed_names(path: str, key: str) -> list[str]:
    """The lines of a file that a recipe names under ``key``; raises InputError where it cannot be read or holds no name."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: {path} is no readable UTF-8 file with a name a line") from error
    if not names:
        raise InputError(f"{key}: {path} holds no name; write one a line")
    return names


def normalise_numbers(text: str) -> str:
    """Each number as 0: ``12.5 %`` and ``1,250`` become ``0 %`` and ``0``."""
    return _NUMBER.sub("0", text)


def _straight(text: str) -> str:
    return text.replace("\u2019", "'")


def _end(name: str, text: str, start: int) -> int | None:
    """Where the whole name that stands there ends, its last word not going on; None where it does not stand there."""
    end = start
    for word in name.split():
        if end > start:
            if (space := _SPACE.match(text, end)) is None:
                return None
            end = space.end()
        if not text.startswith(word, end):
            return None
        end += len(word)
    goes_on = end < len(text) and re.match(r"\w", text[end]) and re.match(r"\w", name[-1])
    return None if goes_on else end


def without_names(
    splits: dict[str, datasets.Dataset], masker: Masker | None, numbers: bool
) -> tuple[dict[str, datasets.Dataset], dict[str, int]]:
    """All texts without names and, if asked, without ``numbers``; and split -> rows in which there was a name."""
    counts = dict.fromkeys(splits, 0)

    def change(split: str, batch: Batch) -> Batch:
        texts = {name: batch[name] for name in ("text", "pair") if name in batch}
        if masker is not None:
            masked = {name: [masker(text) for text in column] for name, column in texts.items()}
            pairs = zip(zip(*texts.values(), strict=True), zip(*masked.values(), strict=True), strict=True)
            counts[split] += sum(before != after for before, after in pairs)
            texts = masked
        if numbers:
            texts = {name: [normalise_numbers(text) for text in column] for name, column in texts.items()}
        return batch | texts

    def of(split: str) -> Callable[[Batch, Sequence[int]], Batch]:
        return lambda batch, _: change(split, batch)

    return {name: rewritten(rows, of(name), rows.features) for name, rows in splits.items()}, counts
