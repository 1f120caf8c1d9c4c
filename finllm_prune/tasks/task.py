"""What a task provides, and how a data set is found and read."""

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import datasets
from transformers import DataCollator, PreTrainedTokenizerBase

from finllm_prune.errors import InputError

BUILTIN = Path(__file__).parents[1] / "data"
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Examples:
    """A data set, read and checked but not yet tokenized.

    Args:
        splits: "train", "validation", "test" -> rows with ``text`` (str) and ``label`` (int).
        labels: the class names, by index.
        source: where the rows come from, in words.
    """

    splits: dict[str, datasets.Dataset]
    labels: list[str]
    source: str

    def reordered(self, labels: list[str]) -> "Examples":
        """The same rows with the class names in another order."""
        index = [labels.index(name) for name in self.labels]
        splits = {
            name: datasets.Dataset.from_dict({"text": list(rows["text"]), "label": [index[i] for i in rows["label"]]})
            for name, rows in self.splits.items()
        }
        return Examples(splits, labels, self.source)

    def fingerprint(self) -> str:
        """sha256 over all rows of all splits, in order."""
        digest = hashlib.sha256()
        for name, rows in self.splits.items():
            for text, label in zip(rows["text"], rows["label"], strict=True):
                digest.update(f"{name}\0{text}\0{self.labels[label]}\0".encode())
        return digest.hexdigest()


class Task(Protocol):
    """A task: data, collator, metrics, the Auto class. Its fields are the keys of ``task`` in a recipe."""

    auto_class: ClassVar[Any]
    pipeline_tag: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    def load(self) -> Examples:
        """Read and check the data; raises InputError before anything is trained."""
        ...

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Rows -> input_ids, attention_mask, labels."""
        ...

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator: ...


def find_task(name: str) -> type[Task]:
    """The task that ``finllm_prune/tasks/<name>.py`` declares as ``TASK``."""
    try:
        task: type[Task] = importlib.import_module(f"finllm_prune.tasks.{name}").TASK
    except (ModuleNotFoundError, AttributeError):
        known = sorted(
            path.stem
            for path in Path(__file__).parent.glob("[a-z]*.py")
            if path.stem not in ("task", "texts", "markup")
        )
        raise InputError(f"task.name: unknown task '{name}'; known: {', '.join(known)}") from None
    return task


def read_splits(dataset: str, builtin: str) -> tuple[datasets.DatasetDict, str]:
    """``builtin``, a local folder of parquet, jsonl or csv splits, or a Hub id -> splits and their source in words."""
    if dataset == "builtin":
        return read_folder(BUILTIN / builtin), f"the {builtin} sentences that finllm-prune embeds"
    folder = Path(dataset)
    if folder.is_dir():
        return read_folder(folder), f"the local folder {folder.name}"
    if folder.is_absolute() or dataset.startswith(".") or dataset.count("/") > 1:
        raise InputError(f"task.dataset: there is no folder '{dataset}'; name a folder, a Hub id, or builtin")
    try:
        return datasets.load_dataset(dataset), f"{dataset} of the Hugging Face Hub"
    except (ConnectionError, FileNotFoundError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"task.dataset: '{dataset}' is neither a local folder nor a data set that the Hub gave ({reason}); "
            "check the name and the network, or download it and name its folder"
        ) from error


def take(rows: datasets.Dataset, columns: dict[str, str], where: str) -> dict[str, list[Any]]:
    """The named columns of a split as lists; a missing one is an error that lists what is there."""
    for key, column in columns.items():
        if column not in rows.column_names:
            raise InputError(
                f"{where}: there is no column '{column}' (task.{key}); its columns are {', '.join(rows.column_names)}"
            )
    return {key: list(rows[column]) for key, column in columns.items()}


def index_labels(values: Sequence[Any], labels: list[str], where: str) -> list[int]:
    """Label names or indices -> indices; an unknown one is an error that names its row."""
    index: dict[Any, int] = {name: i for i, name in enumerate(labels)} | {i: i for i in range(len(labels))}
    out = []
    for row, value in enumerate(values):
        if not isinstance(value, str | int | float) or value not in index:
            raise InputError(
                f"{where}: row {row} has the unknown label {value!r}; known are {', '.join(labels)}: "
                "mend the row or set task.labels"
            )
        out.append(index[value])
    return out


def read_folder(folder: Path) -> datasets.DatasetDict:
    """The splits of a folder, each a parquet, jsonl or csv file."""
    splits = {}
    for name in ("train", "validation", "test"):
        files = [path for suffix in FORMATS if (path := folder / f"{name}{suffix}").is_file()]
        if files:
            splits[name] = read_file(files[0], name)
    if not splits:
        raise InputError(f"task.dataset: {folder} holds no train, validation or test .parquet, .jsonl or .csv file")
    return datasets.DatasetDict(splits)


def read_file(path: Path, split: str) -> datasets.Dataset:
    """The rows of a parquet, jsonl or csv file."""
    try:
        rows = datasets.load_dataset(FORMATS[path.suffix], data_files={split: str(path)}, split=split)
    except (ValueError, TypeError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        reason = " ".join((str(error.__cause__ or error) or "it is empty").split())
        raise InputError(f"{path} cannot be read as {path.suffix[1:]} ({reason}); mend it") from error
    if path.suffix == ".csv" and "__index_level_0__" in rows.column_names:
        raise InputError(f"{path}: its rows have more fields than its header; put texts with a comma in quotes")
    return rows
