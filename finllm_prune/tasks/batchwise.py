"""Rows made from rows in batches, through a file: memory holds one batch of them, however many there are."""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import get_temporary_cache_files_directory

BATCH = 64  # documents may have megabytes

Batch = dict[str, list[Any]]


def rewritten(
    rows: datasets.Dataset, change: Callable[[Batch, Sequence[int]], Batch], features: datasets.Features | None = None
) -> datasets.Dataset:
    """The rows that ``change`` makes of a batch and its row numbers, in a file that goes with this process.

    ``Dataset.map`` alone would pickle ``change`` to name the file, and keep it for good.

    Args:
        features: of the new columns; None takes those of the first rows.
    """
    name = uuid.uuid4().hex
    return rows.map(
        lambda batch, numbers: change(dict(batch), numbers),
        with_indices=True,
        batched=True,
        batch_size=BATCH,
        writer_batch_size=BATCH,
        features=features,
        remove_columns=rows.column_names,
        cache_file_name=str(Path(get_temporary_cache_files_directory()) / f"{name}.arrow"),
        load_from_cache_file=False,
        new_fingerprint=name,
        desc="read",
    )
