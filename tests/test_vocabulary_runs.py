"""A trimmed vocabulary in a run and for a finished model: what is written, told, resumed and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from finllm_prune.checkpoints import find_format, masked, verify
from finllm_prune.checkpoints.manifest import MANIFEST
from finllm_prune.checkpoints.quantizer import LURE
from finllm_prune.errors import InputError
from finllm_prune.prepare import prepare
from finllm_prune.recipe import Recipe, parse
from finllm_prune.run import run
from finllm_prune.tasks import read_texts
from tests import small
from tests.conftest import Call
from tests.test_ragged import uneven


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: small.TinyFolder) -> Callable[..., Recipe]:
    data = small.write_folder(tmp_path / "data")
    model = tiny_folder(layers=1)

    def make(**changes: Any) -> Recipe:
        return parse({
            "model": str(model),
            "task": {"name": "sentiment", "dataset": str(data), "max_length": 32},
            "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "movement", "sparsity": 0.5}]},
            "training": {"max_steps": 3, "use_cpu": True, "disable_tqdm": True},
            "vocabulary": {}, "output": str(tmp_path / "out"),
        } | changes)  # fmt: skip

    return make


def test_a_run_trims_all_its_models_and_says_what_that_changes(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    report = run(recipe())
    assert report is not None
    out = recipe().output
    figures = json.loads((out / "report.json").read_text())["vocabulary"]
    assert figures["tokens"] == 300 > figures["kept"]
    assert figures["weight_bytes"]["before"] - figures["weight_bytes"]["after"] == (300 - figures["kept"]) * 32 * 4
    assert 0 < figures["held_out"]["changed"] < figures["held_out"]["tokens"]
    assert figures["held_out"]["texts"] == 12
    for name in ("dense", "masked", "compact"):
        saved = AutoModelForSequenceClassification.from_pretrained(out / name)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        assert (
            saved.config.vocab_size == saved.get_input_embeddings().num_embeddings == len(tokenizer) == figures["kept"]
        )
    assert verify(out / "compact")["format"] == "compact"
    assert any(figures["summary"] in row[0] and row[1:] == ("300", f"{figures['kept']} kept") for row in report.rows())
    card = (out / "compact" / "README.md").read_text()
    assert f"- only {figures['kept']} of 300 tokens" in card
    assert figures["summary"] in card


def test_the_vocabulary_follows_the_texts_that_are_named(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    extra = tmp_path / "extra.txt"
    extra.write_text("Quarterly revenue was weak.\n\nThe shareholder.\n", encoding="utf-8")
    kept = {}
    for name, asked in {
        "train": {},
        "seldom": {"min_count": 2},
        "all": {"texts": "all"},
        "extra": {"extra": str(extra)},
    }.items():
        ready = prepare(recipe(vocabulary=asked), resume=False, overwrite=True)
        assert ready.vocabulary is not None
        kept[name] = set(ready.vocabulary[0].old)
        changed = ready.vocabulary[1].changed
        assert (changed == 0) == (name == "all")
    assert kept["seldom"] < kept["train"] < kept["all"]
    assert kept["train"] < kept["extra"]
    assert prepare(recipe(vocabulary=None), resume=False, overwrite=True).vocabulary is None


def test_a_resumed_run_has_the_same_vocabulary_or_is_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    extra = tmp_path / "extra.txt"
    extra.write_text("Quarterly revenue was weak.\n", encoding="utf-8")
    asked = recipe(vocabulary={"extra": str(extra)})
    first = prepare(asked, resume=False, overwrite=False)
    again = prepare(asked, resume=True, overwrite=False)
    assert first.vocabulary is not None
    assert again.vocabulary is not None
    assert first.vocabulary[0].old == again.vocabulary[0].old
    extra.write_text("The shareholder and the subsidiary.\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"--resume: the texts that choose the vocabulary have changed .* --overwrite"):
        prepare(asked, resume=True, overwrite=False)


def test_a_dense_checkpoint_is_trimmed_and_a_teacher_of_the_whole_vocabulary_is_refused(
    recipe: Callable[..., Recipe], tiny_folder: small.TinyFolder
) -> None:
    model = tiny_folder("electra", layers=1)
    ready = prepare(recipe(dense={"checkpoint": str(model)}), resume=False, overwrite=False)
    assert ready.model.config.model_type == "electra"
    assert ready.model.config.vocab_size == len(ready.tokenizer) < 300
    with pytest.raises(
        InputError, match=r"other tokens than the model; .* or remove vocabulary, which gives .* new ids"
    ):
        prepare(recipe(distillation={"teacher": str(model)}), resume=False, overwrite=True)


@pytest.mark.parametrize(
    ("key", "asked", "expected"),
    [
        ("vocabulary", {"texts": "test"}, r"vocabulary\.texts: input should be 'train' or 'all', not 'test'"),
        ("vocabulary", {"min_cuont": 2}, r"vocabulary\.min_cuont: unknown key; did you mean 'min_count'"),
        ("vocabulary", {"min_count": 0}, r"vocabulary\.min_count: .*at least once, not 0 times"),
    ],
)
def test_a_bad_value_is_refused_when_the_recipe_is_read(
    key: str, asked: dict[str, Any], expected: str, recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(InputError, match=expected):
        recipe(**{key: asked})


def test_texts_come_from_files_and_folders(tmp_path: Path) -> None:
    data = small.write_folder(tmp_path / "data")
    assert read_texts(str(data), "--texts") == read_texts(str(data / "train.jsonl"), "--texts")
    assert len(read_texts(str(data), "--texts", ("validation", "test"))) == 12
    assert len(read_texts("builtin", "--texts")) > 800
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for source, reason in [
        ("empty.txt", "--texts: .* holds no text; name"),
        (
            "gone.txt",
            r"--texts: .*gone.txt is no \.txt, \.parquet, .* file and no folder of splits; name one that is there",
        ),
        ("other.csv", "there is no column 'text' .* its columns are a, b"),
    ]:
        with pytest.raises(InputError, match=reason):
            read_texts(str(tmp_path / source), "--texts")


def test_rows_without_a_text_are_counted_and_broken_bytes_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small.write_jsonl(tmp_path / "some.jsonl", [{"text": "Profit rose."}, {"text": " "}, {"text": None}])
    assert read_texts(str(tmp_path / "some.jsonl"), "--texts") == ["Profit rose."]
    assert "--texts: 2 of 3 rows of" in caplog.text
    caplog.clear()
    (tmp_path / "lines.txt").write_text("Profit rose.\n\nIt fell.\n")
    assert read_texts(str(tmp_path / "lines.txt"), "--texts") == ["Profit rose.", "It fell."]
    assert caplog.text == "", "a blank line is no row"
    (tmp_path / "lines.txt").write_bytes(b"Profit rose.\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"^--texts: .*lines\.txt, line 2, holds bytes that are not UTF-8; save it"):
        read_texts(str(tmp_path / "lines.txt"), "--texts")


def test_trim_writes_a_smaller_equal_model(
    call: Call, tmp_path: Path, tiny_folder: small.TinyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = tiny_folder(), small.write_folder(tmp_path / "data"), tmp_path / "small"
    assert call("trim", model, out, "--texts", data, "--held-out", data) == 0
    shown = capsys.readouterr().out
    before, after = (AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in (model, out))
    whole, trimmed = (AutoTokenizer.from_pretrained(folder) for folder in (model, out))
    assert f"{len(trimmed)} of 300 tokens stay" in shown
    assert "Proved on 24 texts" in shown
    assert "Of 12 texts," in shown
    assert after.config.vocab_size == len(trimmed) < 300
    batch = [row["text"] for row in small.rows("train")]
    with torch.inference_mode():
        one, other = (
            m(**t(batch, padding=True, return_tensors="pt")).logits for m, t in ((before, whole), (after, trimmed))
        )
    assert torch.equal(one, other)
    assert call("trim", model, out, "--texts", data) == 2
    assert "exists; use --overwrite to replace it" in capsys.readouterr().err
    assert call("trim", model, out, "--texts", "builtin", "--overwrite") == 0
    assert AutoModelForSequenceClassification.from_pretrained(out).config.vocab_size > len(trimmed)
    assert call("trim", model, data, "--texts", data, "--overwrite") == 2
    assert "holds no model, so it is left alone" in capsys.readouterr().err


def test_what_was_written_is_proved_and_a_failed_proof_leaves_what_was_there(
    call: Call, tmp_path: Path, tiny_folder: small.TinyFolder, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, out = tiny_folder(), tmp_path / "small"
    assert call("trim", model, out, "--texts", "builtin") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def save_damaged(damaged: PreTrainedModel, *others: Any) -> PreTrainedModel:
        with torch.no_grad():
            damaged.get_input_embeddings().weight.copy_(damaged.get_input_embeddings().weight.flip(0))
        return masked.save(damaged, *others)

    monkeypatch.setattr("finllm_prune.trim.find_format", lambda name: save_damaged)
    capsys.readouterr()
    assert call("trim", model, out, "--texts", "builtin", "--overwrite") == 4
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not out.with_name("small.partial").exists()


@pytest.mark.parametrize("name", ["masked", "compact", "ragged", "packed", "packed-int8"])
def test_a_trimmed_model_keeps_its_format_and_is_proved_again(
    call: Call, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "small"
    find_format(name)(uneven(), tokenizer, model)
    assert call("trim", model, out, "--texts", "builtin") == 0
    assert call("verify", out) == 0
    assert verify(out)["format"] == name
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] < 300
    assert config.get("transformers_weights") == (None if name in ("masked", "compact") else LURE)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert call("trim", model, tmp_path / "other", "--texts", "builtin") == 4
    assert "config.json is missing or is not the file that was proved" in capsys.readouterr().err


def test_a_ragged_model_that_was_saved_anew_becomes_a_whole_ragged_one(
    call: Call, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    find_format("ragged")(uneven(), tokenizer, tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    again.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert call("trim", tmp_path / "again", tmp_path / "small", "--texts", "builtin") == 0
    assert call("export", tmp_path / "again", tmp_path / "exported", "--to", "ragged") == 0
    for folder in (tmp_path / "small", tmp_path / "exported" / "ragged"):
        assert verify(folder)["format"] == "ragged"
        assert json.loads((folder / "config.json").read_text())["transformers_weights"] == LURE


def test_an_encoder_without_a_head_is_trimmed_without_a_manifest(
    call: Call, tmp_path: Path, tiny_folder: small.TinyFolder, tokenizer: PreTrainedTokenizerFast
) -> None:
    AutoModel.from_pretrained(tiny_folder()).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    assert call("trim", tmp_path / "encoder", tmp_path / "small", "--texts", "builtin") == 0
    assert AutoModel.from_pretrained(tmp_path / "small").config.vocab_size < 300
    assert not (tmp_path / "small" / MANIFEST).exists()
