"""A pruned model against the dense one on anybody's own texts, with labels or without."""

import csv
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from finllm_prune.errors import InputError
from finllm_prune.evaluation import compare, quality_rows
from finllm_prune.hub.base_model import locate
from finllm_prune.loading import class_names, load_config
from finllm_prune.saved import Saved, task_of_texts
from finllm_prune.tasks import Examples
from finllm_prune.tasks.classification import Classification
from finllm_prune.tasks.files import FORMATS, read_file
from finllm_prune.tasks.label_column import LabelColumn
from finllm_prune.tasks.sentiment import Sentiment

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
    model: str, baseline: str, data: Path, text: str = "text", label: str = "label", max_length: int | None = None
) -> Compared:
    """Hold two classifiers of the same classes against each other on the rows of a file.

    Args:
        model, baseline: saved models or Hub ids, the pruned one and the dense one.
        data: a .csv, .jsonl or .parquet file.
        text, label: its columns; where there is no label column, only the models are compared.
        max_length: tokens; None takes those of the pruned model's recipe, whose task reads the texts as in training. Where no
            recipe lies beside it, a text is its first 128 tokens.

    Raises:
        InputError: the file or a model cannot be read, a row has no text or an unknown label, the classes are not the same, or
            the models tell no classes.
    """
    config = load_config(locate(baseline, "BASELINE", served=True)[0])
    labels = class_names(config)
    if len(labels) < 2 or config.problem_type in ("regression", "multi_label_classification"):
        raise InputError(
            f"BASELINE: {baseline} tells scores, or several labels of a text, and classes are compared here; use `finllm-prune "
            "evaluate MODEL --baseline DENSE --dataset FOLDER`"
        )
    rows = _read(data, text)
    texts, task = list(rows[text]), _task(model, max_length)
    references = _indices(rows, label, task, labels, data) if label in rows.column_names else None
    rows_of = datasets.Dataset.from_dict({"text": task.prepared(texts), "label": references or [0] * len(texts)})
    examples = Examples({"test": rows_of}, labels, data.name)
    logits = {name: Saved(name, task, examples).logits(rows_of) for name in (baseline, model)}
    dense, pruned = (logits[name].argmax(-1).numpy() for name in (baseline, model))
    differ = np.flatnonzero(dense != pruned)
    flipped = [(int(i) + 1, texts[i], labels[dense[i]], labels[pruned[i]]) for i in differ]
    kinds = {f"{was} → {now}": n for (was, now), n in Counter((f[2], f[3]) for f in flipped).most_common()}
    figures: dict[str, Any] = {"rows": len(texts), "agreement": float((dense == pruned).mean()), "flips": kinds}
    table: list[tuple[str, ...]] = [("rows", "", f"{len(texts):,}")]
    if references is None:
        table.append(("same prediction (agreement)", "", f"{figures['agreement']:.1%}"))
    else:
        quality = compare(task.judge(examples), logits[baseline], logits[model])
        figures = asdict(quality) | figures | {"right_or_wrong": quality.flips}
        table += quality_rows(quality)
    table += [(f"  {kind}", "", str(count)) for kind, count in kinds.items()]
    return Compared(figures, table, flipped)


def _task(model: str, max_length: int | None) -> Classification:
    """Reads texts as the pruned model's recipe did."""
    own = task_of_texts(model, locate(model, served=True)[0])
    if own is not None and own.mask is not None and own.mask.column is not None:
        raise InputError(
            f"{model}: in training the names of column '{own.mask.column}' were masked; use `finllm-prune evaluate MODEL "
            "--baseline DENSE --dataset FOLDER` on a file with this column"
        )
    task = own or Sentiment()
    return task if max_length is None else replace(task, max_length=max_length)


def _read(data: Path, text: str) -> datasets.Dataset:
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
    return rows


def _indices(rows: datasets.Dataset, label: str, task: Classification, labels: list[str], data: Path) -> list[int]:
    numbers = getattr(rows.features[label], "dtype", "").startswith("float")  # which are no indices of classes
    column = LabelColumn(label, labels, task.thresholds if numbers else None, None, None)
    found = column.read(rows[label], labels, rows.features[label])
    for row, (value, index) in enumerate(zip(rows[label], found, strict=True), 1):
        if index is None:
            raise InputError(
                f"--data: {data}: row {row} has the label {value!r}, and the models know {', '.join(labels)}; mend it, or name "
                "a column that is not there by --label to compare without labels"
            )
    return found
