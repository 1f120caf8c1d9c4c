"""Sentiment: one text, one of a few labels. Not covered: text pairs, several labels per text, regression."""

from dataclasses import dataclass
from typing import ClassVar

import datasets
import pandas as pd
from transformers import (
    AutoModelForSequenceClassification,
    DataCollator,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from finllm_prune.errors import InputError
from finllm_prune.tasks.task import Examples, index_labels, read_splits, take

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sentiment:
    """Text classification with a macro-averaged view of the classes.

    Args:
        dataset: ``builtin``, a local folder of ``train``/``validation``/``test`` .parquet, .jsonl or .csv, or a Hub id.
        text_column: the column of the text.
        label_column: the column of the label, a name or a class index.
        labels: class names in the order of their indices; None takes those of the data, sorted.
        max_length: tokens; longer texts are cut.
        train_rows: train on a fixed random sample of this many rows; None takes all.
    """

    auto_class: ClassVar = AutoModelForSequenceClassification
    pipeline_tag: ClassVar[str] = "text-classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc")
    builtin: ClassVar[str] = "sentiment"

    dataset: str = "builtin"
    text_column: str = "text"
    label_column: str = "label"
    labels: list[str] | None = None
    max_length: int = 128
    train_rows: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise InputError(f"task.max_length: a text needs at least 3 tokens, not {self.max_length}")

    def load(self) -> Examples:
        raw, source = read_splits(self.dataset, builtin=self.builtin)
        if "train" not in raw or "test" not in raw:
            raise InputError(f"task.dataset: {source} needs the splits train and test; it has {', '.join(raw)}")
        labels = self._names(raw["train"], source) if self.labels is None else self.labels
        if len(set(labels)) < max(2, len(labels)):
            raise InputError(f"task.labels: at least two different class names are needed, not {labels}")
        # Rows are checked as they lie in their files, so that an error names the row that the user finds there.
        whole = {name: self._checked(raw[name], labels, f"{source}, split {name}") for name in _SPLITS if name in raw}
        train = whole["train"]
        if self.train_rows is not None:
            if not 0 < self.train_rows <= len(train):
                raise InputError(f"task.train_rows: {self.train_rows} of {len(train)} rows cannot be taken")
            train = train.select(pd.Series(range(len(train))).sample(n=self.train_rows, random_state=42))
        if "validation" not in whole:
            if len(train) < 2:
                raise InputError(
                    f"task.dataset: {source} has no validation split and one row to make it from; add rows"
                )
            parts = train.train_test_split(test_size=0.1, seed=42)
            whole["validation"], train = parts["test"], parts["train"]
        whole["train"] = train
        return Examples({name: whole[name] for name in _SPLITS}, labels, source)

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        limit = min(self.max_length, tokenizer.model_max_length)
        tokens = tokenizer(list(rows["text"]), truncation=True, max_length=limit)
        columns = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        return datasets.Dataset.from_dict(columns | {"labels": list(rows["label"])})

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        return DataCollatorWithPadding(tokenizer)

    def _checked(self, raw: datasets.Dataset, labels: list[str], where: str) -> datasets.Dataset:
        columns = take(raw, {"text_column": self.text_column, "label_column": self.label_column}, where)
        for row, text in enumerate(columns["text_column"]):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where}: row {row} has no text in column '{self.text_column}'; remove or mend it")
        rows = {"text": columns["text_column"], "label": index_labels(columns["label_column"], labels, where)}
        return datasets.Dataset.from_dict(rows)

    def _names(self, train: datasets.Dataset, source: str) -> list[str]:
        values = take(train, {"label_column": self.label_column}, f"{source}, split train")["label_column"]
        feature = train.features[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            return list(feature.names)
        others = [value for value in values if value is not None and not isinstance(value, str)]
        if others:
            raise InputError(
                f"task.labels: column '{self.label_column}' of {source} holds {others[0]!r} and the like, not names; "
                "list the class names in the order of their indices"
            )
        names = sorted({value for value in values if value is not None})
        if len(names) < 2:
            raise InputError(
                f"task.dataset: all rows of {source} have the same label ({', '.join(names) or 'none'}); "
                "there is nothing to learn"
            )
        return names


TASK = Sentiment
