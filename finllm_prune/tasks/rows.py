"""Rows as they lie in their files: on which line each begins, and which ones are bad."""

import codecs
import csv
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from finllm_prune.errors import InputError

logger = logging.getLogger(__name__)

Choice = Literal["refuse", "skip"]
BAD_ROWS = "bad_rows.jsonl"  # beside a run's report: each row that was left out, for whoever mends the data
_NAMED = 5  # skipped rows that a warning names
_REMEDY = "mend it, or leave such rows out by task.bad_rows: skip"


class Fault(NamedTuple):
    """A bad row: its number in its split, from 0; what is wrong in two words and in a predicate."""

    split: str
    row: int
    kind: str
    predicate: str


class BadRows:
    """The rows that cannot be learned from, refused or left out by the user's choice, never silently.

    Args:
        files: split -> the file that it was read from, where there is one.
        sizes: split -> the rows that were read.
        unreadable: split -> the lines that were left out because they are no text or no JSON.
        lines: split -> the line of each row, where whoever read the file knows it.
    """

    def __init__(
        self, files: dict[str, Path], sizes: dict[str, int], unreadable: dict[str, list[int]] | None = None,
        lines: dict[str, list[int]] | None = None,
    ):  # fmt: skip
        self.files = files
        self.sizes = sizes
        self.unreadable = unreadable or {}
        self.lines = dict(lines or {})
        self.found: dict[tuple[str, int], Fault] = {}

    def add(self, split: str, row: int, kind: str, predicate: str) -> None:
        """A row is bad once, however much is wrong with it."""
        self.found.setdefault((split, row), Fault(split, row, kind, predicate))

    def settle(self, choice: Choice) -> dict[str, dict[str, int]]:
        """Split -> what is wrong -> how many rows are left out.

        Raises:
            InputError: rows are to be refused, and one is bad; it names the first and the count.
        """
        faults = self._sorted()
        if faults and choice == "refuse":
            count = f" (the first of {len(faults)} bad rows)" if len(faults) > 1 else ""
            raise InputError(f"{self.places(faults[:1])[0]} {faults[0].predicate}{count}; {_REMEDY}")
        if left_out := self.left_out():
            bad = [(self.files[split], line) for split, lines in self.unreadable.items() for line in lines]
            named = [f"{path}, line {line}, is unreadable" for path, line in bad[:_NAMED]]
            first = faults[: _NAMED - len(named)]
            named += [f"{place} {fault.predicate}" for place, fault in zip(self.places(first), first, strict=True)]
            rest = f"; and {len(left_out) - len(named)} more" if len(left_out) > len(named) else ""
            logger.warning("task.bad_rows: %d rows are left out: %s%s.", len(left_out), "; ".join(named), rest)
        counts = {split: Counter(row["kind"] for row in left_out if row["split"] == split) for split in self.files}
        return {split: dict(counter) for split, counter in counts.items() if counter}

    def left_out(self) -> list[dict[str, Any]]:
        """Of each bad row ``file``, ``split``, ``kind``, and its ``line`` or, where that is not known, its ``row``."""
        rows: list[dict[str, Any]] = [
            {"file": str(self.files[split]), "split": split, "kind": "unreadable", "line": line}
            for split, lines in self.unreadable.items()
            for line in lines
        ]
        for fault in self._sorted():
            line = self._line(fault)
            place = {"row": fault.row} if line is None else {"line": line}
            rows.append({"file": str(self.files[fault.split]), "split": fault.split, "kind": fault.kind, **place})
        return rows

    def good(self, split: str) -> list[int]:
        """The rows of a split that are not bad."""
        return [row for row in range(self.sizes[split]) if (split, row) not in self.found]

    def places(self, faults: list[Fault]) -> list[str]:
        """Where rows lie: file and line; or split and row, where lines and rows do not go together."""
        named = []
        for fault in faults:
            path, line = self.files[fault.split], self._line(fault)
            named.append(f"{path}, split {fault.split}, row {fault.row}," if line is None else f"{path}, line {line},")
        return named

    def _sorted(self) -> list[Fault]:
        return sorted(self.found.values(), key=lambda fault: (list(self.files).index(fault.split), fault.row))

    def _line(self, fault: Fault) -> int | None:
        split = fault.split
        if split not in self.lines:  # a file is gone through once, however much is wrong in it
            self.lines[split] = first_lines(self.files[split], set(self.unreadable.get(split, [])))
        lines = self.lines[split]
        return lines[fault.row] if len(lines) == self.sizes[split] else None


def first_lines(path: Path, without: set[int]) -> list[int]:
    """The line on which each row of a jsonl or csv file begins; of other files none is known."""
    if path.suffix not in (".jsonl", ".csv") or not path.is_file():
        return []
    records = _csv_records(path) if path.suffix == ".csv" else _json_records(path)
    return [line for line, _ in records if line not in without]


def not_utf8(path: Path) -> list[int]:
    """The lines with bytes that are not UTF-8, from 1."""
    bad = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                bad.append(number)
    return bad


def bare_null(path: Path) -> int | None:
    """The first line of a JSON file that begins with ``null`` instead of a row: pyarrow takes the process down with it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"null"):
                return number
    return None


def copy_readable(path: Path, copy: Path) -> list[int]:
    """Write the rows that are UTF-8, and JSON if they should be, to ``copy``; returns the lines of the others."""
    with copy.open("w", encoding="utf-8", newline="") as out:
        return _copy_csv(path, out) if path.suffix == ".csv" else _copy_json(path, out)


def _copy_json(path: Path, out: TextIO) -> list[int]:
    bad = []
    for line, record in _json_records(path):
        try:
            text = record.decode()
            is_row = isinstance(json.loads(text), dict)
        except ValueError:
            is_row = False
        if is_row:
            out.write(text.rstrip("\r\n") + "\n")
        else:
            bad.append(line)
    return bad


def _copy_csv(path: Path, out: TextIO) -> list[int]:
    bad, writer = [], csv.writer(out)
    for line, fields in _csv_records(path, header=True):
        if writable("".join(fields)):
            writer.writerow(fields)
        else:
            bad.append(line)
    return bad


def writable(text: str) -> bool:
    """Whether a file can hold it: halves of a sign, which JSON may name and bytes that are not UTF-8 are read as, it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_records(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if record.strip():
                yield number, record


def _csv_records(path: Path, header: bool = False) -> Iterator[tuple[int, list[str]]]:
    """A quoted field may hold line breaks, so that a row begins where the one before it ended."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader, begin = csv.reader(file), 1
        for fields in reader:
            if fields and header:
                yield begin, fields
            header = header or bool(fields)
            begin = reader.line_num + 1
