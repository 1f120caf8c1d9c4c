"""Texts without labels: what is taken of them, what their teacher says of them, and who is refused them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.inference import logits_of
from finllm_prune.plan import plan
from finllm_prune.prepare import prepare
from finllm_prune.recipe import Recipe, parse
from finllm_prune.run import run, taught_rows
from finllm_prune.saved import evaluate_saved
from finllm_prune.tasks.filings import Filings
from finllm_prune.tasks.masking import Mask
from finllm_prune.tasks.sentiment import Sentiment
from tests import small
from tests.conftest import loud, tiny_model

NEW = ["Margins rose.", "Demand fell sharply in all regions.", "The board has a new member."]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """The keys of a task whose texts are three new ones, two of a split and one that comes twice."""
    known = [small.rows("test")[0]["text"], small.rows("train")[0]["text"].upper()]
    file = tmp_path / "more.txt"
    file.write_text("\n".join([NEW[0], *known, *NEW[1:], "margins rose"]), encoding="utf-8")
    return {"dataset": str(small.write_folder(tmp_path / "data")), "unlabelled": str(file)}


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, data: dict[str, str]) -> Any:
    """Makes a recipe of a tiny model with these texts."""
    loud(tiny_model()).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def make(task: dict[str, Any] | None = None, **keys: Any) -> Recipe:
        return parse(
            {
                "model": str(tmp_path / "model"),
                "task": {"name": "sentiment", **data, **(task or {})},
                "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]},
                "dense": {"training": {"num_train_epochs": 1}},
                "training": {"num_train_epochs": 1, "per_device_train_batch_size": 3, "use_cpu": True, "disable_tqdm": True},
                "export": ["masked"],
                "output": str(tmp_path / "out"),
                **keys,
            }
        )  # fmt: skip

    return make


def test_copies_of_what_lies_in_a_split_are_left_out_and_the_rest_belongs_to_the_fingerprint(
    data: dict[str, str],
) -> None:
    with_texts, without = Sentiment(**data).load(), Sentiment(dataset=data["dataset"]).load()
    assert with_texts.unlabelled is not None
    assert list(with_texts.unlabelled["text"]) == NEW
    assert with_texts.facts["unlabelled"] == {"rows": 3, "copies_left_out": 3}
    assert with_texts.fingerprint() != without.fingerprint()
    assert with_texts.counts("train") == without.counts("train")


def test_their_names_are_masked_as_those_of_the_data(tmp_path: Path, data: dict[str, str]) -> None:
    Path(data["unlabelled"]).write_text("In 2026 sales of 5 shops rose.", encoding="utf-8")
    examples = Sentiment(**data, normalise_numbers=True).load()
    assert examples.unlabelled is not None
    assert list(examples.unlabelled["text"]) == ["In 0 sales of 0 shops rose."]


def test_the_names_of_the_column_go_from_them_too(tmp_path: Path, data: dict[str, str]) -> None:
    for split in small.SPLITS:
        content = [{**row, "text": f"Acme: {row['text']}", "company": "Acme Inc"} for row in small.rows(split)]
        small.write_jsonl(tmp_path / "data" / f"{split}.jsonl", content)
    Path(data["unlabelled"]).write_text(f"Acme: {small.rows('test')[0]['text']}\nAcme grew.", encoding="utf-8")
    examples = Sentiment(**data, mask=Mask(column="company")).load()
    assert examples.unlabelled is not None
    assert list(examples.unlabelled["text"]) == ["COMPANY grew."]
    assert examples.facts["unlabelled"] == {"rows": 1, "copies_left_out": 1}


def test_texts_of_markup_alone_are_passed_over(data: dict[str, str]) -> None:
    Path(data["unlabelled"]).write_text("<p></p>\n<p>Margins rose.</p>", encoding="utf-8")
    examples = Filings(**data, clean=True).load()
    assert examples.unlabelled is not None
    assert list(examples.unlabelled["text"]) == ["Margins rose."]
    assert examples.facts["unlabelled"] == {"rows": 1, "copies_left_out": 0}
    Path(data["unlabelled"]).write_text("<p></p>", encoding="utf-8")
    with pytest.raises(InputError, match=r"^task\.unlabelled: .* holds no text"):
        Filings(**data, clean=True).load()


def test_they_lie_in_the_column_of_the_data(tmp_path: Path, data: dict[str, str]) -> None:
    for split in small.SPLITS:
        content = [{"sentence": row["text"], "label": row["label"]} for row in small.rows(split)]
        small.write_jsonl(tmp_path / "data" / f"{split}.jsonl", content)
    small.write_jsonl(tmp_path / "more.jsonl", [{"sentence": text, "text": "another"} for text in NEW])
    small.write_jsonl(tmp_path / "other.jsonl", [{"text": text} for text in NEW])
    task = Sentiment(**data | {"unlabelled": str(tmp_path / "more.jsonl")}, text_column="sentence")
    examples = task.load()
    assert examples.unlabelled is not None
    assert list(examples.unlabelled["text"]) == NEW
    with pytest.raises(InputError, match=r"^task\.unlabelled: .*no column 'sentence' \(task\.text_column\)"):
        replace(task, unlabelled=str(tmp_path / "other.jsonl")).load()


@pytest.mark.parametrize(
    "task",
    [{}, {"label_sets": {"threshold": 0.5}}, {"scores": {}}],
    ids=["classes", "sets", "scores"],
)
def test_what_is_right_is_what_the_teacher_says(
    tmp_path: Path, recipe: Any, data: dict[str, str], task: dict[str, Any]
) -> None:
    numbers = {"negative": -1.0, "neutral": 0.0, "positive": 1.0}
    for split in small.SPLITS if task else ():
        of = {"scores": lambda label: numbers[label], "label_sets": lambda label: [label]}[next(iter(task))]
        rows = [{"text": row["text"], "label": of(row["label"])} for row in small.rows(split)]
        small.write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    ready = prepare(recipe(task), resume=False, overwrite=False)
    rows = taught_rows(ready, ready.model)
    count = len(ready.tokens["train"])
    assert rows.select(range(count)).to_dict() == ready.tokens["train"].to_dict()
    own: datasets.Dataset = rows.select(range(count, len(rows)))
    logits = logits_of(ready.model, own, ready.recipe.task.collator(ready.tokenizer))
    labels = torch.tensor(own["labels"])
    if "scores" in task:
        assert torch.allclose(labels, logits[:, 0], atol=1e-5)
    elif "label_sets" in task:
        assert torch.equal(labels, (logits > 0).float())
    else:
        assert torch.equal(labels, logits.argmax(-1))
    assert len(own) == 3


def test_a_run_learns_from_them_and_who_evaluates_it_needs_them_no_more(
    tmp_path: Path, recipe: Any, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    report = run(recipe(distillation={"cache": True}))
    assert report is not None
    found = report.to_dict()
    assert found["data"]["unlabelled"] == {"rows": 3, "copies_left_out": 3}
    assert found["data"]["rows"]["train"] == 24
    history = [entry["step"] for entry in found["history"]]
    assert max(history) == 9, "an epoch of 24 rows and 3 more in batches of 3"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "the pruned model learned from 3 more texts, of which no label is known" in card
    Path(data["unlabelled"]).unlink()
    again, _ = evaluate_saved(str(tmp_path / "out" / "masked"))
    assert again["accuracy"]["value"] == found["accuracy"]["pruned"]


def test_a_plan_counts_them_and_the_answers_that_label_them(recipe: Any) -> None:
    seconds = plan(recipe()).seconds
    assert min(seconds["pruning"], seconds["teacher"]) > 0
    assert "teacher" not in plan(recipe(task={"unlabelled": None})).seconds


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"distillation": None}, "task.unlabelled: without a teacher nobody labels these texts"),
        ({"task": {"pair_column": "label"}}, "task.unlabelled: texts alone are no pairs; remove it, or pair_column"),
        ({"task": {"unlabelled": "nowhere.txt"}}, "task.unlabelled: nowhere.txt is no .txt"),
    ],
)
def test_whom_they_are_of_no_use_to_is_refused(recipe: Any, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        prepare(recipe(**keys), resume=False, overwrite=False)


def test_texts_that_all_lie_in_a_split_are_refused(data: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"every text of .*data lies in a split already"):
        Sentiment(dataset=data["dataset"], unlabelled=data["dataset"]).load()
