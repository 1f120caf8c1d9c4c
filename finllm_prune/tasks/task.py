"""What a task provides, and where its data set is found."""

import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import datasets
from torch import Tensor
from transformers import DataCollator, PreTrainedConfig, PreTrainedTokenizerBase

from finllm_prune.errors import InputError, one_line
from finllm_prune.judges import Judge
from finllm_prune.tasks.batchwise import Batch, rewritten
from finllm_prune.tasks.files import read_folder

BUILTIN = Path(__file__).parents[1] / "data"
PARQUET = "refs/convert/parquet"
KEPT = "keep_columns."  # what the names of columns begin with that a task keeps beside its texts
T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Examples:
    """A data set, read and checked but not yet tokenized.

    Args:
        splits: "train", "validation", "test" -> rows with ``text`` (str) and ``label``, and ``pair`` (str) where a label is of
            two texts. A label is the index of a class, a number (float), or 1 and 0 for each of several labels.
        labels: the class names, by index.
        source: where the rows come from, in words.
        facts: what was done to the rows and found in them, for the report.
        left_out: each bad row; see ``BadRows.left_out``.
        unlabelled: more training rows, whose labels mean nothing before a teacher has given them; None without.
    """

    splits: dict[str, datasets.Dataset]
    labels: list[str]
    source: str
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    unlabelled: datasets.Dataset | None = None

    def reordered(self, labels: list[str]) -> "Examples":
        """The same rows with the class names in another order."""
        index = [labels.index(name) for name in self.labels]
        if index == list(range(len(labels))):
            return self

        def turn(batch: Batch, _: Sequence[int]) -> Batch:
            return batch | {"label": [_moved(label, index) for label in batch["label"]]}

        splits = {name: rewritten(rows, turn, rows.features) for name, rows in self.splits.items()}
        return replace(self, splits=splits, labels=labels)

    def texts(self, split: str) -> list[str]:
        """All texts of a split, second texts of pairs after the first ones."""
        rows = self.splits[split]
        return [text for name in ("text", "pair") if name in rows.column_names for text in rows[name]]

    def counts(self, split: str) -> dict[str, int]:
        """Label -> rows of a split."""
        return dict(Counter(name for label in self.splits[split]["label"] for name in self._names(label)))

    def _names(self, label: int | float | list[float]) -> list[str]:
        """The labels of a row; a number has none."""
        if isinstance(label, float):
            return []
        return [self.labels[label]] if isinstance(label, int) else [self.labels[i] for i, on in enumerate(label) if on]

    def fingerprint(self) -> str:
        """sha256 over all rows of all splits, in order, and the texts without labels."""
        digest = hashlib.sha256()
        for name, rows in self.splits.items():
            pairs = [f"{pair}\0" for pair in rows["pair"]] if "pair" in rows.column_names else [""] * len(rows)
            for text, pair, label in zip(rows["text"], pairs, rows["label"], strict=True):
                named = repr(label) if isinstance(label, float) else "\1".join(sorted(self._names(label)))
                digest.update(f"{name}\0{text}\0{pair}{named}\0".encode())
        for text in self.unlabelled["text"] if self.unlabelled is not None else ():
            digest.update(f"unlabelled\0{text}\0".encode())
        return digest.hexdigest()


def _moved(label: int | list[float], index: list[int]) -> int | list[float]:
    """A label where class i has become class ``index[i]``."""
    if isinstance(label, int):
        return index[label]
    moved = [0.0] * len(index)
    for i, on in zip(index, label, strict=True):
        moved[i] = on
    return moved


class Task(Protocol):
    """A task: data, collator, metrics, the Auto class. Its fields are the keys of ``task`` in a recipe."""

    pipeline_tag: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    @property
    def auto_class(self) -> Any:
        """Has the ``from_pretrained`` that makes a model with a head for the task."""
        ...

    def load(self) -> Examples:
        """Read and check the data; raises InputError before anything is trained."""
        ...

    def fit_tokenizer(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """Set what whoever serves the model is to find in its tokenizer; ``config`` is that of the checkpoint."""
        ...

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Rows -> input_ids, attention_mask, labels."""
        ...

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator: ...

    def loss(self, examples: Examples) -> Loss | None:
        """(logits, labels) -> the mean over the rows, in place of the model's own loss; None leaves it to the model."""
        ...

    def head_config(self, labels: list[str]) -> dict[str, Any]:
        """What ``from_pretrained`` is told of the head: ``num_labels``, their names, ``problem_type``."""
        ...

    def judge(self, examples: Examples, split: str = "test") -> Judge:
        """Who knows the right answers to a split."""
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
    dataset: str, builtin: str, left_out: dict[str, list[int]] | None = None,
    config: str | None = None, revision: str | None = None,
) -> tuple[datasets.DatasetDict, str]:  # fmt: skip
    """``builtin``, a local folder of parquet, jsonl or csv splits, or a Hub id -> splits and their source in words.

    ``left_out`` is told the lines of each split that cannot be read; None refuses such a file. ``config`` and ``revision`` are
    of a Hub id.
    """
    refuse_hub_keys(dataset, config, revision)
    if dataset == "builtin":
        return read_folder(BUILTIN / builtin), f"the {builtin} sentences that finllm-prune embeds"
    folder = Path(dataset)
    if folder.is_dir():
        return read_folder(folder, left_out), f"the local folder {folder.name}"
    source = " ".join(part for part in (dataset, config, revision and f"at {revision}") if part)
    # The branch that the Hub itself converts to parquet has a folder for each configuration, and no names for them.
    part = {"data_dir" if revision == PARQUET else "name": config}
    found = of_hub(dataset, lambda: datasets.load_dataset(dataset, revision=revision, **part))
    return found, f"{source} of the Hugging Face Hub"


def refuse_hub_keys(dataset: str, config: str | None, revision: str | None) -> None:
    """What alone a Hub id has is asked of nothing else."""
    if (config or revision) and (dataset == "builtin" or Path(dataset).is_dir()):
        raise InputError(
            f"task.{'config' if config else 'revision'}: {dataset} is no Hub id, which alone has such; remove the key"
        )


def of_hub(dataset: str, load: Callable[[], T]) -> T:
    """What ``load`` brings of a Hub id, or of a folder into which a repository of the Hub was downloaded.

    Raises:
        InputError: it is a folder that is not there, or the Hub does not give it.
    """
    is_path = Path(dataset).is_absolute() or dataset.startswith(".") or dataset.count("/") > 1
    if is_path and not Path(dataset).is_dir():
        raise InputError(f"task.dataset: there is no folder '{dataset}'; name a folder, a Hub id, or builtin")
    try:
        return load()
    except (ConnectionError, FileNotFoundError, ValueError, RuntimeError) as error:
        raise InputError(
            f"task.dataset: '{dataset}' is neither a local folder nor a data set that the Hub gave ({one_line(error)}); "
            "check the name and the network, or download it and name its folder"
        ) from error


def take(rows: datasets.Dataset, columns: dict[str, str], where: str) -> dict[str, list[Any]]:
    """The named columns of a split as lists."""
    check_columns(rows, columns, where)
    return {key: list(rows[column]) for key, column in columns.items()}


def check_columns(rows: datasets.Dataset, columns: dict[str, str], where: str) -> None:
    """A missing column is an error that lists what is there."""
    for key, column in columns.items():
        if column not in rows.column_names:
            raise InputError(
                f"{where}: there is no column '{column}' (task.{key}); its columns are {', '.join(rows.column_names)}"
            )
