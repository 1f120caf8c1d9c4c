"""Classification, of which sentiment and filings are kinds: one text, or a text and what it is about, and what is said of it.

That is one of some labels, several of them (``label_sets``), or a number (``scores``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import pandas as pd
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollator,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from finllm_prune.errors import InputError
from finllm_prune.judges import ClassJudge, Judge, LabelSetJudge, ScoreJudge
from finllm_prune.tasks.batchwise import Batch, rewritten
from finllm_prune.tasks.ends import columns_of, first_tokens
from finllm_prune.tasks.files import split_files
from finllm_prune.tasks.label_column import LabelColumn
from finllm_prune.tasks.label_sets import LabelSetLoss, LabelSets, positive_weights
from finllm_prune.tasks.masking import Mask, Masker, normalise_numbers, without_names
from finllm_prune.tasks.rows import BadRows, Choice
from finllm_prune.tasks.scores import Scores
from finllm_prune.tasks.skew import SkewLoss, class_weights
from finllm_prune.tasks.splitting import SPLITS, Split, divided, filled, leakage, not_in, without_copies
from finllm_prune.tasks.task import BUILTIN, KEPT, Examples, Loss, Task, check_columns, read_splits
from finllm_prune.tasks.texts import filled_texts, read_texts

Tables = dict[str, datasets.Dataset]


@dataclass(frozen=True)
class Classification:
    """Text classification with a macro-averaged view of the classes.

    Args:
        dataset: ``builtin``, a local folder of ``train``/``validation``/``test`` .parquet, .jsonl or .csv, or a Hub id.
        text_column: the column of the text.
        label_column: the column of the label, a name or a class index.
        labels: class names in the order of their indices; None takes those of the data, sorted.
        scores: the label is a number, which is learned as such (regression).
        label_sets: each row has several labels, or none.
        max_length: tokens; longer texts are cut.
        train_rows: train on a fixed random sample of this many rows; None takes all.
        pair_column: a second text of each row, as the aspect or target that the label is about.
        thresholds: ascending scores that divide the label column into ``labels``, one fewer than these; the lower class ends
            below its threshold.
        class_weights: ``balanced`` or a weight for each class name, of its rows in the loss; of label sets the rows that have
            the label.
        focal_gamma: above 0, the focal loss: what is predicted well counts less (2 is usual).
        split: make all splits anew; None takes those of the data.
        deduplicate: drop rows that come again in a later split, but for case, spaces, digits and punctuation.
        mask: replace names by one word.
        normalise_numbers: each number becomes 0.
        bad_rows: ``refuse`` data with a row that has no text or an unknown label, or ``skip`` such rows, counted.
        id_column: names of rows; one that comes twice is a bad row.
        config, revision: of a Hub id: which of its configurations, at which branch or commit; None takes its main ones.
        keep_columns: columns that stay beside the texts, for the slices of a suite.
        unlabelled: a .txt (a text a line), .jsonl, .csv or .parquet file, or a folder whose train split counts, of texts
            without labels, in ``text_column`` but for .txt. The pruned model learns from them too, what its teacher says of
            them (pseudo-labels, Lee 2013). Copies of what lies in a split are left out, and an epoch is longer by the rest.
    """

    auto_class: ClassVar = AutoModelForSequenceClassification
    pipeline_tag: ClassVar[str] = "text-classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc")
    builtin: ClassVar[str]

    dataset: str = "builtin"
    text_column: str = "text"
    label_column: str = "label"
    labels: list[str] | None = None
    scores: Scores | None = None
    label_sets: LabelSets | None = None
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
    unlabelled: str | None = None

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise InputError(f"task.max_length: a text needs at least 3 tokens, not {self.max_length}")
        if self.focal_gamma < 0:
            raise InputError(f"task.focal_gamma: the power is not negative, as {self.focal_gamma:g} is")
        if self.unlabelled is not None and self.pair_column is not None:
            raise InputError("task.unlabelled: texts alone are no pairs; remove it, or pair_column")
        self._label_column.check({"focal_gamma": self.focal_gamma, "class_weights": self.class_weights})

    def load(self) -> Examples:
        left_out: dict[str, list[int]] | None = {} if self.bad_rows == "skip" else None
        raw, source = self._raw(left_out)
        if self.split is None and ("train" not in raw or "test" not in raw):
            raise InputError(
                f"task.dataset: {source} needs the splits train and test; it has {', '.join(raw)}; add them, or set task.split"
            )
        # Of all rows, where training rows are yet to be drawn.
        labels = self._label_column.names({name: raw[name] for name in (raw if self.split else ["train"])}, source)
        tables = {name: raw[name] for name in (raw if self.split else SPLITS) if name in raw}
        for name, rows in tables.items():
            check_columns(rows, self._columns(), f"{source}, split {name}")
            self._refuse_lists(rows)
        # Rows are checked as they lie in their files, so that an error names the row that the user finds there.
        bad = self._no_bad_rows(tables, source, left_out or {})
        splits = {name: self._read(name, rows, labels, bad) for name, rows in tables.items()}
        keys = self._keys(tables, bad)
        self._check_ids(tables, bad)
        facts: dict[str, Any] = {"bad_rows": bad.settle(self.bad_rows)}
        good = {name: bad.good(name) for name in splits}
        splits = {name: filled(rows.select(good[name]), name) for name, rows in splits.items()}
        cells = _values(tables, self.mask.column, good) if self.mask and self.mask.column else []
        masker = None if self.mask is None else self.mask.masker_of(cells)
        if self.mask is not None or self.normalise_numbers:
            splits, masked = without_names(splits, masker, self.normalise_numbers)
            facts |= {} if self.mask is None else {"masked": masked}
        splits = {name: self._with_kept(rows, tables[name].select(good[name])) for name, rows in splits.items()}
        if self.split is not None:
            splits, facts["split"] = divided(
                splits, [keys[name][row] for name in splits for row in good[name]], self.split
            )
        self._refuse_one_label(splits["train"], labels, source)
        splits = self._complete(splits, source)
        if self.deduplicate:
            splits, facts["dropped_copies"] = without_copies(splits)
        facts["leakage"] = leakage(splits)
        unlabelled = None
        if self.unlabelled is not None:
            unlabelled, facts["unlabelled"] = self._unlabelled(self.unlabelled, splits, masker)
        if self.scores is not None:
            facts["scores"] = {name: _summary(list(rows["label"])) for name, rows in splits.items()}
        return Examples(splits, labels, source, facts, bad.left_out(), unlabelled)

    def loss(self, examples: Examples) -> Loss | None:
        """That of scores or label sets; of classes one weighted or focal, where that is asked for."""
        if self.scores is not None:
            return self.scores.loss
        asked, rows = self.class_weights, examples.splits["train"]["label"]
        if self.label_sets is not None:
            return LabelSetLoss(None if asked is None else positive_weights(asked, examples.labels, list(rows)))
        if asked is None and self.focal_gamma == 0:
            return None
        return SkewLoss(None if asked is None else class_weights(asked, examples.labels, list(rows)), self.focal_gamma)

    def fit_tokenizer(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """It serves as it is."""

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        limit = min(self.max_length, tokenizer.model_max_length)

        def read(batch: Batch, _: Sequence[int]) -> Batch:
            if "pair" not in batch:
                return columns_of(first_tokens(batch["text"], limit, tokenizer)) | {"labels": batch["label"]}
            tokens = tokenizer(batch["text"], batch["pair"], truncation=True, max_length=limit)
            # Which of the two texts a token is of, where the model asks for it; of single texts it is always the first.
            names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in tokens]
            return {name: tokens[name] for name in names} | {"labels": batch["label"]}

        return rewritten(rows, read)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        return DataCollatorWithPadding(tokenizer)

    def head_config(self, labels: list[str]) -> dict[str, Any]:
        numbers = {name: number for number, name in enumerate(labels)}
        one = "regression" if self.scores is not None else "single_label_classification"
        kind = one if self.label_sets is None else "multi_label_classification"
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": numbers,
            "problem_type": kind,
        }

    def labels_of(self, logits: Tensor) -> list[Any]:
        """What a model says of each row, as the labels of the data are; ``logits``: (rows, outputs)."""
        if self.scores is not None:
            return logits[:, 0].tolist()
        if self.label_sets is not None:
            return (logits.double().sigmoid() >= self.label_sets.threshold).float().tolist()
        return logits.argmax(-1).tolist()

    def judge(self, examples: Examples, split: str = "test") -> Judge:
        right = np.array(list(examples.splits[split]["label"]))
        if self.scores is not None:
            return ScoreJudge(right, self.scores.metrics, self.scores.tolerance)
        if self.label_sets is not None:
            metrics = tuple(name for name in self.metrics if name != "mcc")
            return LabelSetJudge(right.astype(np.int64), examples.labels, metrics, self.label_sets.threshold)
        return ClassJudge(right, examples.labels, self.metrics)

    def prepared(self, texts: Sequence[str], names: Sequence[str] = ()) -> list[str]:
        """Texts of which no label is known, as those of the data are prepared; masked are the listed names, and ``names``."""
        return self._prepared(texts, None if self.mask is None else self.mask.masker(names))

    def _prepared(self, texts: Sequence[str], masker: Masker | None) -> list[str]:
        texts = [self.read_text(text) for text in texts]
        if masker is not None:
            texts = list(map(masker, texts))
        return list(map(normalise_numbers, texts)) if self.normalise_numbers else texts

    def read_text(self, text: str) -> str:
        """What of a text is there to be learned from."""
        return text

    def _raw(self, left_out: dict[str, list[int]] | None) -> tuple[datasets.DatasetDict, str]:
        """The rows as they come, and their source in words; see ``read_splits``."""
        return read_splits(self.dataset, self.builtin, left_out, self.config, self.revision)

    @property
    def _label_column(self) -> LabelColumn:
        return LabelColumn(self.label_column, self.labels, self.thresholds, self.scores, self.label_sets)

    def _columns(self) -> dict[str, str]:
        """The key that names a column -> the column."""
        asked = {
            "text_column": self.text_column, "label_column": self.label_column, "pair_column": self.pair_column,
            "id_column": self.id_column, "split.by": self.split.by if self.split else None,
            "mask.column": self.mask.column if self.mask else None,
            **{f"{KEPT}{column}": column for column in self.keep_columns},
        }  # fmt: skip
        return {key: column for key, column in asked.items() if column is not None}

    def _refuse_lists(self, rows: datasets.Dataset) -> None:
        for key, column in (("id_column", self.id_column), ("split.by", self.split.by if self.split else None)):
            if column is not None and isinstance(rows.features[column], datasets.List | datasets.LargeList):
                raise InputError(f"task.{key}: column '{column}' holds lists; name one with a single value in each row")

    def _refuse_one_label(self, train: datasets.Dataset, labels: list[str], source: str) -> None:
        """Where all training rows have the same label, a model learns nothing but that."""
        if self.scores is None and len(labels) > 1 and len(set(map(str, train["label"]))) == 1:
            only = "the same labels" if self.label_sets is not None else f"the label {labels[train['label'][0]]}"
            raise InputError(
                f"task.dataset: all training rows of {source} have {only}; there is nothing to learn, so mend the data"
            )

    def _no_bad_rows(self, tables: Tables, source: str, left_out: dict[str, list[int]]) -> BadRows:
        folder = BUILTIN / self.builtin if self.dataset == "builtin" else Path(self.dataset)
        files = dict.fromkeys(tables, Path(source)) | split_files(folder)
        return BadRows(files, {name: len(rows) for name, rows in tables.items()}, left_out)

    def _read(self, split: str, raw: datasets.Dataset, labels: list[str], bad: BadRows) -> datasets.Dataset:
        """The text, pair and label of each row, as they are learned from; what cannot be is told to ``bad``."""
        texts = {"text": self.text_column} | ({"pair": self.pair_column} if self.pair_column is not None else {})

        def read(batch: Batch, rows: Sequence[int]) -> Batch:
            made: Batch = {}
            for name, column in texts.items():
                made[name] = [self.read_text(text) if isinstance(text, str) else "" for text in batch[column]]
                for row, text in zip(rows, made[name], strict=True):
                    if not text.strip():
                        bad.add(split, row, "no text", f"has no text in column '{column}'")
            made["label"] = self._label_column.read(batch[self.label_column], labels, raw.features[self.label_column])
            for row, value, label in zip(rows, batch[self.label_column], made["label"], strict=True):
                if label is None:
                    bad.add(split, row, *self._label_column.fault(value, labels))
            return made

        types = dict.fromkeys(texts, datasets.Value("string")) | {"label": self._label_column.feature}
        asked = list(dict.fromkeys([*texts.values(), self.label_column]))
        return rewritten(raw.select_columns(asked), read, datasets.Features(types))

    def _unlabelled(
        self, source: str, splits: Tables, masker: Masker | None
    ) -> tuple[datasets.Dataset, dict[str, int]]:
        """Texts that lie in no split, with any label; and how many were left out."""
        read = read_texts(source, "task.unlabelled", column=self.text_column)
        texts = filled_texts(self._prepared(read, masker), "task.unlabelled", source)
        new = not_in(texts, splits)
        if not new:
            raise InputError(f"task.unlabelled: every text of {source} lies in a split already; name other texts")
        label = splits["train"].features["label"]
        rows = {"text": new, "label": [splits["train"][0]["label"]] * len(new)}
        types = datasets.Features({"text": datasets.Value("string"), "label": label})
        return datasets.Dataset.from_dict(rows, types), {"rows": len(new), "copies_left_out": len(texts) - len(new)}

    def _check_ids(self, tables: Tables, bad: BadRows) -> None:
        """A name that comes twice, in whatever splits, is a fault of the later row."""
        ids: set[Any] = set()
        for split, rows in tables.items() if self.id_column is not None else ():
            for row, name in enumerate(rows[self.id_column]):
                if name is None or name == "":
                    bad.add(split, row, "no id", f"has no id in column '{self.id_column}'")
                elif name in ids:
                    bad.add(
                        split, row, "duplicate id", f"has the id {name!r} in column '{self.id_column}' a second time"
                    )
                ids.add(name)

    def _keys(self, tables: Tables, bad: BadRows) -> dict[str, list[Any]]:
        """Split -> what its rows are sorted or grouped by; a row without is bad."""
        if self.split is None or self.split.by is None:
            return {name: [None] * len(rows) for name, rows in tables.items()}
        values = _values(tables, self.split.by)
        every = iter(self.split.keys(values, self.split.is_time(values)))
        keys = {name: list(islice(every, len(rows))) for name, rows in tables.items()}
        for split, column in keys.items():
            for row, key in enumerate(column):
                if key is None:
                    what = f"has nothing to split by in column '{self.split.by}'"
                    bad.add(split, row, "no place in the split", what)
        return keys

    def _with_kept(self, rows: datasets.Dataset, raw: datasets.Dataset) -> datasets.Dataset:
        """``keep_columns`` beside the texts, whatever these and their labels were called."""
        kept = [
            raw.select_columns([name]).rename_column(name, f"{KEPT}{name}") for name in dict.fromkeys(self.keep_columns)
        ]
        return datasets.concatenate_datasets([rows, *kept], axis=1)

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


def to_serve(task: Task) -> Task:
    """The task without the texts without labels, which are for training alone and may be gone where a model is used."""
    return replace(task, unlabelled=None) if isinstance(task, Classification) else task


def _summary(numbers: list[float]) -> dict[str, float]:
    return {"lowest": min(numbers), "mean": float(np.mean(numbers)), "highest": max(numbers)}


def _values(tables: Tables, column: str, rows: dict[str, list[int]] | None = None) -> list[Any]:
    """A small column of all splits, one after the other, or of these rows of each."""
    return [v for name, table in tables.items() for v in (table.select(rows[name]) if rows else table)[column]]
