"""Small changes of texts: whom do they change the mind of? Each is the same for a text (and its pairs) and a seed."""

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import datasets

from finllm_prune.settings import named
from finllm_prune.tasks import KEPT
from finllm_prune.tasks.masking import LEGAL_FORMS, Masker, listed_names

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_NUMBER = re.compile(
    rf"""(?<![\w.,-]) \d+(?:[.,]\d+)*      # no part of a name, as in Q3
    (?! [.,]?\d | \s{_MONTH}\b             # no day
      | -?(?!(?:[mkb]|mn|bn|tn|pp|bps?)\b)[A-Za-z] )  # not 10-K, but 5bn""",
    re.VERBOSE,
)
_DAY = re.compile(rf"{_MONTH}\.?\s$")
_YEAR = re.compile(r"(?:19|20)\d\d")
_AUXILIARY = re.compile(
    r"\b(is|are|was|were|has|have|had|will|would|can|could|should|may|might|must|does|do|did)\b(?!\s+(?:not|no|never)\b|n't)"
)
_COMPANY = re.compile(
    rf"(?:[A-Z][\w&'-]*\s+){{1,4}}(?:{LEGAL_FORMS}|Group|Holdings|Bank|Bancorp|Partners|Trust|Industries)\b"
)
_NO_NAME = re.compile(
    r"^(?:(?:The|A|An|In|At|Of|For|And|But|As|On|By|With|From|Its|Our|Shares|Was|Is|Are|Were|Did|Does|Has|Will|Can|Should|How|Why|What|"
    r"When|Which|Who)\s+)+"
)


Texts = dict[str, list[str]]  # of the columns text and, where rows have it, pair


class Perturbation(Protocol):
    """A change of texts. Its fields are its keys in a suite."""

    def columns(self) -> list[str]:
        """Columns of the data that it needs beside the texts."""
        ...

    def __call__(self, rows: datasets.Dataset, seed: int) -> Texts:
        """The texts of the rows after the change, which are the same where there is nothing to change."""
        ...


@dataclass(frozen=True)
class Numbers:
    """All numbers of a text times the same factor, between 1.1 and 2: what was more is more still, so a mind should not change.

    Those of its pair are multiplied by it too. Years, days of a month, and numbers in names (Q3, 10-K) stay as they are.
    """

    def columns(self) -> list[str]:
        return []

    def __call__(self, rows: datasets.Dataset, seed: int) -> Texts:
        factors = [random.Random(f"{seed} {text}").uniform(1.1, 2.0) for text in rows["text"]]
        return {
            name: [self.change(text, factor) for text, factor in zip(texts, factors, strict=True)]
            for name, texts in _texts(rows).items()
        }

    def change(self, text: str, factor: float) -> str:
        """The text with its numbers multiplied, decimals and separators as they were."""

        def multiplied(found: re.Match[str]) -> str:
            return found[0] if _DAY.search(text[: found.start()]) else _times(found[0], factor)

        return _NUMBER.sub(multiplied, text)


@dataclass(frozen=True)
class Negations:
    """``not`` behind the first auxiliary verb, or "It is not true that" before the text: here many a mind should change.

    A pair stays as it is.
    """

    def columns(self) -> list[str]:
        return []

    def __call__(self, rows: datasets.Dataset, seed: int) -> Texts:
        return _texts(rows) | {"text": [self.change(text) for text in rows["text"]]}

    def change(self, text: str) -> str:
        """The text with one negation more."""
        negated, found = _AUXILIARY.subn(r"\1 not", text, count=1)
        return negated if found else f"It is not true that {text}"


@dataclass(frozen=True)
class Companies:
    """Each company in a text becomes another one of the data: what was said of it is the same, so a mind should not change.

    It becomes the same one in the text's pair, or in all passages of a query. Names are those of the column and the file, and
    what ends as companies do (Inc, plc, AG, Group, ...).

    Args:
        column: holds the name of each row's company.
        names: a file with a name a line.
    """

    column: str | None = None
    names: str | None = None

    def columns(self) -> list[str]:
        return [] if self.column is None else [self.column]

    def __call__(self, rows: datasets.Dataset, seed: int) -> Texts:
        names, changed = self._known(rows), _texts(rows)
        masker, places = Masker(names, ""), defaultdict(list)
        for place, text in enumerate(rows["text"]):
            places[text].append(place)
        for text, same in places.items():
            cells = [(column, place) for column in changed.values() for place in same]
            old = [column[place] for column, place in cells]
            for (column, place), new in zip(
                cells, _renamed(old, masker, names, random.Random(f"{seed} {text}")), strict=True
            ):
                column[place] = new
        return changed

    def _known(self, rows: datasets.Dataset) -> list[str]:
        """All names, in the order of the alphabet."""
        texts = {text for column in _texts(rows).values() for text in column}
        names = {_NO_NAME.sub("", found[0]) for text in texts for found in _COMPANY.finditer(text)}
        if self.column is not None:
            names |= {str(name).strip() for name in rows[f"{KEPT}{self.column}"] if name}
        if self.names is not None:
            names |= set(listed_names(self.names, "companies.names"))
        return sorted(name for name in names if " " in name or len(name) > 1)


def _texts(rows: datasets.Dataset) -> Texts:
    return {name: list(rows[name]) for name in ("text", "pair") if name in rows.column_names}


def _renamed(texts: Sequence[str], masker: Masker, names: Sequence[str], chance: random.Random) -> list[str]:
    """The texts with each name replaced by the same other name, which is in none of them."""
    whole = "\n".join(texts).lower()
    others = [name for name in names if name.lower() not in whole]
    chance.shuffle(others)
    given: dict[str, str] = {}

    def other(name: str) -> str:
        if name not in given and others:
            given[name] = others.pop()
        return given.get(name, name)

    return [masker(text, other) for text in texts]


def _times(number: str, factor: float) -> str:
    whole, comma, decimals = number.rpartition(",") if re.fullmatch(r"\d+,(?:\d{1,2}|\d{4,})", number) else ("", "", "")
    if comma:  # 12,5
        return _times(f"{whole}.{decimals}", factor).replace(".", ",")
    grouped = re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", number)
    if _YEAR.fullmatch(number) or not (grouped or re.fullmatch(r"(?:0|[1-9]\d*)(?:\.\d+)?", number)):
        return number
    places = len(number.partition(".")[2])
    product = float(number.replace(",", "")) * factor
    return f"{product:,.{places}f}" if grouped else f"{product:.{places}f}"


def changes(asked: Sequence[Any], where: str) -> list[Perturbation]:
    """``[numbers, {name: companies, column: issuer}]`` -> perturbations; InputError names the entry that is none."""
    return [named(PERTURBATIONS, each, f"{where}.{number}") for number, each in enumerate(asked)]


PERTURBATIONS: Mapping[str, type[Perturbation]] = {
    "numbers": Numbers,
    "negations": Negations,
    "companies": Companies,
}
