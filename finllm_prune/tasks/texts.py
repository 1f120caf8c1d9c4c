"""Texts without labels: a file, or the splits of a data set folder."""

import logging
from collections.abc import Sequence
from pathlib import Path

from finllm_prune.errors import InputError
from finllm_prune.tasks.files import FORMATS, read_file, read_folder
from finllm_prune.tasks.rows import not_utf8
from finllm_prune.tasks.task import BUILTIN, take

logger = logging.getLogger(__name__)


def read_texts(source: str, key: str, splits: Sequence[str] = ("train",), column: str = "text") -> list[str]:
    """The texts of a .txt (a text a line), .jsonl, .csv or .parquet file, or of these splits of a folder or of ``builtin``.

    Rows without a text have nothing to give, so they are passed over and counted; blank lines of a .txt are no rows.

    Args:
        key: the option or the recipe's key that named the source, for the error.

    Raises:
        InputError: there is no such source, it cannot be read, or it holds no text.
    """
    path = BUILTIN / "sentiment" if source == "builtin" else Path(source)
    if path.is_dir():
        tables = [rows for name, rows in read_folder(path).items() if name in splits]
    elif path.is_file() and path.suffix in FORMATS:
        tables = [read_file(path, "train")]
    elif path.is_file() and path.suffix == ".txt":
        if bad := not_utf8(path):
            count = f" (the first of {len(bad)} such lines)" if len(bad) > 1 else ""
            raise InputError(f"{key}: {path}, line {bad[0]}, holds bytes that are not UTF-8{count}; save it as UTF-8")
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        return filled_texts(lines, key, source)
    else:
        raise InputError(
            f"{key}: {source} is no .txt, {', '.join(FORMATS)} file and no folder of splits; name one that is there"
        )
    columns = [take(rows, {"text_column": column}, f"{key}: {source}")["text_column"] for rows in tables]
    return filled_texts([text for texts in columns for text in texts], key, source)


def filled_texts(rows: Sequence[object], key: str, source: str) -> list[str]:
    """What is a text and not empty; raises InputError where nothing is."""
    if not (filled := [text for text in rows if isinstance(text, str) and text.strip()]):
        raise InputError(f"{key}: {source} holds no text; name a file or folder with some")
    if empty := len(rows) - len(filled):
        logger.warning("%s: %d of %d rows of %s hold no text and are passed over.", key, empty, len(rows), source)
    return filled
