"""Scores: numbers instead of classes, from the rows to the report; and the judge of numbers against SciPy and scikit-learn."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wilcoxon
from sklearn.metrics import r2_score
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from finllm_prune.errors import InputError
from finllm_prune.evaluation import compare
from finllm_prune.judges import ScoreJudge
from finllm_prune.prepare import read
from finllm_prune.recipe import parse
from finllm_prune.run import run
from finllm_prune.saved import evaluate_saved
from finllm_prune.settings import build
from finllm_prune.tasks.scores import Scores
from finllm_prune.tasks.sentiment import Sentiment
from finllm_prune.training.logit_losses import mse
from tests import small

NUMBERS = {"positive": 0.7, "negative": -0.6, "neutral": 0.05}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def folder_of(path: Path) -> str:
    for split in small.SPLITS:
        rows = [
            {"text": row["text"], "label": NUMBERS[row["label"]] + len(row["text"]) / 1000} for row in small.rows(split)
        ]
        small.write_jsonl(path / f"{split}.jsonl", rows)
    return str(path)


def recipe(tmp_path: Path, model: Path, **task: Any) -> dict[str, Any]:
    return {
        "model": str(model), "output": str(tmp_path / "out"),
        "task": {"name": "sentiment", "dataset": folder_of(tmp_path / "data"), "scores": {}} | task,
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "taylor", "sparsity": 0.5}]},
        "training": {
            "max_steps": 6, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3,
            "eval_strategy": "steps", "eval_steps": 6,
        },
        "gates": {"mse": 10.0},
    }  # fmt: skip


def test_a_run_learns_numbers_and_its_model_gives_them(
    tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    content = recipe(tmp_path, tiny_folder())
    parsed = parse(content)
    assert parse(parsed.resolved).task == parsed.task
    report = run(parsed)
    assert report is not None
    assert report.passed()
    assert set(report.quality.metrics) == {"mse", "mae", "pearson", "spearman", "r2"}
    assert report.quality.paired_test.startswith("Wilcoxon")
    assert report.run["data"]["scores"]["test"]["highest"] > 0.7
    folder = tmp_path / "out" / "compact"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (model.config.num_labels, model.config.problem_type, model.config.intermediate_size) == (1, "regression", 32)
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "data" / "test.jsonl"), split="train")
    said = [each["score"] for each in pipeline("text-classification", model=str(folder))(list(rows["text"]))]
    expected = float(np.mean((np.array(said) - np.array(rows["label"])) ** 2))
    assert report.quality.metrics["mse"]["pruned"] == pytest.approx(expected, rel=1e-4)
    assert "scores of test: " in (folder / "README.md").read_text()
    figures, _ = evaluate_saved(str(folder))
    assert figures["mse"]["value"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", ["good", None, float("nan"), float("inf"), True, [0.5]], ids=repr)
def test_what_is_no_number_is_a_bad_row(value: Any) -> None:
    assert Scores().read([0.5, value, "-0.25", 1]) == [0.5, None, -0.25, 1.0]


@pytest.mark.parametrize(
    ("good", "bad", "said"), [("0.5", "null", "None"), ("0.5", "NaN", "nan"), ('"0.5"', '"soon"', "'soon'")]
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, good: str, bad: str, said: str) -> None:
    folder = Path(folder_of(tmp_path / "data"))
    lines = [f'{{"text": "So so.", "label": {label}}}\n' for label in (good, bad)]
    (folder / "test.jsonl").write_text("".join(lines))
    with pytest.raises(
        InputError, match=rf"test\.jsonl, line 2, has {said} in column 'label', which is no number; mend it"
    ):
        Sentiment(dataset=str(folder), scores=Scores()).load()
    examples = Sentiment(dataset=str(folder), scores=Scores(), bad_rows="skip").load()
    assert list(examples.splits["test"]["label"]) == [0.5]
    assert examples.facts["bad_rows"] == {"test": {"no number": 1}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scores": {}, "labels": ["a", "b"]}, r"task\.labels: this does not go with task\.scores"),
        ({"scores": {}, "class_weights": "balanced"}, r"task\.class_weights: this does not go with task\.scores"),
        ({"scores": {}, "focal_gamma": 2.0}, r"task\.focal_gamma: this does not go with task\.scores"),
        ({"scores": {}, "label_sets": {}}, r"task\.label_sets: this does not go with task\.scores"),
        ({"scores": {"huber": 0}}, r"task\.scores\.huber: errors are larger than 0"),
        ({"scores": {"tolerance": -1}}, r"task\.scores\.tolerance: "),
        ({"scores": {"tolerence": 1}}, r"task\.scores"),
    ],
)
def test_what_does_not_go_with_scores(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=rf"^{expected}"):
        build(Sentiment, settings, "task")


def test_a_gate_of_another_task_is_refused_before_training(tmp_path: Path, tiny_folder: small.TinyFolder) -> None:
    content = recipe(tmp_path, tiny_folder()) | {"gates": {"macro_f1_retention": 0.9}}
    with pytest.raises(InputError, match=r"^gates\.macro_f1_retention: this task does not measure it but mse, mae"):
        read(parse(content))


@pytest.mark.parametrize(
    ("change", "rows", "said"),
    [
        ({"distillation": {"logits": "margin_mse"}}, 3, r"distillation\.logits: margin_mse compares passages"),
        ({}, 1, r"task\.dataset: the test split has 1 row, and two models"),
    ],
    ids=["margins of numbers", "one test row"],
)
def test_what_no_run_can_end_with_is_refused_before_it(
    change: dict[str, Any], rows: int, said: str, tmp_path: Path, tiny_folder: small.TinyFolder
) -> None:
    content = recipe(tmp_path, tiny_folder()) | change
    test = Path(content["task"]["dataset"]) / "test.jsonl"
    test.write_text("".join(test.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{said}"):
        read(parse(content))


def test_a_correlation_below_zero_keeps_no_part_of_itself() -> None:
    right = np.linspace(-1.0, 1.0, 9)
    judge = ScoreJudge(right, ("pearson", "mse"), tolerance=0.1)
    dense, pruned = (torch.as_tensor(sign * right)[:, None] for sign in (-0.1, -1.0))
    quality = compare(judge, dense, pruned, resamples=9)
    assert quality.metrics["pearson"]["dense"] == pytest.approx(-1.0)
    assert quality.retention["pearson"] == 0.0, "a gate on the part that is left does not pass"
    assert quality.retention["mse"] > 1


def test_losses_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(8, 1, generator=generator), torch.randn(8, generator=generator).double()
    off = (logits[:, 0] - labels).abs().float()
    torch.testing.assert_close(Scores().loss(logits, labels), (off**2).mean())
    huber = torch.where(off < 0.5, off**2 / 2, 0.5 * (off - 0.25)).mean()
    torch.testing.assert_close(Scores(huber=0.5).loss(logits, labels), huber)
    assert Scores().loss(logits[:1], labels[:1]).shape == ()
    torch.testing.assert_close(mse(logits, logits + 1), torch.tensor(1.0))


random = np.random.default_rng(0)
REFERENCES = random.normal(size=60)
DENSE, PRUNED = (torch.tensor(REFERENCES[:, None] + random.normal(scale=s, size=(60, 1))) for s in (0.1, 0.4))


def test_the_judge_of_numbers() -> None:
    judge = ScoreJudge(REFERENCES, Scores.metrics, tolerance=0.2)
    quality = compare(judge, DENSE, PRUNED, resamples=49)
    dense, pruned = DENSE[:, 0].numpy(), PRUNED[:, 0].numpy()
    assert quality.metrics["mse"]["dense"] == pytest.approx(float(F.mse_loss(DENSE[:, 0], torch.tensor(REFERENCES))))
    assert quality.metrics["r2"]["pruned"] == pytest.approx(r2_score(REFERENCES, pruned))
    assert quality.agreement == pytest.approx(np.mean(np.abs(dense - pruned) <= 0.2))
    was, now = (dense - REFERENCES) ** 2, (pruned - REFERENCES) ** 2
    assert quality.flips == {"worse": int((now > was).sum()), "better": int((now < was).sum())}
    assert quality.paired_p == pytest.approx(wilcoxon(was, now).pvalue)
    assert quality.paired_p < 0.01
    assert (quality.per_class, quality.collapsed) == ({}, False)
    low, high = quality.metrics["mae"]["pruned_interval"]
    assert low < quality.metrics["mae"]["pruned"] < high


def test_a_model_of_one_number_is_collapsed_and_two_equal_models_are_not_told_apart() -> None:
    judge = ScoreJudge(REFERENCES, Scores.metrics, tolerance=0.2)
    assert compare(judge, DENSE, torch.full((60, 1), 0.3), resamples=9).collapsed
    same = compare(judge, DENSE, DENSE, resamples=9)
    assert (same.paired_p, same.agreement) == (1.0, 1.0)
    broken = compare(judge, DENSE, torch.full((60, 1), torch.nan), resamples=9)
    assert broken.metrics["mse"]["pruned"] > 1e12
    assert broken.collapsed


def test_numbers_reach_the_model_as_floats(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = datasets.Dataset.from_dict({"text": ["Sales rose."], "label": [0.5]})
    task = Sentiment(scores=Scores())
    batch = task.collator(tokenizer)(list(task.tokenize(rows, tokenizer)))
    assert batch["labels"].dtype == torch.float32
