"""What commands share: the screen, the exit codes, a table of figures."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finllm_prune.errors import InputError

console = Console(emoji=False)  # n:m: is no code of one
BAD_INPUT, GATE_FAILED, PROOF_FAILED, NOT_PUSHED = 2, 3, 4, 5


def refuse_no_folder(file: Path | None, option: str = "--json") -> None:
    """A file that cannot be written is told before anything is measured."""
    if file is not None and not file.parent.is_dir():
        raise InputError(f"{option}: there is no folder {file.parent}; make it first, or name another file")
    if file is not None and file.is_dir():
        raise InputError(f"{option}: {file} is a folder; name a file in it")
    if file is not None and not os.access(file.parent, os.W_OK):
        raise InputError(f"{option}: the folder {file.parent} cannot be written into; name another file")


def save_json(figures: dict[str, Any], file: Path) -> None:
    """Whole or not at all."""
    from finllm_prune.staging import save_text

    save_text(json.dumps(figures, indent=2) + "\n", file)


def print_rows(rows: Sequence[tuple[str, ...]], title: str) -> None:
    """What, dense, pruned; or what, measured."""
    table = Table("", *(["dense", "pruned"] if len(rows[0]) == 3 else ["measured"]), title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
