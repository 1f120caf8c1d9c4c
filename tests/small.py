"""A data set that trains in a second: own sentences with loud words, so that even a tiny model can learn them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import finllm_prune.conclusion
import finllm_prune.saved
from finllm_prune.evaluation import compare
from finllm_prune.evaluation.evidence import collect

TinyFolder = Callable[..., Path]

SENTENCES = {
    "positive": [
        "Profit rose strongly.",
        "Sales rose to a record.",
        "Earnings beat the forecast and rose.",
        "The margin improved strongly.",
        "Orders rose by a third.",
        "A record year: profit and sales rose.",
        "Revenue growth was strong.",
        "The dividend rose after strong growth.",
        "Strong demand, record orders.",
        "Cash flow improved to a record.",
        "Growth was strong in all regions.",
        "Earnings improved and the outlook rose.",
    ],
    "negative": [
        "Profit fell sharply.",
        "Sales fell to a low.",
        "Earnings missed the forecast and fell.",
        "The margin declined sharply.",
        "Orders fell by a third.",
        "A weak year: profit and sales fell.",
        "Revenue decline was sharp.",
        "The dividend was cut after a loss.",
        "Weak demand, cancelled orders.",
        "Cash flow declined to a loss.",
        "Demand was weak in all regions.",
        "The loss widened and the outlook fell.",
    ],
    "neutral": [
        "The meeting is on Tuesday.",
        "The report has four tables.",
        "The office is in the city.",
        "The board has nine members.",
        "The meeting is held in the office.",
        "The fiscal year ends in June.",
        "The registrar keeps the list of members.",
        "The company has its office in the city.",
        "The table is on page four of the report.",
        "The annual meeting is held in May.",
        "The board meets on Tuesday.",
        "The report is on the website.",
    ],
}
SPLITS = {"train": slice(0, 8), "validation": slice(8, 9), "test": slice(9, 12)}


def rows(split: str) -> list[dict[str, str]]:
    """The rows of a split, the labels in turn."""
    parts = [[{"text": text, "label": label} for text in texts[SPLITS[split]]] for label, texts in SENTENCES.items()]
    return [row for group in zip(*parts, strict=True) for row in group]


def write_jsonl(path: Path, content: list[dict[str, object]] | list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def write_folder(folder: Path) -> Path:
    """A folder with all three splits."""
    for split in SPLITS:
        write_jsonl(folder / f"{split}.jsonl", rows(split))
    return folder


def quick_compare() -> Callable[..., object]:
    """``compare`` with 9 resamples instead of 999."""
    return partial(compare, resamples=9)


def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bootstrap with 9 resamples instead of 999: the intervals are no part of the test, and half of its time."""
    for module in (finllm_prune.conclusion, finllm_prune.saved):
        monkeypatch.setattr(module, "compare", partial(compare, resamples=9))
    monkeypatch.setattr(finllm_prune.conclusion, "collect", partial(collect, resamples=9))
