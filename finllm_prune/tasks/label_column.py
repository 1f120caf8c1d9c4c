"""The column of the labels: what they are called, what is learned of each value, and what is wrong with others."""

import bisect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import datasets

from finllm_prune.errors import InputError
from finllm_prune.tasks.label_sets import LabelSets, find_in
from finllm_prune.tasks.scores import Scores
from finllm_prune.tasks.task import take

logger = logging.getLogger(__name__)

_MISSING = {"NA", "N/A", "<NA>", "NULL", "null", "NaN", "nan", "None"}  # what programs write where there is no label
_SCORE = "score"  # what the one output of a regression is called


@dataclass(frozen=True)
class LabelColumn:
    """Names or indices of classes, numbers, or lists of labels.

    Args:
        column: its name.
        labels: class names in the order of their indices; None takes those of the data, sorted.
        thresholds: numbers that divide the values into ``labels``.
        scores, label_sets: what a value is, where it is no class.
    """

    column: str
    labels: list[str] | None
    thresholds: list[float] | None
    scores: Scores | None
    label_sets: LabelSets | None

    @property
    def feature(self) -> Any:
        """The type of what is learned of a value."""
        if self.label_sets is not None:
            return datasets.List(datasets.Value("float32"))
        return datasets.Value("int64" if self.scores is None else "float64")

    def read(self, values: Sequence[Any], labels: Sequence[str], feature: Any = None) -> list[Any]:
        """What is learned of these values: indices, numbers, or 0 and 1 for each label; None for others.

        Args:
            feature: the type of the column, of which a ClassLabel says what its numbers mean.
        """
        coded = _class_names(feature)
        if self.scores is not None:
            return list(self.scores.read(values))
        if self.label_sets is not None:
            return list(self.label_sets.read(values, labels, coded))
        if (thresholds := self.thresholds) is not None:
            numbers = Scores().read(values)
            return [None if number is None else bisect.bisect_right(thresholds, number) for number in numbers]
        return list(map(find_in(labels, coded), values))

    def fault(self, value: Any, labels: Sequence[str]) -> tuple[str, str]:
        """What is wrong with a value of which nothing is learned: its kind, and a predicate."""
        if self.scores is not None:
            return "no number", f"has {value!r} in column '{self.column}', which is no number"
        if self.label_sets is not None and self.label_sets.split(value) is None:
            return (
                "no list",
                f"has no list of labels in column '{self.column}' but {value!r}; name task.label_sets.separator",
            )
        return "unknown label", f"has the unknown label {value!r}; known are {', '.join(labels)}"

    def names(self, tables: Mapping[str, datasets.Dataset], source: str) -> list[str]:
        """The labels, as they are given or as these splits have them.

        Raises:
            InputError: there are fewer than two, one comes twice, or the values are no names.
        """
        if self.scores is not None:
            return [_SCORE]
        labels = self._found(tables, source) if self.labels is None else self.labels
        if len({name.strip() for name in labels}) < max(2, len(labels)):
            raise InputError(f"task.labels: at least two different class names are needed, not {labels}")
        return labels

    def _found(self, tables: Mapping[str, datasets.Dataset], source: str) -> list[str]:
        columns = [
            take(rows, {"label_column": self.column}, f"{source}, split {name}")["label_column"]
            for name, rows in tables.items()
        ]
        if (coded := _class_names(next(iter(tables.values())).features[self.column])) is not None:
            return coded
        values = [value for column in columns for value in column if value is not None]
        if self.label_sets is not None:
            values = [name for value in values for name in self.label_sets.split(value) or ()]
        others = [value for value in values if not isinstance(value, str)]
        if any(isinstance(value, float | Decimal) and value % 1 for value in others):
            raise InputError(
                f"task.thresholds: column '{self.column}' of {source} holds scores: learn them as such by "
                "task.scores: {}, or give those that divide the classes of task.labels, as thresholds: [-0.2, 0.2]"
            )
        if others:
            raise InputError(
                f"task.labels: column '{self.column}' of {source} holds {others[0]} and the like, not names; "
                "list the class names in the order of their indices"
            )
        names = sorted({value.strip() for value in values} - {""})
        if len(names) < 2:
            raise InputError(
                f"task.dataset: all rows of {source} have the same label ({', '.join(names) or 'none'}); "
                "there is nothing to learn"
            )
        if odd := sorted(_MISSING.intersection(names)):
            logger.warning(
                "task.labels: column '%s' of %s holds %s, which becomes a class; where it means that a row has no label, "
                "list the class names without it.",
                self.column, source, ", ".join(odd),
            )  # fmt: skip
        return names

    def check(self, for_classes: Mapping[str, Any]) -> None:
        """Refuse keys that do not go together; ``for_classes``: keys for one class of each row, and what they are set to."""
        if self.scores is not None or self.label_sets is not None:
            self._check_other_labels(for_classes)
        if self.thresholds is not None:
            if self.labels is None or len(self.labels) != len(self.thresholds) + 1:
                raise InputError(
                    "task.thresholds: name the classes from the lowest to the highest in task.labels, one more than "
                    "there are thresholds"
                )
            if sorted(set(self.thresholds)) != self.thresholds:
                raise InputError(f"task.thresholds: they ascend, as {self.thresholds} do not")

    def _check_other_labels(self, for_classes: Mapping[str, Any]) -> None:
        kind, own = ("scores", "numbers") if self.scores is not None else ("label_sets", "several labels")
        given: dict[str, Any] = {"label_sets": self.scores and self.label_sets, "thresholds": self.thresholds}
        given |= {"focal_gamma": for_classes["focal_gamma"]}
        if self.scores is not None:
            given |= {"labels": self.labels, "class_weights": for_classes["class_weights"]}
        for key, value in given.items():
            if value:
                raise InputError(
                    f"task.{key}: this does not go with task.{kind}, where rows have {own}; remove one of the two"
                )


def _class_names(feature: Any) -> list[str] | None:
    """Those of a ClassLabel, or of lists of them."""
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
