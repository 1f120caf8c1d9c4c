"""Classification, of which sentiment and filings are kinds: one text, or a text and what it is about, and one of some labels.

Not covered: several labels per text; scores as such (regression), which are learned as classes by ``thresholds``.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import pandas as pd
from transformers import (
    AutoModelForSequenceClassification,
    DataCollator,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from finllm_prune.errors import InputError
from finllm_prune.judges import ClassJudge, Judge
from finllm_prune.tasks.masking import Mask, Masker, normalise_numbers
from finllm_prune.tasks.rows import BadRows, Choice
from finllm_prune.tasks.skew import SkewLoss, class_weights
from finllm_prune.tasks.splitting import SPLITS, Split, leakage, without_copies
from finllm_prune.tasks.task import BUILTIN, KEPT, Examples, Loss, read_splits, split_files, take


@dataclass(frozen=True)
class Classification:
    """Text classification with a macro-averaged view of the classes.

    Args:
        dataset: ``builtin``, a local folder of ``train``/``validation``/``test`` .parquet, .jsonl or .csv, or a Hub id.
        text_column: the column of the text.
        label_column: the column of the label, a name or a class index.
        labels: class names in the order of their indices; None takes those of the data, sorted.
        max_length: tokens; longer texts are cut.
        train_rows: train on a fixed random sample of this many rows; None takes all.
        pair_column: a second text of each row, as the aspect or target that the label is about.
        thresholds: ascending scores that divide the label column into ``labels``, one fewer than these; the lower class ends
            below its threshold.
        class_weights: ``balanced`` or a weight for each class name, of its rows in the loss.
        focal_gamma: above 0, the focal loss: what is predicted well counts less (2 is usual).
        split: make all splits anew; None takes those of the data.
        deduplicate: drop rows that come again in a later split, but for case, spaces, digits and punctuation.
        mask: replace names by one word.
        normalise_numbers: each number becomes 0.
        bad_rows: ``refuse`` data with a row that has no text or an unknown label, or ``skip`` such rows, counted.
        id_column: names of rows; one that comes twice is a bad row.
        config, revision: of a Hub id: which of its configurations, at which branch or commit; None takes its main ones.
        keep_columns: columns that stay beside the texts, for the slices of a suite.
    """

    auto_class: ClassVar = AutoModelForSequenceClassification
    pipeline_tag: ClassVar[str] = "text-classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc")
    builtin: ClassVar[str]

    dataset: str = "builtin"
    text_column: str = "text"
    label_column: str = "label"
    labels: list[str] | None = None
    max_length: int = 128
    train_rows: int | None = None
    pair_column: str | None = None
    thresholds: list[float] | None = None
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    focal_gamma: float = 0.0
    split: Split | None = None
    deduplicate: bool = False
    mask: Mask | None = None
    normalise_numbers: bool = False
    bad_rows: Choice = "refuse"
    id_column: str | None = None
    config: str | None = None
    revision: str | None = None
    keep_columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise InputError(f"task.max_length: a text needs at least 3 tokens, not {self.max_length}")
        if self.focal_gamma < 0:
            raise InputError(f"task.focal_gamma: the power is not negative, as {self.focal_gamma:g} is")
        if self.thresholds is not None:
            if self.labels is None or len(self.labels) != len(self.thresholds) + 1:
                raise InputError(
                    "task.thresholds: name the classes from the lowest to the highest in task.labels, one more than "
                    "there are thresholds"
                )
            if sorted(set(self.thresholds)) != self.thresholds:
                raise InputError(f"task.thresholds: they ascend, as {self.thresholds} do not")

    def load(self) -> Examples:
        left_out: dict[str, list[int]] | None = {} if self.bad_rows == "skip" else None
        raw, source = read_splits(self.dataset, self.builtin, left_out, self.config, self.revision)
        if self.split is None and ("train" not in raw or "test" not in raw):
            raise InputError(
                f"task.dataset: {source} needs the splits train and test; it has {', '.join(raw)}; add them, or set task.split"
            )
        labels = self._names(raw, source) if self.labels is None else self.labels
        if len(set(labels)) < max(2, len(labels)):
            raise InputError(f"task.labels: at least two different class names are needed, not {labels}")
        # Rows are checked as they lie in their files, so that an error names the row that the user finds there.
        frames = {name: self._columns(raw[name], f"{source}, split {name}") for name in SPLITS if name in raw}
        bad = self._bad_rows(frames, labels, source, left_out or {})
        facts: dict[str, Any] = {"bad_rows": bad.settle(self.bad_rows)}
        frames = {name: bad.without(name, frame) for name, frame in frames.items()}
        if self.mask is not None:
            facts["masked"] = self._mask(frames, self.mask)
        if self.normalise_numbers:
            for frame in frames.values():
                for column in _texts(frame):
                    frame[column] = [normalise_numbers(text) for text in frame[column]]
        if self.split is not None:
            frames, facts["split"] = _divided(frames, self.split)
        splits = self._complete({name: _rows(frame, name) for name, frame in frames.items()}, source)
        if self.deduplicate:
            splits, facts["dropped_copies"] = without_copies(splits)
        facts["leakage"] = leakage(splits)
        return Examples(splits, labels, source, facts)

    def loss(self, examples: Examples) -> Loss | None:
        """Weighted by class, or focal, where that is asked for."""
        if self.class_weights is None and self.focal_gamma == 0:
            return None
        rows = list(examples.splits["train"]["label"])
        asked = self.class_weights
        return SkewLoss(None if asked is None else class_weights(asked, examples.labels, rows), self.focal_gamma)

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        limit = min(self.max_length, tokenizer.model_max_length)
        pairs = list(rows["pair"]) if "pair" in rows.column_names else None
        tokens = tokenizer(list(rows["text"]), pairs, truncation=True, max_length=limit)
        # Which of the two texts a token is of, where the model asks for it; of single texts it is always the first.
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if pairs and "token_type_ids" in tokens else [])]
        return datasets.Dataset.from_dict({name: tokens[name] for name in names} | {"labels": list(rows["label"])})

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        return DataCollatorWithPadding(tokenizer)

    def head_config(self, labels: list[str]) -> dict[str, Any]:
        numbers = {name: number for number, name in enumerate(labels)}
        return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": numbers}

    def judge(self, examples: Examples, split: str = "test") -> Judge:
        return ClassJudge(np.array(examples.splits[split]["label"]), examples.labels, self.metrics)

    def read_text(self, text: str) -> str:
        """What of a text is there to be learned from."""
        return text

    def _columns(self, raw: datasets.Dataset, where: str) -> pd.DataFrame:
        """The columns that the task takes, each value as it is."""
        asked = {
            "text_column": self.text_column, "label_column": self.label_column, "pair_column": self.pair_column,
            "id_column": self.id_column, "split.by": self.split.by if self.split else None,
            "mask.column": self.mask.column if self.mask else None,
            **{f"{KEPT}{column}": column for column in self.keep_columns},
        }  # fmt: skip
        columns = take(raw, {key: column for key, column in asked.items() if column is not None}, where)
        names = {"text_column": "text", "label_column": "label", "pair_column": "pair"}
        frame = pd.DataFrame({names.get(key, key): pd.Series(values, dtype=object) for key, values in columns.items()})
        for column in _texts(frame):
            frame[column] = [self.read_text(text) if isinstance(text, str) else text for text in frame[column]]
        return frame

    def _bad_rows(
        self, frames: dict[str, pd.DataFrame], labels: list[str], source: str, left_out: dict[str, list[int]]
    ) -> BadRows:
        """Find the rows that cannot be learned from, and put class indices and keys of the split in place of what was read."""
        folder = BUILTIN / self.builtin if self.dataset == "builtin" else Path(self.dataset)
        files = dict.fromkeys(frames, Path(source)) | split_files(folder)
        bad = BadRows(files, {name: len(frame) for name, frame in frames.items()}, left_out)
        ids: set[Any] = set()
        keys = _keys(frames, self.split) if self.split is not None and self.split.by is not None else None
        for split, frame in frames.items():
            for column, name in (("text", self.text_column), ("pair", self.pair_column)):
                for row in _empty(frame[column]) if column in frame else []:
                    bad.add(split, row, "no text", f"has no text in column '{name}'")
            indices = self._indices(frame["label"].tolist(), labels)
            for row, (value, index) in enumerate(zip(frame["label"], indices, strict=True)):
                if index is None:
                    what = f"has the unknown label {value!r}; known are {', '.join(labels)}"
                    bad.add(split, row, "unknown label", what)
            frame["label"] = pd.Series(indices, dtype=object)
            if "id_column" in frame:
                for row, name in enumerate(frame["id_column"]):
                    if name in ids:
                        bad.add(
                            split,
                            row,
                            "duplicate id",
                            f"has the id {name!r} in column '{self.id_column}' a second time",
                        )
                    ids.add(name)
            if self.split is not None and keys is not None:
                frame["split.by"] = pd.Series(keys[split], dtype=object)
                for row in frame.index[frame["split.by"].isna()]:
                    bad.add(
                        split, int(row), "no place in the split", f"has nothing to split by in column '{self.split.by}'"
                    )
        return bad

    def _indices(self, values: Sequence[Any], labels: list[str]) -> list[int | None]:
        """Names, indices or scores -> indices; None for what is neither."""
        if (thresholds := self.thresholds) is not None:
            scores = [value if isinstance(value, int | float | str) else None for value in values]
            numbers = pd.to_numeric(pd.Series(scores, dtype=object), errors="coerce")
            return [None if pd.isna(number) else bisect.bisect_right(thresholds, float(number)) for number in numbers]
        index: dict[Any, int] = {name: i for i, name in enumerate(labels)} | {i: i for i in range(len(labels))}
        return [index.get(value) if isinstance(value, str | int | float) else None for value in values]

    def _mask(self, frames: dict[str, pd.DataFrame], mask: Mask) -> dict[str, int]:
        """Take the names out of all texts, in place; split -> rows in which there was one."""
        names = mask.listed()
        for frame in frames.values():
            if "mask.column" in frame:
                names += [name for name in frame["mask.column"] if isinstance(name, str)]
        masker = Masker(names, mask.word)
        counts = {}
        for split, frame in frames.items():
            touched = pd.Series(False, index=frame.index)
            for column in _texts(frame):
                masked = [masker(text) for text in frame[column]]
                touched |= frame[column] != masked
                frame[column] = masked
            counts[split] = int(touched.sum())
        return counts

    def _complete(self, whole: dict[str, datasets.Dataset], source: str) -> dict[str, datasets.Dataset]:
        """A sample of the training rows if asked, and a validation split from them where there is none."""
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
        return {name: whole[name] for name in SPLITS}

    def _names(self, raw: datasets.DatasetDict, source: str) -> list[str]:
        """The labels of the training rows; of all rows where training rows are yet to be drawn."""
        taken = {name: raw[name] for name in (raw if self.split else ["train"])}
        columns = [
            take(rows, {"label_column": self.label_column}, f"{source}, split {name}")["label_column"]
            for name, rows in taken.items()
        ]
        values = [value for column in columns for value in column if value is not None]
        feature = next(iter(taken.values())).features[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            return list(feature.names)
        others = [value for value in values if not isinstance(value, str)]
        if any(isinstance(value, float) and not value.is_integer() for value in others):
            raise InputError(
                f"task.thresholds: column '{self.label_column}' of {source} holds scores, and nothing here does regression: "
                "give the scores that divide the classes of task.labels, as thresholds: [-0.2, 0.2]"
            )
        if others:
            raise InputError(
                f"task.labels: column '{self.label_column}' of {source} holds {others[0]!r} and the like, not names; "
                "list the class names in the order of their indices"
            )
        names = sorted(set(values))
        if len(names) < 2:
            raise InputError(
                f"task.dataset: all rows of {source} have the same label ({', '.join(names) or 'none'}); "
                "there is nothing to learn"
            )
        return names


def _texts(frame: pd.DataFrame) -> list[str]:
    return [column for column in ("text", "pair") if column in frame]


def _empty(column: pd.Series) -> list[int]:
    return [row for row, text in enumerate(column) if not isinstance(text, str) or not text.strip()]


def _rows(frame: pd.DataFrame, split: str) -> datasets.Dataset:
    if frame.empty:
        raise InputError(f"task.dataset: no row of {split} is good; mend the data")
    kept = [column for column in frame if column.startswith(KEPT)]
    return datasets.Dataset.from_dict({column: frame[column].tolist() for column in [*_texts(frame), "label", *kept]})


def _keys(frames: dict[str, pd.DataFrame], split: Split) -> dict[str, list[Any]]:
    """Split -> what its rows are sorted or grouped by."""
    values = [value for frame in frames.values() for value in frame["split.by"]]
    keys = iter(split.keys(values, split.is_time(values)))
    return {name: [next(keys) for _ in range(len(frame))] for name, frame in frames.items()}


def _divided(frames: dict[str, pd.DataFrame], split: Split) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """All rows in splits made anew, and what these are, for the report."""
    whole = pd.concat(list(frames.values()), ignore_index=True)
    keys = whole["split.by"].tolist() if split.by is not None else list(range(len(whole)))
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
    return {name: whole.iloc[rows] for name, rows in parts.items()}, fact
