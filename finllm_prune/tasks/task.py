"""What a task provides, and how a data set is found and read."""

import hashlib
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import datasets
from torch import Tensor
from transformers import DataCollator, PreTrainedTokenizerBase

from finllm_prune.errors import InputError
from finllm_prune.tasks.rows import bare_null, copy_readable, not_utf8

BUILTIN = Path(__file__).parents[1] / "data"
Loss = Callable[[Tensor, Tensor], Tensor]
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Examples:
    """A data set, read and checked but not yet tokenized.

    Args:
        splits: "train", "validation", "test" -> rows with ``text`` (str) and ``label`` (int), and ``pair`` (str) where a
            label is of two texts.
        labels: the class names, by index.
        source: where the rows come from, in words.
        facts: what was done to the rows and found in them, for the report.
    """

    splits: dict[str, datasets.Dataset]
    labels: list[str]
    source: str
    facts: dict[str, Any] = field(default_factory=dict)

    def reordered(self, labels: list[str]) -> "Examples":
        """The same rows with the class names in another order."""
        index = [labels.index(name) for name in self.labels]
        splits = {
            name: datasets.Dataset.from_dict({**rows[:], "label": [index[i] for i in rows["label"]]})
            for name, rows in self.splits.items()
        }
        return replace(self, splits=splits, labels=labels)

    def texts(self, split: str) -> list[str]:
        """All texts of a split, second texts of pairs after the first ones."""
        rows = self.splits[split]
        return [text for name in ("text", "pair") if name in rows.column_names for text in rows[name]]

    def fingerprint(self) -> str:
        """sha256 over all rows of all splits, in order."""
        digest = hashlib.sha256()
        for name, rows in self.splits.items():
            pairs = [f"{pair}\0" for pair in rows["pair"]] if "pair" in rows.column_names else [""] * len(rows)
            for text, pair, label in zip(rows["text"], pairs, rows["label"], strict=True):
                digest.update(f"{name}\0{text}\0{pair}{self.labels[label]}\0".encode())
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

    def loss(self, examples: Examples) -> Loss | None:
        """(logits, labels) -> the mean over the rows, in place of the model's own loss; None leaves it to the model."""
        ...


def find_task(name: str) -> type[Task]:
    """The task that ``finllm_prune/tasks/<name>.py`` declares as ``TASK``."""
    try:
        task: type[Task] = importlib.import_module(f"finllm_prune.tasks.{name}").TASK
    except (ModuleNotFoundError, AttributeError):
        files = Path(__file__).parent.glob("[a-z]*.py")
        known = sorted(path.stem for path in files if "\nTASK = " in path.read_text(encoding="utf-8"))
        raise InputError(f"task.name: unknown task '{name}'; known: {', '.join(known)}") from None
    return task


def read_splits(
    dataset: str, builtin: str, left_out: dict[str, list[int]] | None = None
) -> tuple[datasets.DatasetDict, str]:
    """``builtin``, a local folder of parquet, jsonl or csv splits, or a Hub id -> splits and their source in words.

    ``left_out`` is told the lines of each split that cannot be read; None refuses such a file.
    """
    if dataset == "builtin":
        return read_folder(BUILTIN / builtin), f"the {builtin} sentences that finllm-prune embeds"
    folder = Path(dataset)
    if folder.is_dir():
        return read_folder(folder, left_out), f"the local folder {folder.name}"
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


def split_files(folder: Path) -> dict[str, Path]:
    """Split -> its file in a folder, where there is one."""
    names = ("train", "validation", "test")
    files = {name: [path for suffix in FORMATS if (path := folder / f"{name}{suffix}").is_file()] for name in names}
    return {name: found[0] for name, found in files.items() if found}


def read_folder(folder: Path, left_out: dict[str, list[int]] | None = None) -> datasets.DatasetDict:
    """The splits of a folder, each a parquet, jsonl or csv file; for ``left_out`` see ``read_splits``."""
    splits = {}
    for name, path in split_files(folder).items():
        bad: list[int] | None = None if left_out is None else []
        splits[name] = read_file(path, name, bad)
        if left_out is not None and bad:
            left_out[name] = bad
    if not splits:
        raise InputError(f"task.dataset: {folder} holds no train, validation or test .parquet, .jsonl or .csv file")
    return datasets.DatasetDict(splits)


def read_file(path: Path, split: str, left_out: list[int] | None = None) -> datasets.Dataset:
    """The rows of a parquet, jsonl or csv file.

    ``left_out`` is told the lines of a jsonl or csv file that are no UTF-8 or no JSON; None refuses such a file.
    """
    if left_out is not None and path.suffix in (".jsonl", ".csv"):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            left_out += copy_readable(path, copy)
            if left_out:
                return _loaded(copy, split, named=path, cache_dir=folder, keep_in_memory=True)
    elif path.suffix != ".parquet" and (bad := not_utf8(path)):
        count = f" (the first of {len(bad)} such lines)" if len(bad) > 1 else ""
        raise InputError(
            f"{path}, line {bad[0]}, holds bytes that are not UTF-8{count}; save it as UTF-8, or leave such rows of "
            "task.dataset out by task.bad_rows: skip"
        )
    if path.suffix in (".json", ".jsonl") and (line := bare_null(path)) is not None:
        raise InputError(f"{path}, line {line}, is no row, but null; take it out")
    return _loaded(path, split, named=path)


def _loaded(path: Path, split: str, named: Path, **options: Any) -> datasets.Dataset:
    try:
        rows = datasets.load_dataset(FORMATS[path.suffix], data_files={split: str(path)}, split=split, **options)
    except (ValueError, TypeError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        reason = " ".join((str(error.__cause__ or error) or "it is empty").split())
        raise InputError(f"{named} cannot be read as {path.suffix[1:]} ({reason}); mend it") from error
    if path.suffix == ".csv" and "__index_level_0__" in rows.column_names:
        raise InputError(f"{named}: its rows have more fields than its header; put texts with a comma in quotes")
    return rows
