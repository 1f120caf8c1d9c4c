"""Several labels for each text, or none: the provisions that a contract clause makes, the events that an 8-K reports."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.tasks.skew import class_weights


def find_in(labels: Sequence[str], coded: Sequence[str] | None = None) -> Callable[[Any], int | None]:
    """What tells the index of a label: by its name, or by a number; None for what is neither.

    A number is the label that is called so. Only where no label is called by a number, numbers are indices.

    Args:
        coded: the names of a ClassLabel column, whose numbers are indices of these. Where the labels are the same ones in
            another order, a number means the label of its name; where they are others, they are other names for the same.
    """
    names = {name.strip(): i for i, name in enumerate(labels)}
    truths = {word == "true": i for name, i in names.items() if (word := name.lower()) in ("true", "false")}
    numbers: dict[Any, int] = {number: i for name, i in names.items() if (number := _number(name)) is not None}
    if coded is not None:
        same = sorted(labels) == sorted(coded)
        numbers = {code: list(labels).index(coded[code]) if same else code for code in range(len(labels))}
    elif not numbers:
        numbers = {i: i for i in range(len(labels))}
        # In a csv one cell that is no number makes texts of all of them.
        names = {str(i): i for i in numbers} | names

    def find(value: Any) -> int | None:
        if isinstance(value, str):
            return names.get(value.strip())
        if isinstance(value, bool) and truths:
            return truths.get(value)
        return numbers.get(value) if isinstance(value, int | float | Decimal) else None

    return find


def _number(name: str) -> int | float | None:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(name)
    return None


@dataclass(frozen=True)
class LabelSets:
    """The label column holds a list of labels for each row, which may be empty.

    Args:
        separator: what stands between labels where they are one text, as in a csv; a cell without text has none. None takes
            lists.
        threshold: a label is given where its probability is at least this.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    separator: str | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.separator == "":
            raise InputError("task.label_sets.separator: labels are told apart by a character, as ';'")
        if not 0 < self.threshold < 1:
            raise InputError(
                f"task.label_sets.threshold: a probability lies between 0 and 1, not at {self.threshold:g}"
            )

    def split(self, value: Any) -> list[Any] | None:
        """The labels of a row; None where there is no list of them."""
        if self.separator is None:
            return list(value) if isinstance(value, list | tuple) else None
        if isinstance(value, int) and not isinstance(value, bool):  # where no row of a csv has two codes
            return [str(value)]
        if value is None or isinstance(value, str):
            return [name.strip() for name in (value or "").split(self.separator) if name.strip()]
        return None

    def read(
        self, values: Sequence[Any], labels: Sequence[str], coded: Sequence[str] | None = None
    ) -> list[list[float] | None]:
        """1 for each label that a row has and 0 for the others; None where one of them is unknown, or there is no list."""
        find = find_in(labels, coded)
        rows = []
        for value in values:
            names = self.split(value)
            given = {None} if names is None else set(map(find, names))
            rows.append(None if None in given else [float(i in given) for i in range(len(labels))])
        return rows


@dataclass(frozen=True)
class LabelSetLoss:
    """``mean over rows and labels of -w[label] * y * log p - (1 - y) * log(1 - p)``, p being the sigmoid of a label's logit.

    Args:
        weights: per label, of the rows that have it, shape (labels,); None weighs all alike.
    """

    weights: Tensor | None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch: logits and labels (0 or 1) of shape (rows, labels)."""
        weights = None if self.weights is None else self.weights.to(logits.device)
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=weights)


def positive_weights(asked: str | dict[str, float], labels: Sequence[str], rows: Sequence[Sequence[float]]) -> Tensor:
    """``balanced``: rows without a label / rows with it, so that both sides of each label count alike; or weights by name.

    Raises:
        InputError: as of ``class_weights``.
    """
    if isinstance(asked, dict):
        return class_weights(asked, labels, [])
    held = torch.tensor(rows).sum(0)
    for name, count in zip(labels, held.tolist(), strict=True):
        if count in (0, len(rows)):
            raise InputError(
                f"task.class_weights: {'every' if count else 'no'} training row has the label {name}, so it cannot be "
                "balanced; give weights by name"
            )
    return (len(rows) - held) / held
