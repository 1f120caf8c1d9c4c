"""Texts without labels: a file, or the splits of a data set folder."""

from collections.abc import Sequence
from pathlib import Path

from finllm_prune.errors import InputError
from finllm_prune.tasks.task import BUILTIN, FORMATS, read_file, read_folder, take


def read_texts(source: str, key: str, splits: Sequence[str] = ("train",), column: str = "text") -> list[str]:
    """The texts of a .txt (a text a line), .jsonl, .csv or .parquet file, or of these splits of a folder or of ``builtin``.

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
        return _filled(path.read_text(encoding="utf-8", errors="replace").splitlines(), key, source)
    else:
        raise InputError(
            f"{key}: {source} is no .txt, {', '.join(FORMATS)} file and no folder of splits; name one that is there"
        )
    columns = [take(rows, {"text_column": column}, f"{key}: {source}")["text_column"] for rows in tables]
    return _filled([text for texts in columns for text in texts], key, source)


def _filled(texts: Sequence[object], key: str, source: str) -> list[str]:
    if not (filled := [text for text in texts if isinstance(text, str) and text.strip()]):
        raise InputError(f"{key}: {source} holds no text; name a file or folder with some")
    return filled
