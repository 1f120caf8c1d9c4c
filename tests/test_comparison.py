"""Dense against pruned on a user's own file, with labels and without."""

import csv
import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from finllm_prune.checkpoints import find_format
from finllm_prune.comparison import compare_on
from finllm_prune.errors import InputError
from finllm_prune.saved import ask
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


def test_numbers_of_a_coded_column_are_the_classes_of_its_own_order(models: tuple[Path, Path], tmp_path: Path) -> None:
    said = small.rows("train")
    names = ["positive", "negative", "neutral"]
    rows = datasets.Dataset.from_list([{"text": row["text"], "label": names.index(row["label"])} for row in said])
    rows.cast_column("label", datasets.ClassLabel(names=names)).to_parquet(tmp_path / "coded.parquet")
    named = write(tmp_path / "named.csv", [["text", "label"], *([row["text"], row["label"]] for row in said)])
    coded, by_name = (
        compare_on(str(models[1]), str(models[0]), file).figures for file in (tmp_path / "coded.parquet", named)
    )
    assert coded["metrics"] == by_name["metrics"]


def test_scores_and_sets_of_labels_are_no_classes(models: tuple[Path, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "mine.csv", [["text"], ["Up."]])
    for labels, kind in ((["score"], "regression"), (LABELS, "multi_label_classification")):
        model = tiny_model(labels=labels)
        model.config.problem_type = kind
        model.save_pretrained(tmp_path / kind)
        AutoTokenizer.from_pretrained(models[0]).save_pretrained(tmp_path / kind)
        with pytest.raises(InputError, match=r"^BASELINE: .* tells scores, or several labels of a text"):
            compare_on(str(tmp_path / kind), str(tmp_path / kind), data)


def test_texts_are_read_as_the_recipe_beside_the_model_did(models: tuple[Path, Path], tmp_path: Path) -> None:
    texts = [f"<p>{text}</p> " * 6 for text in TEXTS]
    data = write(tmp_path / "mine.csv", [["text"], *([text] for text in texts)])
    plain = compare_on(str(models[1]), str(models[0]), data).flipped
    task = {"name": "filings", "strategy": "head_tail", "max_length": 10, "clean": True}
    written = {
        "model": str(models[0]),
        "task": task,
        "pruning": {"rules": [{"target": "mlp", "sparsity": 0.5}]},
        "output": "out",
        "export": ["masked"],
    }
    for folder in models:
        shutil.copytree(folder, tmp_path / folder.name)
        (tmp_path / folder.name / "recipe.yaml").write_text(json.dumps(written))
    dense, pruned = (str(tmp_path / folder.name) for folder in models)
    compared = compare_on(pruned, dense, data)
    said = {}
    for name in (dense, pruned):
        config = AutoConfig.from_pretrained(name)
        said[name] = [config.id2label[int(i)] for i in ask(name, texts).argmax(-1)]
    flips = [(i, texts[i - 1], *both) for i, both in enumerate(zip(said[dense], said[pruned], strict=True), 1)]
    assert compared.flipped == [flip for flip in flips if flip[2] != flip[3]]
    assert compared.flipped != plain
    for change, words in (
        ({"pair_column": "aspect"}, "it reads each text with its 'aspect', and single texts are asked here"),
        ({"mask": {"column": "company"}}, "the names of column 'company' were masked; use `finllm-prune evaluate"),
    ):
        (Path(pruned) / "recipe.yaml").write_text(json.dumps(written | {"task": {"name": "sentiment"} | change}))
        with pytest.raises(InputError, match=words):
            compare_on(pruned, dense, data)
    (Path(pruned) / "recipe.yaml").write_text(
        json.dumps(written | {"task": {"name": "sentiment", "pair_column": "aspect"}})
    )
    with pytest.raises(InputError, match="single texts are asked here"):
        ask(pruned, texts)
