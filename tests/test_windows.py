"""Windows: a document's answer is made of all its windows, in training, evaluation and use alike; evaluate knows its recipe."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.recipe import parse
from finllm_prune.run import run
from finllm_prune.saved import ask, evaluate_saved
from finllm_prune.settings import build
from finllm_prune.tasks import ends
from finllm_prune.tasks.filings import Filings
from finllm_prune.tasks.windows import pooled, windows_of
from tests import small
from tests.conftest import Call
from tests.test_long_texts import texts


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@given(text=texts, limit=st.integers(8, 16), stride=st.integers(0, 5), most=st.integers(1, 4))
def test_windows_cover_the_document_and_share_their_ends(
    tokenizer: PreTrainedTokenizerFast, text: str, limit: int, stride: int, most: int
) -> None:
    content = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ends, "_CHARACTERS", 4)
        (windows,) = windows_of([text], limit, stride, most, tokenizer)
    assert 1 <= len(windows) <= most
    room = limit - 2
    for number, window in enumerate(windows):
        begin = number * (room - stride)
        assert window == [2, *content[begin : begin + room], 3]
    if len(windows) < most:
        assert windows[-1][-2:-1] == content[-1:] or not content, "the last window ends where the document ends"


@pytest.mark.parametrize("most", [1, 3, 50])
def test_a_model_that_cuts_the_beginning_has_its_own_windows(tokenizer: PreTrainedTokenizerFast, most: int) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = "left"
    text = "Profit rose by a third. " * 60
    whole = tokenizer(text, truncation=True, max_length=16, stride=3, return_overflowing_tokens=True)["input_ids"]
    assert windows_of([text], 16, 3, most, tokenizer) == [whole[:most]]


def test_pooling_is_of_each_document() -> None:
    logits = torch.tensor([[1.0, 5.0], [3.0, 1.0], [7.0, 7.0]])
    parts = torch.tensor([2, 1])
    assert pooled(logits, parts, "mean").tolist() == [[2.0, 3.0], [7.0, 7.0]]
    assert pooled(logits, parts, "max").tolist() == [[3.0, 5.0], [7.0, 7.0]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"strategy": "windows", "stride": 30, "max_length": 32},
            r"task\.stride: a window shares 0 to 29 tokens with the last, not 30",
        ),
        ({"strategy": "windows", "stride": -1}, r"task\.stride: "),
        ({"max_windows": 0}, r"task\.max_windows: a document is read in 1 window or more, not in 0"),
        ({"pooling": "sum"}, r"task\.pooling: .*'mean' or 'max'"),
    ],
)
def test_windows_that_cannot_be_made(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=rf"^{expected}"):
        build(Filings, settings, "task")


def test_a_stride_that_the_model_has_no_room_for(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"^task\.stride: windows hold 62 tokens of a text, so 64 cannot be shared"):
        windows_of(["Sales rose."], tokenizer.model_max_length, 64, 4, tokenizer)


def long(row: dict[str, str]) -> dict[str, str]:
    return row | {"text": "<p>The report has four tables.</p> " * (len(row["text"]) % 5) + row["text"]}


def folder_of(path: Path) -> str:
    for split in small.SPLITS:
        small.write_jsonl(path / f"{split}.jsonl", [long(row) for row in small.rows(split)])
    return str(path)


def recipe(tmp_path: Path, model: Path) -> dict[str, Any]:
    return {
        "model": str(model), "output": str(tmp_path / "out"),
        "task": {
            "name": "filings", "dataset": folder_of(tmp_path / "data"), "strategy": "windows", "max_length": 12, "stride": 3,
            "max_windows": 4, "pooling": "max", "clean": True,
        },
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "taylor", "sparsity": 0.5}]},
        "distillation": {"hidden": 1.0},
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3,
            "train_sampling_strategy": "group_by_length", "eval_strategy": "steps", "eval_steps": 4,
        },
    }  # fmt: skip


def by_hand(folder: Path, text: str) -> torch.Tensor:
    """What the recipes' README tells a user of plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    windows = tokenizer(
        text,
        truncation=True,
        max_length=12,
        stride=3,
        return_overflowing_tokens=True,
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        logits = model(windows["input_ids"][:4], attention_mask=windows["attention_mask"][:4]).logits
    return logits.amax(0)


def test_train_evaluation_and_use_agree(
    tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    small.few_resamples(monkeypatch)
    content = recipe(tmp_path, tiny_folder())
    report = run(parse(content))
    assert report is not None
    folder = tmp_path / "out" / "compact"
    documents = [long(row)["text"] for row in small.rows("test")]
    logits = ask(str(folder), documents)
    names = AutoModelForSequenceClassification.from_pretrained(folder).config.id2label
    plain = torch.stack([by_hand(folder, text.replace("<p>", "").replace("</p>", "")) for text in documents])
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-4)
    labels = [row["label"] for row in small.rows("test")]
    right = sum(names[int(i)] == label for i, label in zip(logits.argmax(-1), labels, strict=True))
    assert report.quality.metrics["accuracy"]["pruned"] == pytest.approx(right / len(labels))
    card = (folder / "README.md").read_text()
    assert "the max of the logits of up to 4 windows of 12 tokens, 3 of them shared with the window before" in card

    # The recipe beside the model says how documents are read; options say otherwise.
    figures, _ = evaluate_saved(str(folder))
    assert figures["accuracy"]["value"] == pytest.approx(right / len(labels))
    assert figures["accuracy"]["interval"] == report.quality.metrics["accuracy"]["pruned_interval"], (
        "the same resamples"
    )
    other = Path(folder_of(tmp_path / "other"))
    small.write_jsonl(other / "test.jsonl", [long(row) for row in small.rows("test")[:2]])
    out = tmp_path / "figures.json"
    assert call("evaluate", folder, "--dataset", other, "--json", out) == 0
    assert json.loads(out.read_text())["accuracy"]["value"] == pytest.approx(
        sum(names[int(logits[i].argmax())] == labels[i] for i in range(2)) / 2
    )


def test_a_recipe_can_be_named_and_another_task_has_none(
    tmp_path: Path, tiny_folder: small.TinyFolder, call: Call
) -> None:
    model = tiny_folder()
    content = recipe(tmp_path, model) | {"output": str(tmp_path / "none")}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(content))
    seen: list[Any] = []
    tokenize = Filings.tokenize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Filings, "tokenize", lambda self, *more: seen.append(self) or tokenize(self, *more))
        assert call("evaluate", model, "--recipe", path, "--max-length", "20") == 0
        assert call("evaluate", model, "--task", "filings", "--dataset", tmp_path / "data") == 0
    assert [(task.strategy, task.max_length) for task in seen] == [("windows", 20), ("head", 512)]
    assert call("evaluate", model, "--recipe", tmp_path / "absent" / "recipe.yaml") == 2
    with pytest.raises(InputError, match=r"no recipe\.yaml of a classification lies there; name a folder that a run"):
        ask(str(model), ["Sales rose."])


def test_a_masked_column_asks_for_the_names_of_texts_in_use(tmp_path: Path, tiny_folder: small.TinyFolder) -> None:
    folder = tiny_folder()
    content = recipe(tmp_path, folder)
    content["task"] |= {"mask": {"column": "company"}}
    (folder / "recipe.yaml").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match="in training the names of column 'company' were masked; give those of these texts"
    ):
        ask(str(folder), ["Acme Inc. sold its ships."])
    masked = ask(str(folder), ["Acme sold its ships. Acme Inc. profit fell."], names=["Acme Inc."])
    by_hand = ask(str(folder), ["COMPANY sold its ships. COMPANY profit fell."], names=[])
    torch.testing.assert_close(masked, by_hand)


def test_a_text_in_use_is_prepared_as_in_training(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Acme\n")
    task = build(
        Filings, {"clean": True, "normalise_numbers": True, "mask": {"names": str(tmp_path / "names.txt")}}, "task"
    )
    assert task.prepared(["<b>Acme</b> sold 1,250 units."]) == ["COMPANY sold 0 units."]
