"""Sentiment beyond one text and three labels: pairs, scores, other labels, weights of classes, focal loss."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_sample_weight
from tokenizers import processors
from transformers import PreTrainedTokenizerFast, TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.prepare import prepare
from finllm_prune.provenance import provenance
from finllm_prune.recipe import parse
from finllm_prune.tasks.sentiment import Sentiment
from finllm_prune.tasks.skew import SkewLoss, class_weights
from finllm_prune.training import Distillation, PruningTrainer, Teacher
from tests import small
from tests.conftest import LABELS, tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def folder_of(path: Path, change: Any) -> str:
    for split in small.SPLITS:
        rows = [change(row) for row in small.rows(split)]
        small.write_jsonl(path / f"{split}.jsonl", [row for row in rows if row])
    return str(path)


TONES = {"positive": "hawkish", "negative": "dovish", "neutral": "neutral"}
OTHERS = [
    (lambda row: row | {"label": TONES[row["label"]]}, ["dovish", "hawkish", "neutral"]),
    (lambda row: row if row["label"] != "neutral" else None, ["negative", "positive"]),
]


@pytest.mark.parametrize(("change", "labels"), OTHERS, ids=["hawkish", "binary"])
def test_any_labels_make_the_head(
    tmp_path: Path, tiny_folder: small.TinyFolder, change: Any, labels: list[str]
) -> None:
    task = {"name": "sentiment", "dataset": folder_of(tmp_path / "data", change), "class_weights": "balanced"}
    rules = {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]}
    recipe = {
        "model": str(tiny_folder()), "task": task, "output": str(tmp_path / "out"), "pruning": rules,
        "training": {"use_cpu": True},
    }  # fmt: skip
    ready = prepare(parse(recipe), resume=False, overwrite=False)
    assert ready.examples.labels == labels
    assert ready.model.config.id2label == dict(enumerate(labels))
    assert parse(ready.recipe.resolved).task == ready.recipe.task
    data = provenance(ready)["data"]
    assert data["labels"]["train"] == dict.fromkeys(labels, 8)
    assert data["leakage"]["test in train"] == {"exact": 0, "near": 0}


def parquet_of(path: Path, values: list[Any], feature: Any = None) -> str:
    """The value of each label, in the order of ``LABELS``."""
    path.mkdir()
    for split in small.SPLITS:
        rows = [row | {"label": values[LABELS.index(row["label"])]} for row in small.rows(split)]
        table = datasets.Dataset.from_list(rows)
        table = table if feature is None else table.cast_column("label", feature)
        table.to_parquet(path / f"{split}.parquet")
    return str(path)


def named(dataset: str, labels: list[str] | None) -> list[str]:
    """What the three values of a column are called, in the order of ``LABELS``."""
    examples = Sentiment(dataset=dataset, labels=labels).load()
    assert examples.labels == (labels or examples.labels)
    found = dict(zip((row["label"] for row in small.rows("test")), examples.splits["test"]["label"], strict=True))
    return [examples.labels[found[name]] for name in LABELS]


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([1, 2, 3], ["3", "2", "1"], ["1", "2", "3"]),
        ([1.0, 2.0, 3.0], ["1", "2", "3"], ["1", "2", "3"]),
        ([-1, 0, 1], ["-1", "0", "1"], ["-1", "0", "1"]),
        ([1.01, 2.02, 1.1], ["1.01", "1.10", "2.02"], ["1.01", "2.02", "1.10"]),
        ([0, 1, 1], ["1", "0"], ["0", "1", "1"]),
        ([False, True, True], ["True", "False"], ["False", "True", "True"]),
        ([False, True, True], ["true", "false"], ["false", "true", "true"]),
        ([False, True, True], ["down", "up"], ["down", "up", "up"]),
        ([False, True, True], ["1", "0"], ["0", "1", "1"]),
        ([0, 1, 1], ["false", "true"], ["false", "true", "true"]),
        ([0.0, 1.0, 2.0], ["down", "so", "up"], ["down", "so", "up"]),
        ([Decimal(0), Decimal(1), Decimal(2)], ["down", "so", "up"], ["down", "so", "up"]),
        (["0", "1", "2"], ["down", "so", "up"], ["down", "so", "up"]),
    ],
)
def test_a_number_is_the_class_that_is_called_so_or_else_an_index(
    tmp_path: Path, values: list[Any], labels: list[str], expected: list[str]
) -> None:
    assert named(parquet_of(tmp_path / "data", values), labels) == expected


def test_numbers_that_name_no_class_are_refused_where_others_do(tmp_path: Path) -> None:
    folder = parquet_of(tmp_path / "data", [0, 1, 2])
    with pytest.raises(InputError, match=r"row 0, has the unknown label 2; known are 0, 1 \(the first of"):
        Sentiment(dataset=folder, labels=["0", "1"]).load()


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (LABELS, ["positive", "neutral", "negative"], LABELS),
        (LABELS, ["dovish", "neutral", "hawkish"], ["dovish", "neutral", "hawkish"]),
        (["1", "2", "3"], None, ["1", "2", "3"]),
        (["1", "2", "3"], ["3", "2", "1"], ["1", "2", "3"]),
        (["1", "2", "3"], ["2", "1", "0"], ["2", "1", "0"]),
    ],
)
def test_the_values_of_a_class_label_column_are_indices_of_its_names(
    tmp_path: Path, names: list[str], labels: list[str] | None, expected: list[str]
) -> None:
    folder = parquet_of(tmp_path / "data", [0, 1, 2], datasets.ClassLabel(names=names))
    assert named(folder, labels) == expected


def test_a_class_label_column_of_more_names_than_are_given_is_refused(tmp_path: Path) -> None:
    folder = parquet_of(tmp_path / "data", [0, 1, 2], datasets.ClassLabel(names=LABELS))
    with pytest.raises(InputError, match=r"has the unknown label 2; known are negative, positive"):
        Sentiment(dataset=folder, labels=["negative", "positive"]).load()


def pair_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As BERT's: a second text has its own separator and type."""
    own = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return own


def test_a_pair_is_told_apart_and_belongs_to_the_fingerprint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = folder_of(tmp_path / "data", lambda row: row | {"aspect": "sales"})
    examples = Sentiment(dataset=folder, pair_column="aspect").load()
    assert examples.texts("test") == [row["text"] for row in small.rows("test")] + ["sales"] * 9
    own = pair_tokenizer(tokenizer)
    task = Sentiment(max_length=12, pair_column="aspect")
    tokens = task.tokenize(examples.splits["test"], own)
    expected = own(small.rows("test")[0]["text"], "sales", truncation=True, max_length=12)
    assert tokens[0] == {**expected, "labels": LABELS.index("positive")}
    assert set(tokens[0]["token_type_ids"]) == {0, 1}
    batch = task.collator(own)([tokens[i] for i in range(3)])
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    other = folder_of(tmp_path / "other", lambda row: row | {"aspect": "profit"})
    prints = {
        Sentiment(dataset=d, pair_column=c).load().fingerprint() for d in (folder, other) for c in ("aspect", None)
    }
    assert len(prints) == 3
    turned = examples.reordered(LABELS[::-1])
    assert turned.fingerprint() == examples.fingerprint()
    assert turned.facts == examples.facts


def test_a_row_without_its_pair_is_bad(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", lambda row: row | {"aspect": " "})
    with pytest.raises(InputError, match=r"train\.jsonl, line 1, has no text in column 'aspect' \(the first of 36"):
        Sentiment(dataset=folder, pair_column="aspect").load()


def test_scores_become_classes_by_thresholds_and_are_not_taken_for_labels(tmp_path: Path) -> None:
    scores = {"positive": [0.2, 0.9], "negative": [-1.0, -0.21], "neutral": [-0.2, 0.19]}
    folder = folder_of(tmp_path / "data", lambda row: row | {"label": scores[row["label"]][len(row["text"]) % 2]})
    with pytest.raises(
        InputError,
        match=r"^task\.thresholds: column 'label' .* learn them as such by task\.scores: \{\}, or give those",
    ):
        Sentiment(dataset=folder).load()
    order = ["negative", "neutral", "positive"]
    examples = Sentiment(dataset=folder, labels=order, thresholds=[-0.2, 0.2]).load()
    assert [order[i] for i in examples.splits["test"]["label"]] == [row["label"] for row in small.rows("test")]
    for keys in ({}, {"labels": order}, {"labels": LABELS, "thresholds": [0.2, -0.2]}):
        with pytest.raises(InputError, match=r"^task\.thresholds: "):
            Sentiment(**{"thresholds": [0.0], **keys})


logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
classes = torch.tensor([0, 1, 2, 2, 2, 2, 2, 2, 1, 2, 2, 2])


def test_balanced_weights_are_scikit_learn_s_and_weigh_rows() -> None:
    weights = class_weights("balanced", ["a", "b", "c"], classes.tolist())
    by_row = torch.tensor(compute_sample_weight("balanced", classes.numpy()), dtype=torch.float32)
    torch.testing.assert_close(weights[classes], by_row)
    assert float(by_row.mean()) == pytest.approx(1.0)
    whole = SkewLoss(weights, 0.0)(logits, classes)
    # Over all training rows both means are the same; over a batch torch divides by the batch's own weights.
    torch.testing.assert_close(whole, F.cross_entropy(logits, classes, weight=weights))
    parts = torch.stack([SkewLoss(weights, 0.0)(logits[i : i + 4], classes[i : i + 4]) for i in (0, 4, 8)])
    torch.testing.assert_close(parts.mean(), whole)
    named = class_weights({"c": 1.0, "a": 3.0, "b": 2.0}, ["a", "b", "c"], [])
    assert named.tolist() == [3.0, 2.0, 1.0]


def test_the_focal_loss_is_its_formula_and_has_a_gradient_everywhere() -> None:
    p = logits.softmax(-1)[torch.arange(12), classes]
    torch.testing.assert_close(SkewLoss(None, 2.0)(logits, classes), ((1 - p) ** 2 * -p.log()).mean())
    torch.testing.assert_close(SkewLoss(None, 0.0)(logits, classes), F.cross_entropy(logits, classes))
    sure = torch.tensor([[100.0, 0.0], [-100.0, 0.0]], requires_grad=True)
    SkewLoss(None, 0.5)(sure, torch.tensor([0, 0])).backward()
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize(
    ("asked", "rows", "expected"),
    [
        ({"a": 1.0}, [0, 1], "each of a, b needs a weight, none below 0 and one above; given are a"),
        ({"a": 1.0, "b": -1.0}, [0, 1], "each of a, b needs a weight"),
        ({"a": 0.0, "b": 0.0}, [0, 1], "each of a, b needs a weight"),
        ("balanced", [0, 0], "no training row has the label b, so it cannot be balanced"),
    ],
)
def test_weights_that_do_not_fit(asked: Any, rows: list[int], expected: str) -> None:
    with pytest.raises(InputError, match=rf"^task\.class_weights: {expected}"):
        class_weights(asked, ["a", "b"], rows)


def trained(folder: Path, batch: int, steps: int, loss: Any, taught: bool) -> PruningTrainer:
    rng = np.random.default_rng(0)
    columns = {"input_ids": rng.integers(4, 300, (24, 6)).tolist(), "labels": (rng.integers(0, 6, 24) // 2).tolist()}
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, learning_rate=1e-2, optim="sgd", disable_tqdm=True,
        max_grad_norm=0.0, dataloader_pin_memory=False,
    )  # fmt: skip
    teacher = Teacher(tiny_model(seed=2), Distillation(alpha=0.5, hidden=0.0), [0, 1]) if taught else None
    result = PruningTrainer(
        tiny_model(seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), args, teacher=teacher,
        train_dataset=datasets.Dataset.from_dict(columns), task_loss=loss,
    )  # fmt: skip
    result.train()
    return result


@pytest.mark.parametrize("taught", [False, True])
def test_the_trainer_takes_the_loss_and_accumulates_it_to_that_of_the_large_batch(tmp_path: Path, taught: bool) -> None:
    loss = SkewLoss(torch.tensor([9.0, 1.0, 0.1]), 1.0)
    whole, parts = (trained(tmp_path, *sizes, loss, taught) for sizes in ((8, 1), (2, 4)))
    plain = trained(tmp_path, 8, 1, None, taught)
    logs = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, parts, plain)]
    assert logs[0] == pytest.approx(logs[1], abs=2e-4)
    assert logs[0] != pytest.approx(logs[2], abs=1e-2)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_smoothed_labels_go_with_weights_and_the_focal_loss() -> None:
    plain = F.cross_entropy(logits, classes, label_smoothing=0.2)
    torch.testing.assert_close(SkewLoss(None, 0.0).smoothed(0.2)(logits, classes), plain)
    weights, p = torch.tensor([9.0, 1.0, 0.1]), logits.softmax(-1)
    own, all_alike = p[torch.arange(12), classes], p.log().mean(-1)
    expected = weights[classes] * (1 - own) ** 2 * -(0.8 * own.log() + 0.2 * all_alike)
    torch.testing.assert_close(SkewLoss(weights, 2.0).smoothed(0.2)(logits, classes), expected.mean())


def test_the_trainer_smooths_the_labels_of_the_task_s_loss(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=0.1)
    loss, model = SkewLoss(torch.tensor([9.0, 1.0, 0.1]), 1.0), tiny_model().eval()
    batch = {"input_ids": torch.randint(4, 300, (6, 5)), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    found = PruningTrainer(model, args, task_loss=loss).compute_loss(model, batch)
    torch.testing.assert_close(found, loss.smoothed(0.1)(model(**batch).logits, batch["labels"]))


def test_a_loss_without_a_class_a_row_refuses_smoothed_labels(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=0.1)
    with pytest.raises(InputError, match=r"^training\.label_smoothing_factor: it goes with one class a row"):
        PruningTrainer(tiny_model(), args, task_loss=F.mse_loss)


@pytest.mark.parametrize("phase", ["dense", "prune"])
def test_smoothed_scores_are_refused_before_anything_is_trained(
    tmp_path: Path, tiny_folder: small.TinyFolder, phase: str
) -> None:
    scores = {"positive": 1.0, "neutral": 0.0, "negative": -1.0}
    folder = folder_of(tmp_path / "data", lambda row: row | {"label": scores[row["label"]]})
    smoothing = {"training": {"label_smoothing_factor": 0.1}}
    recipe = {
        "model": str(tiny_folder()), "task": {"name": "sentiment", "dataset": folder, "scores": {}},
        "output": str(tmp_path / "out"), "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]},
        "training": {"use_cpu": True},
    }  # fmt: skip
    recipe |= {"dense": smoothing} if phase == "dense" else smoothing
    key = "dense.training" if phase == "dense" else "training"
    with pytest.raises(InputError, match=rf"^{key}\.label_smoothing_factor: it goes with one class a row"):
        prepare(parse(recipe), resume=False, overwrite=False)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())
