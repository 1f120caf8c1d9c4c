"""Several labels per row: from lists or a csv to the report; the judge, the losses and the weights against scikit-learn."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, pipeline

from finllm_prune.errors import InputError
from finllm_prune.evaluation import compare
from finllm_prune.judges import ClassJudge, LabelSetJudge
from finllm_prune.recipe import parse
from finllm_prune.run import run
from finllm_prune.settings import build
from finllm_prune.tasks.filings import Filings
from finllm_prune.tasks.label_sets import LabelSetLoss, LabelSets, positive_weights
from finllm_prune.training.logit_losses import set_kl
from tests import small

TOPICS = ["level", "move", "place"]  # in the order of the alphabet, as they are found
SETS = {"positive": ["move", "level"], "negative": ["move"], "neutral": []}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def sets_of(row: dict[str, str]) -> list[str]:
    return [*SETS[row["label"]], *(["place"] if "office" in row["text"] or "all" in row["text"] else [])]


def folder_of(path: Path, write: str = "lists") -> str:
    for split in small.SPLITS:
        rows: list[dict[str, Any]] = [{"text": row["text"], "label": sets_of(row)} for row in small.rows(split)]
        path.mkdir(exist_ok=True, parents=True)
        if write == "csv":
            table = {"text": [row["text"] for row in rows], "label": [" ; ".join(row["label"]) for row in rows]}
            datasets.Dataset.from_dict(table).to_csv(path / f"{split}.csv")
        elif write == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path / f"{split}.parquet")
        else:
            small.write_jsonl(path / f"{split}.jsonl", rows)
    return str(path)


@pytest.mark.parametrize("write", ["lists", "parquet", "csv"])
def test_lists_and_separated_texts_give_the_same_sets(tmp_path: Path, write: str) -> None:
    separator = ";" if write == "csv" else None
    examples = Filings(dataset=folder_of(tmp_path / write, write), label_sets=LabelSets(separator)).load()
    assert examples.labels == TOPICS
    found = [[TOPICS[i] for i, on in enumerate(row) if on] for row in examples.splits["train"]["label"]]
    assert found == [sorted(sets_of(row)) for row in small.rows("train")]
    assert [] in found, "a row may have no label"
    assert examples.counts("train")["move"] == 16
    turned = examples.reordered(TOPICS[::-1])
    assert turned.fingerprint() == examples.fingerprint()
    assert turned.splits["train"]["label"][0] == examples.splits["train"]["label"][0][::-1]


def test_a_class_label_in_a_list_is_an_index_of_the_column_s_names(tmp_path: Path) -> None:
    feature = datasets.List(datasets.ClassLabel(names=TOPICS))
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    for split in small.SPLITS:
        rows = [{"text": row["text"], "label": sets_of(row)} for row in small.rows(split)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    for labels in (None, TOPICS[::-1]):
        examples = Filings(dataset=str(tmp_path), label_sets=LabelSets(), labels=labels).load()
        assert examples.labels == (labels or TOPICS)
        assert examples.counts("train")["move"] == 16
        assert examples.counts("train")["level"] == 8


def test_a_run_learns_sets(tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    small.few_resamples(monkeypatch)
    content = {
        "model": str(tiny_folder()), "output": str(tmp_path / "out"),
        "task": {
            "name": "filings", "dataset": folder_of(tmp_path / "data"), "label_sets": {"threshold": 0.3}, "max_length": 24,
            "class_weights": "balanced",
        },
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "taylor", "sparsity": 0.5}]},
        "training": {
            "max_steps": 6, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3,
            "eval_strategy": "steps", "eval_steps": 6,
        },
        "gates": {"micro_f1": 0.0},
    }  # fmt: skip
    report = run(parse(content))
    assert report is not None
    folder = tmp_path / "out" / "compact"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.problem_type == "multi_label_classification"
    classify = pipeline("text-classification", model=str(folder), top_k=None)
    found = classify([row["text"] for row in small.rows("test")])
    said = [[{each["label"]: each["score"] >= 0.3 for each in row}[topic] for topic in TOPICS] for row in found]
    right = [[topic in sets_of(row) for topic in TOPICS] for row in small.rows("test")]
    assert report.quality.metrics["accuracy"]["pruned"] == pytest.approx(accuracy_score(right, said))
    expected = f1_score(right, said, average="micro", zero_division=0.0)
    assert report.quality.metrics["micro_f1"]["pruned"] == pytest.approx(expected)
    assert set(report.quality.per_class) == set(TOPICS)
    card = (folder / "README.md").read_text()
    assert "top_k=None" in card
    assert "A label is given where its score is 0.3 or more" in card
    assert "| move | 16 | 2 | 6 |" in card
    assert report.evidence is not None
    assert report.evidence.calibration is not None
    assert f"| Brier score | {report.evidence.calibration['dense'].brier:.3f} |" in card
    assert "Each label is a question" in card


def bad(value: Any) -> list[Any]:
    return LabelSets().read([value], TOPICS)


def test_what_is_no_set_of_known_labels_is_bad() -> None:
    assert bad(["move", "place"]) == [[0.0, 1.0, 1.0]]
    assert bad([0, 1]) == [[1.0, 1.0, 0.0]], "indices where labels are named"
    assert bad([]) == [[0.0, 0.0, 0.0]]
    assert bad([" move"]) == [[0.0, 1.0, 0.0]]
    assert LabelSets().read([[1], [3.0]], ["2", "3", "1"]) == [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], "names, not indices"
    for value in ("move", None, ["sector"], [None], [["move"]], [""], {"move": 1}, 3):
        assert bad(value) == [None]
    assert LabelSets(separator="|").read(["move|place", None, "", "sector", 3], TOPICS)[3:] == [None, None]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('["sector"]', r"line 1, has the unknown label \['sector'\]; known are level, move, place"),
        ("null", r"line 1, has no list of labels in column 'label' but None"),
    ],
)
def test_a_bad_set_is_named_with_its_line(tmp_path: Path, value: str, expected: str) -> None:
    folder = folder_of(tmp_path / "data")
    (tmp_path / "data" / "test.jsonl").write_text(
        f'{{"text": "So so.", "label": {value}}}\n' + json.dumps({"text": "So.", "label": ["move"]}) + "\n"
    )
    with pytest.raises(InputError, match=expected):
        Filings(dataset=folder, label_sets=LabelSets()).load()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"label_sets": {}, "thresholds": [0.1]}, r"task\.thresholds: this does not go with task\.label_sets"),
        ({"label_sets": {}, "focal_gamma": 2.0}, r"task\.focal_gamma: this does not go with task\.label_sets"),
        ({"label_sets": {"separator": ""}}, r"task\.label_sets\.separator: "),
        ({"label_sets": {"threshold": 1}}, r"task\.label_sets\.threshold: a probability lies between 0 and 1"),
    ],
)
def test_what_does_not_go_with_sets(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=rf"^{expected}"):
        build(Filings, settings, "task")


random = np.random.default_rng(0)
REFERENCES = (random.random((80, 4)) < [0.5, 0.3, 0.2, 0.0]).astype(np.int64)
LOGITS = {
    name: torch.tensor(4.0 * REFERENCES - 2 + random.normal(scale=scale, size=REFERENCES.shape))
    for name, scale in (("dense", 1.0), ("pruned", 2.5))
}


def test_the_judge_of_sets_is_scikit_learn_s() -> None:
    judge = LabelSetJudge(REFERENCES, ["a", "b", "c", "d"], ("accuracy", "micro_f1", "macro_f1"), threshold=0.4)
    quality = compare(judge, LOGITS["dense"], LOGITS["pruned"], resamples=29)
    said = {name: (logits.sigmoid() >= 0.4).numpy().astype(int) for name, logits in LOGITS.items()}
    for name, answers in said.items():
        assert quality.metrics["accuracy"][name] == pytest.approx(accuracy_score(REFERENCES, answers))
        micro = f1_score(REFERENCES, answers, average="micro")
        assert quality.metrics["micro_f1"][name] == pytest.approx(micro)
        occurring = [i for i in range(4) if answers[:, i].any() or REFERENCES[:, i].any()]
        macro = f1_score(REFERENCES, answers, average="macro", labels=occurring)
        assert quality.metrics["macro_f1"][name] == pytest.approx(macro)
        each = f1_score(REFERENCES, answers, average=None, zero_division=0.0)
        assert [row[name] for row in quality.per_class.values()] == pytest.approx(each.tolist())
    assert [row["rows"] for row in quality.per_class.values()] == REFERENCES.sum(0).tolist()
    assert quality.agreement == pytest.approx((said["dense"] == said["pruned"]).all(1).mean())
    was, now = ((said[name] == REFERENCES).all(1) for name in ("dense", "pruned"))
    assert quality.flips == {"right_to_wrong": int((was & ~now).sum()), "wrong_to_right": int((~was & now).sum())}
    assert not quality.collapsed
    assert compare(judge, LOGITS["dense"], torch.full((80, 4), -9.0), resamples=9).collapsed


def test_a_label_that_does_not_occur_lowers_no_mean() -> None:
    judge = LabelSetJudge(REFERENCES, ["a", "b", "c", "d"], ("macro_f1",))
    perfect = torch.tensor(10.0 * REFERENCES - 5)
    assert judge.value("macro_f1", judge.answers(perfect)) == 1.0
    assert judge.value("macro_f1", np.zeros((2, 4), dtype=np.int64), np.array([0, 1])) in (0.0,)


def test_balanced_weights_let_both_sides_of_a_label_count_alike() -> None:
    rows = REFERENCES[:, :3].tolist()
    weights = positive_weights("balanced", TOPICS, rows)
    held = REFERENCES[:, :3].sum(0)
    np.testing.assert_allclose(weights.numpy() * held, 80 - held, rtol=1e-6)
    logits, labels = LOGITS["dense"][:, :3].float(), torch.tensor(rows).float()
    p = logits.sigmoid()
    formula = -(weights * labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(LabelSetLoss(weights)(logits, labels), formula)
    with pytest.raises(InputError, match=r"^task\.class_weights: no training row has the label place"):
        positive_weights("balanced", TOPICS, [[1, 0, 0], [0, 1, 0]])
    with pytest.raises(
        InputError, match=r"^task\.class_weights: every training row has the label level, so it cannot be"
    ):
        positive_weights("balanced", TOPICS, [[1, 0, 1], [1, 1, 0]])
    assert positive_weights({"level": 2.0, "move": 1.0, "place": 3.0}, TOPICS, rows).tolist() == [2.0, 1.0, 3.0]


def test_the_teacher_s_sets_are_compared_label_by_label() -> None:
    student, teacher = LOGITS["pruned"].float().requires_grad_(), LOGITS["dense"].float()
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    formula = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(set_kl(student, teacher, 2.0), formula, atol=1e-6, rtol=1e-4)
    assert abs(float(set_kl(teacher, teacher, 2.0))) < 1e-6


def test_top3_accuracy_looks_at_the_order_of_many_classes() -> None:
    logits = torch.eye(5) * 3 + torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    judge = ClassJudge(np.array([0, 1, 2, 3, 4]), list("abcde"), ("accuracy", "top3_accuracy"))
    wrong = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).repeat(5, 1)
    quality = compare(judge, logits, wrong, resamples=9)
    assert quality.metrics["top3_accuracy"]["dense"] == 1.0
    assert (quality.metrics["accuracy"]["pruned"], quality.metrics["top3_accuracy"]["pruned"]) == (0.2, 0.6)
    assert quality.collapsed


def test_the_embedded_passages_have_enough_items_for_it() -> None:
    examples = Filings().load()
    assert Filings().judge(examples).metrics == ("accuracy", "macro_f1", "micro_f1", "top3_accuracy")


def test_codes_that_are_all_single_are_numbers_in_a_csv() -> None:
    assert LabelSets(separator=";").read([1, 2, "1;2"], ["1", "2", "3"]) == [
        [1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0],
        [1.0, 1.0, 0.0],
    ]
