"""Splits made anew: by time, by group, or at random; and what one split has in common with another."""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, repeat
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from finllm_prune.errors import InputError, one_line

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """All rows of a data set, divided anew.

    By time the oldest rows are for training and the newest for the test; equal times stay on one side. By group (companies)
    no group lies on two sides. Not covered: strata, rolling windows.

    Args:
        by: a column; None divides single rows at random.
        kind: ``time`` sorts the column, ``group`` draws its values at random; ``auto`` is ``time`` where more than half of its
            values are dates (ISO 8601).
        validation, test: parts of the rows; what is reached differs by at most the largest group.
        seed: of the draw.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    by: str | None = None
    kind: Literal["auto", "time", "group"] = "auto"
    validation: float = 0.1
    test: float = 0.2
    seed: int = 42

    def __post_init__(self) -> None:
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 1):
            raise InputError(
                f"task.split: validation and test are parts of the rows above 0 that leave some for training, not "
                f"{self.validation:g} and {self.test:g}"
            )
        if self.by is None and self.kind != "auto":
            raise InputError(f"task.split.by: name the column that holds the {self.kind}")

    def is_time(self, values: Sequence[Any]) -> bool:
        """Whether these values of the column are sorted."""
        if self.kind != "auto":
            return self.kind == "time"
        return 2 * sum(date is not None for date in _dates(values)) > len(values)

    def keys(self, values: Sequence[Any], time: bool) -> list[Any]:
        """What rows are sorted or grouped by; None where a row has none.

        Numbers (years) are sorted as such where ``kind: time`` asks for it.
        """
        if not time:
            return [None if pd.isna(value) or value == "" else str(value) for value in values]
        if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
            return [None if pd.isna(value) else value for value in values]
        return _dates(values)

    def divide(self, keys: Sequence[Any], time: bool) -> dict[str, list[int]]:
        """Split -> rows, in their order.

        Raises:
            InputError: there are fewer than three times or groups.
        """
        codes, groups = pd.factorize(pd.Series(list(keys), dtype=object), sort=True)
        if len(groups) < len(SPLITS):
            raise InputError(
                f"task.split: the rows have {len(groups)} different values of '{self.by or 'row'}'; three splits need three"
            )
        order = np.arange(len(groups)) if time else np.random.default_rng(self.seed).permutation(len(groups))
        place = np.argsort(order)[codes]  # of each row's group, in the order
        ends = self.ends(np.bincount(place).tolist())
        side = np.searchsorted(ends, place, side="right")
        return {name: np.flatnonzero(side == i).tolist() for i, name in enumerate(SPLITS)}

    def ends(self, sizes: Sequence[int]) -> tuple[int, int]:
        """After how many groups, in their order, training and validation end: where the parts are nearest to the request."""
        reached = np.cumsum([0, *sizes])
        wanted = (1 - self.validation - self.test, 1 - self.test)
        train, validation = (int(np.abs(reached - part * reached[-1]).argmin()) for part in wanted)
        train = min(max(train, 1), len(sizes) - 2)
        return train, min(max(validation, train + 1), len(sizes) - 1)


def divided(
    splits: dict[str, datasets.Dataset], keys: list[Any], split: Split
) -> tuple[dict[str, datasets.Dataset], dict[str, Any]]:
    """All rows in splits made anew, and what these are, for the report."""
    whole = datasets.concatenate_datasets(_aligned(list(splits.values())))
    keys = keys if split.by is not None else list(range(len(whole)))
    time = split.by is not None and not isinstance(keys[0], str)
    parts = split.divide(keys, time)
    fact: dict[str, Any] = {"by": split.by, "kind": "time" if time else "group" if split.by else "random"}
    for name, rows in parts.items() if split.by else ():
        values = [keys[row] for row in rows]
        fact[name] = (
            [str(value).removesuffix(" 00:00:00+00:00") for value in (min(values), max(values))]
            if time
            else len(set(values))
        )
    return {name: filled(whole.select(rows), name) for name, rows in parts.items()}, fact


def _aligned(splits: list[datasets.Dataset]) -> list[datasets.Dataset]:
    """With the same type of each column: a missing cell makes one file's whole numbers another one's fractions."""
    if all(rows.features == splits[0].features for rows in splits):
        return splits
    try:
        schema = pa.unify_schemas([rows.features.arrow_schema for rows in splits], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise InputError(
            f"task.keep_columns: a column is of another kind in another split ({one_line(error)}); mend it, or keep others"
        ) from error
    return [rows.cast(datasets.Features.from_arrow_schema(schema.remove_metadata())) for rows in splits]


def filled(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    """The rows of a split, of which there has to be one."""
    if len(rows) == 0:
        raise InputError(f"task.dataset: no row of {split} is good; mend the data")
    return rows


def _dates(values: Sequence[Any]) -> list[pd.Timestamp | None]:
    """Dates, and ISO 8601 texts with at least year and month; numbers and other texts are none."""
    is_number = (int, float)
    asked = [
        None
        if isinstance(value, is_number) or (isinstance(value, str) and not re.match(r"\d{4}-\d\d", value))
        else value
        for value in values
    ]
    dates = pd.to_datetime(pd.Series(asked, dtype=object), format="ISO8601", errors="coerce", utc=True)
    return [None if pd.isna(date) else date for date in dates]


def near_key(text: str) -> str:
    """Equal for texts that differ in case, spaces, digits and punctuation only."""
    words = re.sub(r"[^\w\s]|_", " ", re.sub(r"\d+", "0", text.lower())).split()
    return " ".join(words) or text


def without_copies(splits: dict[str, datasets.Dataset]) -> tuple[dict[str, datasets.Dataset], dict[str, int]]:
    """Splits without rows whose near copy lies in a later split; and how many each has lost."""
    later: set[bytes] = set()
    kept, lost = {}, {}
    for name in reversed(SPLITS):
        keys = [_hash(near_key(text)) for text in _whole_texts(splits[name])]
        rows = [row for row, key in enumerate(keys) if key not in later]
        if not rows:
            raise InputError(f"task.deduplicate: every row of {name} has a copy in a later split; mend the data")
        kept[name], lost[name] = splits[name].select(rows), len(keys) - len(rows)
        later.update(keys)
    return {name: kept[name] for name in SPLITS}, {name: lost[name] for name in SPLITS}


def not_in(texts: Sequence[str], splits: dict[str, datasets.Dataset]) -> list[str]:
    """Those without a near copy in any split, nor among the texts before them."""
    seen = {_hash(near_key(text)) for rows in splits.values() for text in rows["text"]}
    new = []
    for text in texts:
        if (key := _hash(near_key(text))) not in seen:
            seen.add(key)
            new.append(text)
    return new


def leakage(splits: dict[str, datasets.Dataset]) -> dict[str, dict[str, int]]:
    """For each two splits, how many rows of the later one lie in the earlier one too: ``exact``, and ``near`` copies of it."""
    texts = {name: [(_hash(text), _hash(near_key(text))) for text in _whole_texts(splits[name])] for name in SPLITS}
    found = {}
    for earlier, later in combinations(SPLITS, 2):
        whole, near = ({keys[i] for keys in texts[earlier]} for i in (0, 1))
        exact = sum(keys[0] in whole for keys in texts[later])
        close = sum(keys[1] in near and keys[0] not in whole for keys in texts[later])
        found[f"{later} in {earlier}"] = {"exact": exact, "near": close}
        if exact or close:
            logger.warning(
                "Leakage: %d of %d rows of %s lie in %s too, %d more but for case, digits and punctuation; "
                "task.deduplicate: true drops them from %s.",
                exact, len(texts[later]), later, earlier, close, earlier,
            )  # fmt: skip
    return found


def _whole_texts(rows: datasets.Dataset) -> Iterator[str]:
    pairs = (f"\0{pair}" for pair in rows["pair"]) if "pair" in rows.column_names else repeat("")
    return (f"{text}{pair}" for text, pair in zip(rows["text"], pairs, strict=False))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
