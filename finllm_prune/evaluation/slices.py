"""Parts of a set in which a pruned model may be worse than on the whole."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from finllm_prune.judges import Indices
from finllm_prune.tasks import KEPT

_NEGATION = re.compile(r"\b(?:not|no|never|none|neither|nor|without|cannot)\b|n['\u2019]t\b", re.IGNORECASE)
_NAMED = 10  # values of a column that have a slice of their own


def slices(names: Sequence[str], rows: datasets.Dataset) -> dict[str, dict[str, Indices]]:
    """What the set is divided by -> part -> its rows; parts without rows are left out.

    Args:
        names: of ``SLICES``, or of columns that the task kept.
        rows: with ``text``, and ``pair`` where there are two.
    """
    columns = [rows[name] for name in ("text", "pair") if name in rows.column_names]
    texts = [" ".join(parts) for parts in zip(*columns, strict=True)]
    return {name: SLICES[name](texts) if name in SLICES else of_values(list(rows[f"{KEPT}{name}"])) for name in names}


def by_length(texts: Sequence[str]) -> dict[str, Indices]:
    """Three parts of about as many texts."""
    return _thirds(np.array([len(text.split()) for text in texts]), "words")


def by_numbers(texts: Sequence[str]) -> dict[str, Indices]:
    """Texts with a digit, and the others."""
    return _divided(["with" if re.search(r"\d", text) else "without" for text in texts])


def by_negation(texts: Sequence[str]) -> dict[str, Indices]:
    """Texts with a word that negates, and the others."""
    return _divided(["with" if _NEGATION.search(text) else "without" for text in texts])


def of_values(values: Sequence[Any]) -> dict[str, Indices]:
    """The ten most frequent values and the others, or three parts where there are more numbers; and what is missing."""
    there = np.array([value is not None and value == value for value in values])  # NaN is not itself
    known = [value for value, is_there in zip(values, there, strict=True) if is_there]
    counts = Counter(map(str, known))
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    if is_number and len(counts) > _NAMED:
        parts = _thirds(np.array(known, dtype=float))
    else:
        frequent = [value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]]
        named = _divided([str(value) if str(value) in frequent else "all others" for value in known])
        parts = {name: named[name] for name in [*frequent, "all others"] if name in named}
    found = {name: np.flatnonzero(there)[rows] for name, rows in parts.items()}
    name = "(missing)" if "missing" in found else "missing"
    return found if there.all() else {**found, name: np.flatnonzero(~there)}


def _divided(names: Sequence[str]) -> dict[str, Indices]:
    return {name: np.flatnonzero(np.array(names) == name) for name in sorted(set(names))}


def _thirds(values: NDArray[Any], unit: str = "") -> dict[str, Indices]:
    parts, below = {}, -np.inf
    for edge in np.unique(np.quantile(values, [1 / 3, 2 / 3], method="lower")):
        parts[f"up to {edge:.15g} {unit}"] = (values > below) & (values <= edge)
        below = edge
    parts[f"more than {below:.15g} {unit}"] = values > below
    return {name.strip(): np.flatnonzero(rows) for name, rows in parts.items() if rows.any()}


SLICES: Mapping[str, Callable[[Sequence[str]], dict[str, Indices]]] = {
    "length": by_length,
    "numbers": by_numbers,
    "negation": by_negation,
}
