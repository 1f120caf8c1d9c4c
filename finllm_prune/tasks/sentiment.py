"""Sentiment: one text, one of a few labels. Not covered: text pairs, several labels per text, regression."""

from dataclasses import dataclass
from typing import ClassVar

import datasets
from transformers import (
    AutoModelForSequenceClassification,
    DataCollator,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from finllm_prune.errors import InputError
from finllm_prune.tasks.task import Examples, index_labels, read_splits, take


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

    dataset: str = "builtin"
    text_column: str = "text"
    label_column: str = "label"
    labels: list[str] | None = None
    max_length: int = 128
    train_rows: int | None = None

    def load(self) -> Examples:
        raw, source = read_splits(self.dataset, builtin="sentiment")
        if "train" not in raw or "test" not in raw:
            raise InputError(f"task.dataset: {source} needs the splits train and test; it has {', '.join(raw)}")
        train = raw["train"]
        if self.train_rows is not None:
            if not 0 < self.train_rows <= len(train):
                raise InputError(f"task.train_rows: {self.train_rows} of {len(train)} rows cannot be taken")
            train = train.shuffle(seed=42).select(range(self.train_rows))
        if "validation" not in raw:
            parts = train.train_test_split(test_size=0.1, seed=42)
            raw["validation"], train = parts["test"], parts["train"]
        raw["train"] = train
        labels = self.labels or self._names(train, source)
        splits = {}
        for name in ("train", "validation", "test"):
            where = f"{source}, split {name}"
            columns = take(raw[name], {"text_column": self.text_column, "label_column": self.label_column}, where)
            texts = columns["text_column"]
            for row, text in enumerate(texts):
                if not isinstance(text, str) or not text.strip():
                    raise InputError(
                        f"{where}: row {row} has no text in column '{self.text_column}'; remove or mend it"
                    )
            rows = {"text": texts, "label": index_labels(columns["label_column"], labels, where)}
            splits[name] = datasets.Dataset.from_dict(rows)
        return Examples(splits, labels, source)

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        tokens = tokenizer(list(rows["text"]), truncation=True, max_length=self.max_length)
        columns = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        return datasets.Dataset.from_dict(columns | {"labels": list(rows["label"])})

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        return DataCollatorWithPadding(tokenizer)

    def _names(self, train: datasets.Dataset, source: str) -> list[str]:
        values = take(train, {"label_column": self.label_column}, f"{source}, split train")["label_column"]
        feature = train.features[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            return list(feature.names)
        names = sorted(set(values), key=str)
        if not all(isinstance(name, str) for name in names):
            raise InputError(
                f"task.labels: column '{self.label_column}' of {source} holds {names[0]!r} and the like, not names; "
                "list the class names in the order of their indices"
            )
        if len(names) < 2:
            raise InputError(
                f"task.dataset: all rows of {source} have the label {names[0]!r}; there is nothing to learn"
            )
        return names


TASK = Sentiment
