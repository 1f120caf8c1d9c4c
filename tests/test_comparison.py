"""Dense against pruned on a user's own file, with labels and without."""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from finllm_prune.checkpoints import find_format
from finllm_prune.comparison import compare_on
from finllm_prune.errors import InputError
from tests import small
from tests.conftest import LABELS, Call, loud, tiny_model

TEXTS = [row["text"] for row in small.rows("train")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    """A dense model and one with half of its neurons, the classes of which are in another order."""
    folder = tmp_path_factory.mktemp("models")
    model = loud(tiny_model())
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    with torch.no_grad():
        for block in model.bert.encoder.layer:
            block.output.dense.weight[:, ::2] = 0
        order = [2, 0, 1]
        model.classifier.weight.copy_(model.classifier.weight[order])
        model.classifier.bias.copy_(model.classifier.bias[order])
    model.config.id2label = {i: LABELS[j] for i, j in enumerate(order)}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    find_format("compact")(model, tokenizer, folder / "pruned")
    return folder / "dense", folder / "pruned"


def write(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_without_labels_the_models_are_held_against_each_other(
    models: tuple[Path, Path], tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, pruned = models
    data = write(tmp_path / "mine.csv", [["text"], *([text] for text in ["=1+1", *TEXTS])])
    arguments = ("pull-and-compare", pruned, dense, "--data", data)
    assert call(*arguments, "--json", tmp_path / "f.json", "--flips", tmp_path / "flips.csv") == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    count = sum(figures["flips"].values())
    assert figures["rows"] == len(TEXTS) + 1
    assert 0 < count < figures["rows"]
    assert figures["agreement"] == pytest.approx(1 - count / figures["rows"])
    assert "metrics" not in figures
    assert f"{figures['agreement']:.1%}" in capsys.readouterr().out
    with (tmp_path / "flips.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["row", "text", "dense", "pruned"]
    assert len(rows) == count
    assert {f"{was} → {now}" for *_, was, now in rows} == set(figures["flips"])
    assert all((["=1+1", *TEXTS][int(row) - 1]) == text.removeprefix("'") for row, text, *_ in rows)


def test_with_labels_there_are_metrics(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finllm_prune.comparison.compare", small.quick_compare())
    content = [["headline", "label"], *([row["text"], row["label"]] for row in small.rows("train"))]
    data = write(tmp_path / "mine.csv", content)
    compared = compare_on(str(models[1]), str(models[0]), data, text="headline")
    assert {"accuracy", "macro_f1", "mcc"} == set(compared.figures["metrics"])
    assert list(compared.figures["per_class"]) == LABELS
    same = compare_on(str(models[0]), str(models[0]), data, text="headline")
    assert (same.figures["agreement"], same.flipped) == (1.0, [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([["body"], ["x"]], "--text: .* has no column 'text', but body; name one of them"),
        (
            [["text", "label"], ["Up.", "great"]],
            "row 1 has the label 'great', and the models know negative, neutral, positive",
        ),
        ([["text", "label"], ["Up.", "positive"], [" ", "neutral"]], "row 2 has no text in column 'text'"),
    ],
)
def test_what_cannot_be_compared_is_told(
    models: tuple[Path, Path], tmp_path: Path, content: list[list[str]], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        compare_on(str(models[1]), str(models[0]), write(tmp_path / "mine.csv", content))


def test_a_file_that_is_not_there(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--data: .* is no \.parquet, "):
        compare_on(str(models[1]), str(models[0]), tmp_path / "absent.csv")
