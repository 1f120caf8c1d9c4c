"""Splits made anew: no group on two sides, sizes, time order; copies in two splits."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finllm_prune.errors import InputError
from finllm_prune.recipe import parse
from finllm_prune.tasks import KEPT
from finllm_prune.tasks.sentiment import Sentiment
from finllm_prune.tasks.splitting import SPLITS, Split, leakage, near_key, without_copies
from tests import small

groups = st.lists(st.integers(0, 12), min_size=3, max_size=60).filter(lambda keys: len(set(keys)) > 2)
parts = st.sampled_from([(0.1, 0.2), (0.2, 0.2), (0.3, 0.4), (0.01, 0.01), (0.49, 0.5)])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.mark.parametrize("time", [True, False])
@settings(max_examples=100, deadline=None)
@given(keys=groups, part=parts, seed=st.integers(0, 3))
def test_each_row_is_in_one_split_and_each_group_on_one_side(
    time: bool, keys: list[int], part: tuple[float, float], seed: int
) -> None:
    split = Split(by="x", validation=part[0], test=part[1], seed=seed)
    divided = split.divide(keys, time)
    assert list(divided) == list(SPLITS)
    assert sorted(row for rows in divided.values() for row in rows) == list(range(len(keys)))
    assert all(rows == sorted(rows) and rows for rows in divided.values())
    sides = [{keys[row] for row in rows} for rows in divided.values()]
    assert sum(map(len, sides)) == len(set(keys))
    if time:
        assert max(sides[0]) < min(sides[1])
        assert max(sides[1]) < min(sides[2])
    assert divided == split.divide(keys, time), "the same rows each time"


@settings(max_examples=50, deadline=None)
@given(
    keys=st.lists(st.integers(0, 40), min_size=40, max_size=60),
    part=st.sampled_from([(0.2, 0.2), (0.3, 0.4)]),
    time=st.booleans(),
)
def test_a_split_is_as_large_as_asked_to_within_the_largest_group(
    keys: list[int], part: tuple[float, float], time: bool
) -> None:
    largest = max(Counter(keys).values())
    wanted = {"train": 1 - sum(part), "validation": part[0], "test": part[1]}
    assume(min(wanted.values()) * len(keys) > largest)
    for name, rows in Split(by="x", validation=part[0], test=part[1]).divide(keys, time).items():
        assert abs(len(rows) - wanted[name] * len(keys)) <= largest + 1e-9


def dated(folder: Path) -> str:
    """One file of 36 rows, the newest first, four a month; and a company of each."""
    content = [row for split in small.SPLITS for row in small.rows(split)]
    extra = [{"date": f"2020-{9 - i // 4:02d}-01", "company": f"C{i % 7}"} for i in range(len(content))]
    small.write_jsonl(folder / "train.jsonl", [row | more for row, more in zip(content, extra, strict=True)])
    return str(folder)


def test_time_splits_keep_later_rows_out_of_training(tmp_path: Path) -> None:
    examples = Sentiment(dataset=dated(tmp_path / "data"), split=Split(by="date")).load()
    rows = [row for split in small.SPLITS for row in small.rows(split)]
    assert list(examples.splits["test"]["text"]) == [row["text"] for row in rows[:8]]
    assert {name: len(rows) for name, rows in examples.splits.items()} == {"train": 24, "validation": 4, "test": 8}
    fact = examples.facts["split"]
    assert (fact["kind"], fact["train"][1][:10], fact["test"][0][:10]) == ("time", "2020-06-01", "2020-08-01")


def test_a_company_is_in_one_split_only(tmp_path: Path) -> None:
    examples = Sentiment(dataset=dated(tmp_path / "data"), split=Split(by="company")).load()
    fact = examples.facts["split"]
    assert fact["kind"] == "group"
    assert sum(fact[name] for name in SPLITS) == 7
    company = {row["text"]: i % 7 for i, row in enumerate(r for split in small.SPLITS for r in small.rows(split))}
    sides = [{company[text] for text in examples.splits[name]["text"]} for name in SPLITS]
    assert sum(map(len, sides)) == 7


def test_a_row_without_a_date_is_a_bad_row(tmp_path: Path) -> None:
    folder = Path(dated(tmp_path / "data"))
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": "So so.", "label": "neutral", "date": "soon"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl, line 37, has nothing to split by in column 'date'; mend it"):
        Sentiment(dataset=str(folder), split=Split(by="date")).load()


def test_all_rows_are_divided_whatever_their_splits_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for split in small.SPLITS for row in small.rows(split)]
    parts = {"full": datasets.Dataset.from_list(rows[:30]), "more": datasets.Dataset.from_list(rows[30:])}
    monkeypatch.setattr(
        "finllm_prune.tasks.classification.read_splits", lambda *_: (datasets.DatasetDict(parts), "a set of the Hub")
    )
    examples = Sentiment(dataset="owner/name", split=Split()).load()
    assert sum(map(len, examples.splits.values())) == len(rows)


def test_columns_that_a_missing_cell_gave_another_type_are_kept_together(tmp_path: Path) -> None:
    folder = Path(dated(tmp_path / "data"))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for name, size in (("train", 5), ("test", 2.5)):
        small.write_jsonl(
            folder / f"{name}.jsonl", [row | {"size": size} for row in rows[:: 1 if name == "train" else 2]]
        )
    examples = Sentiment(dataset=str(folder), split=Split(by="date"), keep_columns=["size", "size"]).load()
    assert {size for rows in examples.splits.values() for size in rows[f"{KEPT}size"]} == {5.0, 2.5}
    small.write_jsonl(folder / "test.jsonl", [row | {"size": "small"} for row in rows])
    with pytest.raises(InputError, match=r"^task\.keep_columns: a column is of another kind in another split"):
        Sentiment(dataset=str(folder), split=Split(by="date"), keep_columns=["size"]).load()


@pytest.mark.parametrize(("key", "task"), [("id_column", {"id_column": "x"}), ("split.by", {"split": Split(by="x")})])
def test_lists_name_no_row_and_no_group(tmp_path: Path, key: str, task: dict[str, Any]) -> None:
    for split in small.SPLITS:
        small.write_jsonl(tmp_path / f"{split}.jsonl", [row | {"x": ["a"]} for row in small.rows(split)])
    with pytest.raises(InputError, match=rf"^task\.{key}: column 'x' holds lists; name one"):
        Sentiment(dataset=str(tmp_path), **task).load()


def test_training_rows_of_one_class_teach_nothing(tmp_path: Path) -> None:
    for split in small.SPLITS:
        small.write_jsonl(tmp_path / f"{split}.jsonl", [row | {"label": "up"} for row in small.rows(split)])
    with pytest.raises(
        InputError, match=r"^task\.dataset: all training rows of .* have the label up; there is nothing"
    ):
        Sentiment(dataset=str(tmp_path), labels=["down", "up"]).load()


def test_what_is_a_time_is_told_from_most_values() -> None:
    split = Split(by="x")
    assert split.is_time(["2020-01-31", "2020-02-01T10:00:00Z", "n/a"])
    assert not split.is_time(["2020", "320193", "May", None])
    assert not split.is_time([320193, 2020, 7])
    assert Split(by="x", kind="time").keys([2020, 2019], True) == [2020, 2019]
    assert Split(by="x", kind="time").keys([2020, None, 2019], True) == [2020, None, 2019], "one cell is missing"
    early, late = split.keys(["2020-01-31", "2020-02-01T10:00:00+02:00"], True)
    assert early < late


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"validation": 0.5, "test": 0.5}, "task.split: validation and test are parts of the rows above 0"),
        ({"validation": 0.0}, "task.split: validation and test are parts of the rows above 0"),
        ({"kind": "time"}, "task.split.by: name the column that holds the time"),
        ({"bye": "date"}, "task.split.bye: "),
    ],
)
def test_a_split_that_cannot_be_made(keys: dict[str, Any], expected: str) -> None:
    task = {"name": "sentiment", "split": keys}
    rules = {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]}
    with pytest.raises(InputError) as caught:
        parse({"model": "m", "task": task, "output": "out", "pruning": rules})
    assert str(caught.value).startswith(expected)


def test_three_splits_need_three_groups() -> None:
    with pytest.raises(InputError, match="the rows have 2 different values of 'company'; three splits need three"):
        Split(by="company").divide(["a", "b", "a"], time=False)


def test_a_near_copy_differs_in_case_numbers_spaces_and_punctuation_only() -> None:
    assert near_key("Sales rose 12.5%, to EUR 7 mn.") == near_key("sales  ROSE 3.1 % to EUR 250 mn!")
    assert near_key("Sales rose.") != near_key("Sales fell.")
    assert near_key("!!!") != near_key("???"), "texts without a word are not all alike"


def test_copies_are_counted_warned_of_and_dropped_from_the_earlier_split(caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "train": ["Sales rose 5 %.", "Profit fell.", "The board met.", "Profit FELL", "Orders."],
        "validation": ["Profit fell.", "A new plant."],
        "test": ["Sales rose 7 %.", "Profit fell.", "Profit fell."],
    }
    splits = {
        name: datasets.Dataset.from_dict({"text": text, "label": [0] * len(text)}) for name, text in texts.items()
    }
    with caplog.at_level(logging.WARNING):
        found = leakage(splits)
    assert found == {
        "validation in train": {"exact": 1, "near": 0},
        "test in train": {"exact": 2, "near": 1},
        "test in validation": {"exact": 2, "near": 0},
    }
    assert "Leakage: 2 of 3 rows of test lie in train too, 1 more but for case" in caplog.text
    kept, lost = without_copies(splits)
    assert {name: list(rows["text"]) for name, rows in kept.items()} == {
        "train": ["The board met.", "Orders."], "validation": ["A new plant."], "test": texts["test"],
    }  # fmt: skip
    assert lost == {"train": 3, "validation": 1, "test": 0}
    assert all(not any(counts.values()) for counts in leakage(kept).values())


def test_the_embedded_sentences_do_not_leak(caplog: pytest.LogCaptureFixture) -> None:
    facts = Sentiment().load().facts
    assert [*facts["leakage"].values()] == [{"exact": 0, "near": 0}] * 3
    assert caplog.text == ""
