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
from finllm_prune.tasks.masking import FUNCTION_WORDS, LEGAL_FORMS, Masker, listed_names, one_spelling, texts_in

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|"
    r"Dec(?:ember)?)"
)
_DAYS = r"[0-3]?\d(?:[-\u2013][0-3]?\d)?"
_SCALE = r"\s?(?:%|(?:per\s?cent|thousand|million|billion|trillion|[mb]n)\b)"
# What stays comes first, an amount is one of what is left, and what a word has in it is a part of a name.
_FIGURE = re.compile(
    rf"""
      \b{_MONTH}\.?\s+{_DAYS}\b(?![.,]\d|{_SCALE}) | {_DAYS}\s+{_MONTH}\b
    | (?<![$€£¥])(?:19|20)\d\d(?:[-\u2013](?:19|20)?\d\d)?(?!\w|[.,:/\u2013-]\d|{_SCALE})  # a year, or 2023-24
    | \d+(?:[.,]\d+)*(?:[/:]\d+(?:[.,]\d+)*)+                # 12/31/2023, 10:30
    | \d+(?:-\d+){{2,}} | 0\d[\w.,-]*                         # 2023-12-31, 007
    | (?!\d{{1,3}}(?:\.\d{{3}})+(?![.\d]))\d+(?:\.\d+){{2,}}   # 1.2.3, but not 1.234.567
    | \b(?:Class|Form|Items?|Level|Part|Rule|Section|Tier)\s+\d[\w-]* | 401\s?\(?(?i:k)\b | 1\db-\d\b | (?<![$€£¥\u2013-])3M\b
    | (?:EUR|USD|GBP|JPY|CHF|SEK|NOK|DKK|Rs\.?)(?=\d)         # no part of a name, as Q3 is
    | (?P<amount>(?:(?<![.,])[.,])?\d+(?:[.,]\d+)*)
      (?:(?i:[kmbtx]|-?(?:mm|m[il]o|ml?n|mrd|bl?n|tr?n|pp|bps?|pct))\b|(?!\w|[.,:/]\d|-[A-Za-z]))  # 5bn, but not 10-K
    | \w+(?:[-.,]\w+)*
    """,
    re.VERBOSE,
)
# 1 000 000 is one number; 412 398 377 are three where the thousands of the text have commas.
_SPACED = re.compile(r"(?<![\w.,])\d{1,3}((?:[ \u00a0\u2009\u202f]\d{3})+)(?!\d)")
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
# By the sign before the decimals.
_NUMBERS = {
    ".": re.compile(r"(?:\d{1,3}(?:,\d{3})+|0|[1-9]\d*)(?:\.\d+)?"),
    ",": re.compile(r"(?:\d{1,3}(?:\.\d{3})+|0|[1-9]\d*)(?:,\d+)?"),
}
_AUXILIARY = re.compile(
    r"\b(is|are|was|were|has|have|had|will|would|can|could|should|may|might|must|does|do|did)\b(?!\s+(?:not|no|never)\b|\s?n?['\u2019]t\b)"
)
_COMPANY = re.compile(
    rf"(?:[A-Z][\w&'\u2019-]*\s+){{1,4}}(?:{LEGAL_FORMS}|Group|Holdings|Bank|Bancorp|Partners|Trust|Industries)\b"
)
_NO_NAME = re.compile(rf"^(?:(?:{FUNCTION_WORDS})\s+)+")


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

    Those of its pair are multiplied by it too. Years, dates, times, and numbers in names (Q3, 10-K) stay as they are. So does a
    text with a number that cannot be read for sure (1 000 000, or 1.5 beside 2,5), and what is compared with its numbers.
    """

    def columns(self) -> list[str]:
        return []

    def __call__(self, rows: datasets.Dataset, seed: int) -> Texts:
        factors = [random.Random(f"{seed} {text}").uniform(1.1, 2.0) for text in rows["text"]]
        before = _texts(rows)
        after = {name: list(map(_multiplied, texts, factors)) for name, texts in before.items()}
        unread = {text for text, *new in zip(before["text"], *after.values(), strict=True) if None in new}
        # A text with numbers is compared with all its pairs; without one, each pair is by itself.
        stays = [text in unread and text != new for text, new in zip(before["text"], after["text"], strict=True)]
        return {
            name: [
                old if new is None or stay else new for old, new, stay in zip(texts, after[name], stays, strict=True)
            ]
            for name, texts in before.items()
        }

    def change(self, text: str, factor: float) -> str:
        """The text with its numbers multiplied, decimals and separators as they were where that turns no order round."""
        multiplied = _multiplied(text, factor)
        return text if multiplied is None else multiplied


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
        found = {one_spelling(_NO_NAME.sub("", found[0])) for text in texts for found in _COMPANY.finditer(text)}
        names = {name for name in found if " " in name}  # of "The Group" no name is left
        if self.column is not None:
            names |= {one_spelling(name) for name in texts_in(rows[f"{KEPT}{self.column}"])}
        if self.names is not None:
            names |= set(map(one_spelling, listed_names(self.names, "companies.names")))
        return sorted(name for name in names if len(name) > 1)


def _texts(rows: datasets.Dataset) -> Texts:
    return {name: list(rows[name]) for name in ("text", "pair") if name in rows.column_names}


def _renamed(texts: Sequence[str], masker: Masker, names: Sequence[str], chance: random.Random) -> list[str]:
    """The texts with each name replaced by the same other name, which is in none of them."""
    whole = one_spelling("\n".join(texts)).lower()
    others = [name for name in names if name.lower() not in whole]
    chance.shuffle(others)
    given: dict[str, str] = {}

    def other(name: str) -> str:
        key = name.upper()
        if key not in given and others:
            given[key] = others.pop()
        return given.get(key, name)

    return [masker(text, other) for text in texts]


def _multiplied(text: str, factor: float) -> str | None:
    """The text with its numbers multiplied; None where one of them cannot be read for sure."""
    found = [each for each in _FIGURE.finditer(text) if each["amount"]]
    amounts = [each["amount"] for each in found]
    point = next((point for point, number in _NUMBERS.items() if all(map(number.fullmatch, amounts))), None)
    commas = _THOUSANDS.search(text) is not None
    if point is None or any(not commas or re.search(r"\s0", spaced[1]) for spaced in _SPACED.finditer(text)):
        return None
    comma = "," if point == "." else "."
    products = [float(amount.replace(comma, "").replace(point, ".")) * factor for amount in amounts]
    places = [len(amount.partition(point)[2]) for amount in amounts]
    ranked = [rounded for _, rounded in sorted(zip(products, map(round, products, places), strict=True))]
    if ranked != sorted(ranked):  # 5 < 5.4, but 6 > 5.9
        places = [max(places)] * len(places)
    parts, end = [], 0
    for each, product, decimals in zip(found, products, places, strict=True):
        number = f"{product:,.{decimals}f}" if comma in each["amount"] else f"{product:.{decimals}f}"
        parts += [text[end : each.start("amount")], number.translate(str.maketrans(".,", point + comma))]
        end = each.end("amount")
    return "".join([*parts, text[end:]])


def refuse_unusable(perturbations: Sequence[Perturbation], rows: datasets.Dataset) -> None:
    """Each is tried on the first row, so that a list of names which cannot be read is told before anything is measured."""
    for change in perturbations:
        change(rows.select([0]), 0)


def changes(asked: Sequence[Any], where: str) -> list[Perturbation]:
    """``[numbers, {name: companies, column: issuer}]`` -> perturbations; InputError names the entry that is none."""
    return [named(PERTURBATIONS, each, f"{where}.{number}") for number, each in enumerate(asked)]


PERTURBATIONS: Mapping[str, type[Perturbation]] = {
    "numbers": Numbers,
    "negations": Negations,
    "companies": Companies,
}
