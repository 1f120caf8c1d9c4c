"""Files of rows: the parquet, jsonl and csv splits of a folder."""

import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from datasets.fingerprint import get_temporary_cache_files_directory
from pandas.io.parsers import TextFileReader

from finllm_prune.errors import InputError
from finllm_prune.tasks.rows import bare_null, copy_readable, not_utf8

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_CELLS: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}  # of a csv: "None" and "NA" are texts


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
        folder = tempfile.mkdtemp(dir=get_temporary_cache_files_directory())
        copy = Path(folder) / path.name
        left_out += copy_readable(path, copy)
        if left_out:
            return _loaded(copy, split, named=path, cache_dir=folder)
        copy.unlink()
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
    options |= {"data_files": {split: str(path)}, "split": split}
    try:
        kind = FORMATS[path.suffix]
        rows = _of_csv(path, options) if kind == "csv" else datasets.load_dataset(kind, **options)
    except (ValueError, TypeError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        reason = " ".join((str(error.__cause__ or error) or "it is empty").split())
        raise InputError(f"{named} cannot be read as {path.suffix[1:]} ({reason}); mend it") from error
    if path.suffix == ".csv" and "__index_level_0__" in rows.column_names:
        raise InputError(f"{named}: its rows have more fields than its header; put texts with a comma in quotes")
    return rows


def _of_csv(path: Path, options: dict[str, Any]) -> Any:
    """The rows of a csv: datasets takes their types from the first ones; where others do not fit, all are looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.DtypeWarning)
        try:
            return _closed(lambda: datasets.load_dataset("csv", **_CELLS, **options))
        except datasets.exceptions.DatasetGenerationError:
            return _closed(lambda: datasets.load_dataset("csv", features=_types(path), **_CELLS, **options))


def _closed(load: Callable[[], Any]) -> Any:
    """What ``load`` gives; datasets itself leaves a csv open that it cannot read to the end."""
    try:
        return load()
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None:
            for frame, _ in traceback.walk_tb(cause.__traceback__):
                if isinstance(reader := frame.f_locals.get("csv_file_reader"), TextFileReader):
                    reader.close()
            cause = cause.__cause__
        raise


def _types(path: Path) -> datasets.Features:
    """The types that fit all rows of a csv: whole numbers, numbers, truth values or else texts."""
    kinds: dict[str, set[str]] = {}
    with pd.read_csv(path, chunksize=10_000, low_memory=False, **_CELLS) as parts:
        for part in parts:
            if not isinstance(part.index, pd.RangeIndex):  # more fields than the header has
                part = part.reset_index(names=[f"__index_level_{i}__" for i in range(part.index.nlevels)])
            for name, dtype in part.dtypes.items():
                kinds.setdefault(str(name), set()).add(dtype.kind)
    types = {"i": "int64", "f": "float64", "fi": "float64", "b": "bool"}
    return datasets.Features(
        {name: datasets.Value(types.get("".join(sorted(found)), "string")) for name, found in kinds.items()}
    )
