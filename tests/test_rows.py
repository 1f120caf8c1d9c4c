"""Bad rows: named by file and line, counted, refused or left out by choice."""

import codecs
import csv
import gc
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finllm_prune.errors import InputError
from finllm_prune.tasks.files import read_file
from finllm_prune.tasks.rows import first_lines
from finllm_prune.tasks.sentiment import Sentiment
from tests import small
from tests.conftest import LABELS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


cells = st.text(st.sampled_from('ab ,"\n\r;é'), max_size=8)


@given(rows=st.lists(st.tuples(cells, st.sampled_from(["x", "y"]), st.integers(0, 2)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_line_of_a_csv_row_is_where_its_text_begins(tmp_path_factory: Any, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("csv") / "train.csv"
    expected, content = [], "text,label\n"
    for text, label, blank in rows:
        content += "\n" * blank
        expected.append(len(content.encode().replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")))
        content += '"' + text.replace('"', '""') + f'",{label}\n'
    path.write_bytes(content.encode())
    assert first_lines(path, set()) == expected


def test_the_line_of_a_json_row_counts_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n{"text": "c"}')
    assert first_lines(path, set()) == [1, 4, 5]
    assert first_lines(path, {4}) == [1, 5]
    assert first_lines(tmp_path / "absent.jsonl", set()) == first_lines(tmp_path / "a.parquet", set()) == []


def dirty(folder: Path) -> str:
    """Unreadable lines 2 and 5 of train, no text on 4, a label on 8, an id on 9; and a null on line 1 of test."""
    good = [json.dumps(row | {"id": i}) for i, row in enumerate(small.rows("train"))]
    lines: list[bytes] = [line.encode() for line in good[:8]]
    lines[1] = b'{"text": "caf\xe9", "label": "neutral", "id": 1}'
    lines[3] = b'{"text": " ", "label": "neutral", "id": 3}'
    lines[4] = b'{"text": "cut'
    lines[7] = b'{"text": "So so.", "label": "mixed", "id": 7}'
    lines.append(json.dumps({"text": "Again.", "label": "neutral", "id": 0}).encode())
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    small.write_jsonl(
        folder / "validation.jsonl", [row | {"id": 50 + i} for i, row in enumerate(small.rows("validation"))]
    )
    content = [row | {"id": 60 + i} for i, row in enumerate(small.rows("test"))]
    small.write_jsonl(folder / "test.jsonl", [{"text": None, "label": "neutral", "id": 90}, *content])
    return str(folder)


def test_bad_rows_are_left_out_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = Sentiment(dataset=dirty(tmp_path / "data"), id_column="id", bad_rows="skip", labels=list(small.SENTENCES))
    with caplog.at_level(logging.WARNING):
        examples = task.load()
    train = small.rows("train")
    assert list(examples.splits["train"]["text"]) == [train[i]["text"] for i in (0, 2, 5, 6)]
    assert examples.facts["bad_rows"] == {
        "train": {"no text": 1, "unknown label": 1, "duplicate id": 1, "unreadable": 2},
        "test": {"no text": 1},
    }
    (record,) = [record for record in caplog.records if "bad_rows" in record.message]
    assert record.message.startswith("task.bad_rows: 6 rows are left out: ")
    for line, what in (
        (2, "is unreadable"),
        (5, "is unreadable"),
        (4, "has no text"),
        (8, "has the unknown label 'mixed'"),
    ):
        assert f"train.jsonl, line {line}, {what}" in record.message
    assert "line 9, has the id 0 in column 'id' a second time; and 1 more." in record.message
    assert [(Path(row["file"]).name, row["split"], row["line"], row["kind"]) for row in examples.left_out] == [
        ("train.jsonl", "train", 2, "unreadable"),
        ("train.jsonl", "train", 5, "unreadable"),
        ("train.jsonl", "train", 4, "no text"),
        ("train.jsonl", "train", 8, "unknown label"),
        ("train.jsonl", "train", 9, "duplicate id"),
        ("test.jsonl", "test", 1, "no text"),
    ]


def test_rows_without_an_id_are_not_copies_of_each_other(tmp_path: Path) -> None:
    for split in small.SPLITS:
        rows = [row | {"id": f"{split}{i}" if i else None} for i, row in enumerate(small.rows(split))]
        small.write_jsonl(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(InputError, match=r"train\.jsonl, line 1, has no id in column 'id' \(the first of 3 bad rows\)"):
        Sentiment(dataset=str(tmp_path), id_column="id").load()


def test_bad_rows_are_refused_by_default_with_the_first_and_the_count(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    dirty(folder)
    with pytest.raises(InputError, match=r"train\.jsonl, line 2, holds bytes that are not UTF-8; save it as UTF-8, or"):
        Sentiment(dataset=str(folder)).load()
    small.write_jsonl(folder / "train.jsonl", [*small.rows("train"), {"text": "", "label": "neutral"}])
    with pytest.raises(InputError, match=r"train\.jsonl, line 25, has no text .* \(the first of 2 bad rows\); mend it"):
        Sentiment(dataset=str(folder)).load()


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_bytes_that_are_not_utf8_in_a_csv(tmp_path: Path, bad_rows: Any) -> None:
    folder = small.write_folder(tmp_path / "data")
    (folder / "train.jsonl").unlink()
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerow(['Two\nlines, "quoted".', "neutral"])
        writer.writerow(["A\n caf\u00e9.", "neutral"])
        writer.writerow(["", "neutral"])
        writer.writerow(["Profit rose.", "positive"])
        writer.writerow(["Profit fell.", "negative"])
    content = (folder / "train.csv").read_bytes()
    (folder / "train.csv").write_bytes(content.replace("é".encode(), b"\xe9\n\xe9"))
    task = Sentiment(dataset=str(folder), bad_rows=bad_rows)
    if bad_rows == "refuse":
        with pytest.raises(
            InputError, match=r"train\.csv, line 5, holds bytes that are not UTF-8 \(the first of 2 such lines\)"
        ):
            task.load()
        return
    examples = task.load()
    assert list(examples.splits["train"]["text"]) == ['Two\nlines, "quoted".', "Profit rose.", "Profit fell."]
    assert examples.facts["bad_rows"] == {"train": {"no text": 1, "unreadable": 1}}


def csv_of(path: Path, header: str, cells: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(), *cells])
    return path


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ("", "mine", [None, "mine"]),
        (0, 0.5, [0.0, 0.5]),
        (7, "NA", ["7", "NA"]),
        ("007", "A", ["007", "A"]),
        (7, "", [7, None]),
        ("", True, [None, "True"]),
        (True, True, [True, True]),
    ],
)
def test_the_type_of_a_csv_column_is_that_of_all_its_rows(
    tmp_path: Path, first: Any, later: Any, expected: list[Any]
) -> None:
    # What datasets reads at once are 10,000 rows.
    cells = [["So so.", first, ""] for _ in range(10_000)] + [["So so.", later, "x"]]
    rows = read_file(csv_of(tmp_path / "train.csv", "text cell late", cells), "train")
    assert [rows[i]["cell"] for i in (0, 10_000)] == expected
    assert [rows[i]["late"] for i in (0, 10_000)] == [None, "x"]


def test_a_long_csv_that_is_broken_is_still_refused(tmp_path: Path) -> None:
    cells = [["So so.", 1, ""] for _ in range(10_000)] + [["So so.", 1, "x"]]
    path = csv_of(tmp_path / "train.csv", "text label", cells)
    with pytest.raises(
        InputError, match=r"train\.csv: its rows have more fields than its header; put texts with a comma"
    ):
        read_file(path, "train")
    cells = [["So so.", 1] for _ in range(10_000)] + [["So so.", 1, "x"]]
    csv_of(path, "text label", cells)
    with pytest.raises(InputError, match=r"train\.csv cannot be read as csv \(.*line 10002, saw 3\); mend it"):
        read_file(path, "train")


@pytest.mark.parametrize(("cells", "is_good"), [([[10**30], [-1]], True), ([[1], [2, "x", "y"]], False)])
def test_a_csv_is_closed_whatever_is_in_it(tmp_path: Path, cells: list[list[Any]], is_good: bool) -> None:
    path = csv_of(tmp_path / "train.csv", "text label", [["So so.", *row] for row in cells])
    with nullcontext() if is_good else pytest.raises(InputError, match="cannot be read as csv"):
        read_file(path, "train")
    gc.collect()  # a file that is still open makes the test fail here


@pytest.mark.parametrize("names", [["None", "NA", "null"], ["up", "NA", "down"]])
def test_a_label_of_a_csv_may_be_none_or_na(tmp_path: Path, names: list[str], caplog: pytest.LogCaptureFixture) -> None:
    new = dict(zip(small.SENTENCES, names, strict=True))
    for split in small.SPLITS:
        csv_of(tmp_path / f"{split}.csv", "text label", [[row["text"], new[row["label"]]] for row in small.rows(split)])
    examples = Sentiment(dataset=str(tmp_path)).load()
    assert examples.labels == sorted(names)
    assert "NA" in caplog.text
    assert "which becomes a class; where it means that a row has no label, list the class names" in caplog.text
    with pytest.raises(InputError, match=r"has the unknown label 'NA'; known are "):
        Sentiment(dataset=str(tmp_path), labels=[name for name in names if name != "NA"]).load()


def test_empty_cells_of_a_csv_are_missing_and_one_na_leaves_numbers_indices(tmp_path: Path) -> None:
    for split in small.SPLITS:
        rows = [
            [row["text"], LABELS.index(row["label"]), i] for i, row in enumerate(small.rows(split), 100 * len(split))
        ]
        csv_of(tmp_path / f"{split}.csv", "text label id", rows)
    rows[:0] = [["So.", "NA", 1], ["So.", "", 2], ["", 1, 3], ["So.", 1, ""]]
    csv_of(tmp_path / "test.csv", "text label id", rows)
    task = Sentiment(dataset=str(tmp_path), labels=LABELS, id_column="id", bad_rows="skip")
    examples = task.load()
    assert examples.facts["bad_rows"] == {"test": {"unknown label": 2, "no text": 1, "no id": 1}}
    assert [LABELS[i] for i in examples.splits["test"]["label"]] == [row["label"] for row in small.rows("test")]
    with pytest.raises(
        InputError, match=r"test\.csv, line 2, has the unknown label 'NA'; known are negative, neutral, pos"
    ):
        Sentiment(dataset=str(tmp_path), labels=LABELS).load()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, kind: str) -> None:
    rows = ["Profit rose.,positive", "Profit fell.,negative", "Sales were flat.,neutral"]
    lines = ['"text","label"', *rows]
    if kind == "jsonl":
        lines = [json.dumps(dict(zip(("text", "label"), row.split(","), strict=True))) for row in rows]
    folder = small.write_folder(tmp_path / "data")
    (folder / "train.jsonl").unlink()
    bad = b"caf\xe9,neutral\n" if kind == "csv" else b"{\n"
    content = codecs.BOM_UTF8 + "\n".join([*lines, ""]).encode()
    for ending, choice in ((b"", "refuse"), (bad, "skip")):
        (folder / f"train.{kind}").write_bytes(content + ending)
        examples = Sentiment(dataset=str(folder), bad_rows=choice).load()
        assert list(examples.splits["train"]["text"]) == [row.split(",")[0] for row in rows]
