"""Dense against pruned: intervals, flips, the paired test, and the collapse to one class."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from finllm_prune.evaluation import Quality, Report, compare
from finllm_prune.evaluation.sparsity import layer_table
from finllm_prune.judges import ClassJudge, LabelSetJudge
from finllm_prune.judges.judge import one_by_one
from tests.conftest import LABELS, tiny_model

RANDOM = np.random.default_rng(0)
REFERENCES = RANDOM.integers(0, 3, 200)


def noisy(part: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.where(generator.random(200) < part, generator.integers(0, 3, 200), REFERENCES)


def judge(dense: np.ndarray, pruned: np.ndarray) -> Quality:
    judge = ClassJudge(REFERENCES, LABELS, ("accuracy", "macro_f1", "mcc"))
    return compare(judge, *(torch.eye(3)[torch.as_tensor(classes)] for classes in (dense, pruned)), resamples=99)


def test_the_figures_are_their_formulas() -> None:
    dense, pruned = noisy(0.2, 1), noisy(0.4, 2)
    quality = judge(dense, pruned)
    right, now = dense == REFERENCES, pruned == REFERENCES
    assert quality.metrics["accuracy"]["dense"] == pytest.approx(right.mean())
    assert quality.retention["accuracy"] == pytest.approx(now.mean() / right.mean())
    assert quality.agreement == pytest.approx((dense == pruned).mean())
    lost, won = int((right & ~now).sum()), int((~right & now).sum())
    assert quality.flips == {"right_to_wrong": lost, "wrong_to_right": won}
    assert quality.paired_p == pytest.approx(binomtest(min(lost, won), lost + won).pvalue)
    assert sum(value["rows"] for value in quality.per_class.values()) == 200
    for value in quality.metrics.values():
        for kind in ("dense", "pruned"):
            low, high = value[f"{kind}_interval"]
            assert low < value[kind] < high
    assert judge(dense, pruned) == quality, "the same seed gives the same intervals"


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 10**6))
def test_many_draws_are_valued_as_each_alone_is_by_scikit_learn(classes: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["accuracy", "macro_f1", "micro_f1", "mcc", "top3_accuracy"]
    judge = ClassJudge(rng.integers(classes, size=rows), [str(c) for c in range(classes)], names)
    answers, draws = judge.answers(torch.rand(rows, classes)), rng.integers(rows, size=(4, rows))
    for name in names:
        np.testing.assert_allclose(
            judge.values(name, answers, draws), one_by_one(judge, name, answers, draws), atol=1e-12
        )


@given(st.integers(2, 5), st.integers(0, 10**6))
def test_what_is_no_number_is_never_right_and_no_class(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["accuracy", "macro_f1", "micro_f1", "mcc", "top3_accuracy"]
    judge = ClassJudge(rng.integers(classes, size=12), [str(c) for c in range(classes)], names)
    logits = torch.eye(classes)[torch.as_tensor(judge.references)]
    logits[rng.random(12) < 0.5] = float("nan")
    answers, draws = judge.answers(logits), rng.integers(12, size=(4, 12))
    broken = logits.isnan().any(-1).numpy()
    assert judge.value("accuracy", answers) == pytest.approx(1 - broken.mean())
    assert (judge.same(answers, answers) == ~broken).all()
    assert judge.f1(answers, draws).shape == (4, classes)
    for name in names:
        np.testing.assert_allclose(
            judge.values(name, answers, draws), one_by_one(judge, name, answers, draws), atol=1e-12
        )
    nothing = judge.answers(torch.full((12, classes), float("nan")))
    assert [judge.value(name, nothing) for name in names] == [0.0] * 5
    sets = LabelSetJudge(np.eye(classes, dtype=np.int64)[judge.references], judge.labels, ["accuracy", "macro_f1"])
    assert sets.value("accuracy", sets.answers(20 * logits - 10)) == pytest.approx(1 - broken.mean())
    assert sets.value("macro_f1", sets.answers(torch.full((12, classes), float("nan")))) == 0.0


@pytest.mark.parametrize("dense", [noisy(0.2, 1), np.zeros(200, dtype=np.int64)], ids=["good", "collapsed"])
def test_a_model_of_one_class_is_collapsed_and_passes_no_gate(dense: np.ndarray) -> None:
    quality = judge(dense, np.zeros(200, dtype=np.int64))
    assert quality.collapsed
    latency = [{"ratio": 0.5}]
    report = Report(quality, {}, {"dense": 1}, latency, layer_table(tiny_model()), [], {}, gates={"latency_ratio": 0.9})
    assert not report.passed()
    assert not report.verdicts()["latency_ratio"]["passed"]
    assert not judge(dense, noisy(0.3, 3)).collapsed


def test_gates_look_at_the_right_value_in_the_right_direction() -> None:
    quality = judge(noisy(0.2, 1), noisy(0.25, 2))
    exact = {"macro_f1_retention": quality.retention["macro_f1"], "agreement": quality.agreement, "latency_ratio": 0.5}
    for name, value in exact.items():
        harder = value - 1e-6 if name == "latency_ratio" else value + 1e-6
        for threshold, passed in ((value, True), (harder, False)):
            report = Report(quality, {}, {"dense": 1}, [{"ratio": 0.5}], [], [], {}, gates={name: threshold})
            assert report.passed() is passed


def test_the_table_names_skipped_steps_where_there_were_any() -> None:
    quality = judge(noisy(0.2, 1), noisy(0.25, 2))
    for steps, rows in ((0, 0), (3, 1)):
        report = Report(quality, {}, {"dense": 1}, [], [], [], {"skipped_steps": steps})
        assert report.rows().count(("steps skipped for infinite or NaN gradients", "", "3")) == rows
        assert sum("skipped" in what for what, _, _ in report.rows()) == rows
