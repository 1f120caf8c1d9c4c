"""A pruned model against the dense one on anybody's own texts, with labels or without."""

import csv
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from finllm_prune.errors import InputError
from finllm_prune.evaluation import compare, quality_rows
from finllm_prune.hub.base_model import locate
from finllm_prune.loading import class_names, load_config
from finllm_prune.saved import Saved
from finllm_prune.tasks import Examples
from finllm_prune.tasks.label_sets import find_in
from finllm_prune.tasks.sentiment import Sentiment
from finllm_prune.tasks.task import FORMATS, read_file

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with what a spreadsheet takes a cell for a formula


@dataclass(frozen=True)
class Compared:
    """What came of it.

    Args:
        figures: ``rows``, ``agreement``, ``flips`` (from → to -> rows), and what ``evaluation.compare`` finds where the rows
            have labels.
        rows: the table: what, dense, pruned.
        flipped: row (the first is 1), text, and what each of the models says of it, where they differ.
    """

    figures: dict[str, Any]
    rows: list[tuple[str, ...]]
    flipped: list[tuple[int, str, str, str]]

    def write_flips(self, path: Path) -> None:
        """As .csv; cells that a spreadsheet would take for formulas begin with an apostrophe."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "text", "dense", "pruned"])
            writer.writerows([row, *map(inert, cells)] for row, *cells in self.flipped)


def inert(cell: str) -> str:
    """A cell of a .csv file that no spreadsheet computes."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def compare_on(
    model: str, baseline: str, data: Path, text: str = "text", label: str = "label", max_length: int = 128
) -> Compared:
    """Hold two classifiers of the same classes against each other on the rows of a file.

    Args:
        model, baseline: saved models or Hub ids, the pruned one and the dense one.
        data: a .csv, .jsonl or .parquet file.
        text, label: its columns; where there is no label column, only the models are compared.

    Raises:
        InputError: the file or a model cannot be read, a row has no text or an unknown label, or the classes are not the same.
    """
    texts, given = _read(data, text, label)
    labels = class_names(load_config(locate(baseline, "BASELINE", served=True)[0]))
    references = None if given is None else _indices(given, labels, data)
    rows_of = datasets.Dataset.from_dict({"text": texts, "label": references or [0] * len(texts)})
    task, examples = Sentiment(max_length=max_length), Examples({"test": rows_of}, labels, data.name)
    logits = {name: Saved(name, task, examples).logits(rows_of) for name in (baseline, model)}
    dense, pruned = (logits[name].argmax(-1).numpy() for name in (baseline, model))
    differ = np.flatnonzero(dense != pruned)
    flipped = [(int(i) + 1, texts[i], labels[dense[i]], labels[pruned[i]]) for i in differ]
    kinds = {f"{was} → {now}": n for (was, now), n in Counter((f[2], f[3]) for f in flipped).most_common()}
    figures: dict[str, Any] = {"rows": len(texts), "agreement": float((dense == pruned).mean()), "flips": kinds}
    rows: list[tuple[str, ...]] = [("rows", "", f"{len(texts):,}")]
    if references is None:
        rows.append(("same prediction (agreement)", "", f"{figures['agreement']:.1%}"))
    else:
        quality = compare(task.judge(examples), logits[baseline], logits[model])
        figures = asdict(quality) | figures | {"right_or_wrong": quality.flips}
        rows += quality_rows(quality)
    rows += [(f"  {kind}", "", str(count)) for kind, count in kinds.items()]
    return Compared(figures, rows, flipped)


def _read(data: Path, text: str, label: str) -> tuple[list[str], list[Any] | None]:
    if not data.is_file() or data.suffix not in FORMATS:
        raise InputError(f"--data: {data} is no {', '.join(FORMATS)} file; name one that is there")
    rows = read_file(data, "test")
    if text not in rows.column_names:
        raise InputError(f"--text: {data} has no column '{text}', but {', '.join(rows.column_names)}; name one of them")
    texts = list(rows[text])
    bad = [row for row, value in enumerate(texts, 1) if not isinstance(value, str) or not value.strip()]
    if bad or not texts:
        where = f"row {bad[0]} has" if bad else "it has"
        raise InputError(f"--data: {data}: {where} no text in column '{text}'; mend it")
    return texts, list(rows[label]) if label in rows.column_names else None


def _indices(given: list[Any], labels: list[str], data: Path) -> list[int]:
    find, found = find_in(labels), []
    for row, value in enumerate(given, 1):
        if (index := find(value)) is None:
            raise InputError(
                f"--data: {data}: row {row} has the label {value!r}, and the models know {', '.join(labels)}; mend it, or name "
                "a column that is not there by --label to compare without labels"
            )
        found.append(index)
    return found
