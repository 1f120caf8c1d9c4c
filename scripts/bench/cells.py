"""The cells of the benchmark: what decides a result, and the file of rows that several processes write together.

A finished cell is one line of ``rows.jsonl``. Its key is a hash of everything that decides its result, defaults included,
so a changed default is a new cell; what is off (null or false) is left out, so that a new knob does not make old rows
another's. Who works on a cell holds a lock on a file of its name, which the system takes back
when the process ends, however it ends: no claim can go stale.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Row = dict[str, Any]

_OFF = {"moments": "whole", "regrow": True}  # a knob's value where it is off, though neither null nor false


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark.

    Args:
        method: a name of ``METHODS``.
        sparsity: asked of it; 0 for dense fine-tuning.
        seed, learning_rate: of the training.
        settings: all else that decides the result and is on, as plain data: of the protocol, and of the method.
    """

    method: str
    sparsity: float
    seed: int
    learning_rate: float
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        return digest(asdict(self))

    def __str__(self) -> str:
        sparsity = f" {self.sparsity:g}" if self.sparsity else ""
        return f"{self.method}{sparsity}, seed {self.seed}, learning rate {self.learning_rate:g}"


def digest(data: Any) -> str:
    """A short name for plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def what_is_on(data: Any) -> Any:
    """Plain data without the knobs that are off."""
    if isinstance(data, dict):
        return {key: what_is_on(value) for key, value in data.items() if not _is_off(key, value)}
    return [what_is_on(item) for item in data] if isinstance(data, list) else data


def _is_off(knob: str, value: Any) -> bool:
    return value == _OFF[knob] if knob in _OFF else value is None or value is False


def read(out: Path) -> dict[str, Row]:
    """Key -> row of each finished cell, in the order in which they were finished."""
    file = out / "rows.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows: dict[str, Row] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a process was killed in the middle of its line: that cell is not finished
        rows[row["key"]] = row
    return rows


def append(out: Path, row: Row) -> None:
    """Add a row, whole, whatever other processes write; a line that a kill cut short is closed first."""
    file = out / "rows.jsonl"
    with _lock(out, "rows"):
        torn = file.is_file() and not file.read_bytes().endswith(b"\n")
        with file.open("ab") as stream:
            stream.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


@contextmanager
def claimed(out: Path, name: str, wait: bool = False) -> Iterator[bool]:
    """Whether this process may work on what has this name; with ``wait`` it does as soon as the other one is done."""
    lock = _lock(out, name)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _lock(out: Path, name: str) -> FileLock:
    folder = out / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")
