"""Calibration and the compression tax, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, f1_score

from finllm_prune.evaluation import compare
from finllm_prune.evaluation.calibration import calibration, calibration_of_sets
from finllm_prune.evaluation.tax import tax
from finllm_prune.judges import ClassJudge
from tests.conftest import LABELS

RANDOM = np.random.default_rng(0)
REFERENCES = RANDOM.integers(0, 3, 400)
LOGITS = torch.tensor(RANDOM.normal(0, 1.5, (400, 3)) + 1.5 * np.eye(3)[REFERENCES], dtype=torch.float32)
JUDGE = ClassJudge(REFERENCES, LABELS, ("accuracy", "macro_f1"))


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_figures_are_those_of_scikit_learn(bins: int) -> None:
    found = calibration(LOGITS, REFERENCES, bins)
    probabilities = LOGITS.double().softmax(-1).numpy()
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == REFERENCES
    accuracy, mean = calibration_curve(right, confidence, n_bins=bins)
    assert [each["accuracy"] for each in found.bins] == pytest.approx(accuracy)
    assert [each["confidence"] for each in found.bins] == pytest.approx(mean)
    rows = np.array([each["rows"] for each in found.bins])
    assert rows.sum() == 400
    assert found.ece == pytest.approx(np.abs(accuracy - mean) @ rows / 400)
    assert found.brier == pytest.approx(brier_score_loss(REFERENCES, probabilities, scale_by_half=False))


def test_each_label_of_a_set_is_a_question_of_its_own() -> None:
    given = (RANDOM.random((400, 3)) < [0.5, 0.1, 0.9]).astype(np.int64)
    logits = torch.tensor(RANDOM.normal(0, 1, (400, 3)) + 2 * given - 1)
    found = calibration_of_sets(logits, given, 10)
    sure = logits.sigmoid().numpy()
    briers = [brier_score_loss(given[:, i], sure[:, i], scale_by_half=False) for i in range(3)]
    assert found.brier == pytest.approx(np.mean(briers))
    gaps = []
    for i in range(3):
        accuracy, mean = calibration_curve(
            (sure[:, i] > 0.5) == given[:, i], np.maximum(sure[:, i], 1 - sure[:, i]), n_bins=10
        )
        rows, _ = np.histogram(np.maximum(sure[:, i], 1 - sure[:, i]), np.linspace(0, 1, 11))
        gaps.append(np.abs(accuracy - mean) @ rows[rows > 0] / 400)
    assert found.ece == pytest.approx(np.mean(gaps))
    assert sum(each["rows"] for each in found.bins) == 1200
    certain = calibration_of_sets(1000.0 * torch.tensor(2 * given - 1), given)
    assert (certain.ece, certain.brier) == (0.0, 0.0)


def test_sure_and_right_is_perfect_sure_and_wrong_is_the_worst() -> None:
    sure = 1000.0 * torch.eye(3)[torch.tensor(REFERENCES)]
    perfect, worst = calibration(sure, REFERENCES), calibration(sure.roll(1, -1), REFERENCES)
    assert (perfect.ece, perfect.brier) == (0.0, 0.0)
    assert (worst.ece, worst.brier) == (1.0, 2.0)
    broken = calibration(torch.full((400, 3), float("nan")), REFERENCES)
    assert (broken.ece, broken.brier) == (1.0, 2.0)


def test_the_class_that_pays_most_comes_first_with_its_interval() -> None:
    pruned = LOGITS.clone()
    pruned[:, 2] -= 1.5  # "positive" is hardly ever answered any more
    answers = JUDGE.answers(LOGITS), JUDGE.answers(pruned)
    quality = compare(JUDGE, LOGITS, pruned, resamples=9)
    rows = tax(quality, JUDGE, *answers, seed=0, resamples=199)
    assert rows[0]["label"] == "positive"
    assert [row["difference"] for row in rows] == sorted(row["difference"] for row in rows)
    scores = [f1_score(REFERENCES, each[:, 0], average=None) for each in answers]
    for row in rows:
        number = LABELS.index(row["label"])
        assert row["difference"] == pytest.approx(scores[1][number] - scores[0][number])
        assert row["interval"][0] < row["difference"] < row["interval"][1]
    assert rows[0]["interval"][1] < 0


def test_differences_have_intervals_over_the_same_rows_of_both() -> None:
    pruned = LOGITS.clone()
    pruned[:5] = pruned[:5].roll(1, -1)
    value = compare(JUDGE, LOGITS, pruned, resamples=99).metrics["accuracy"]
    assert value["difference"] == pytest.approx(value["pruned"] - value["dense"])
    low, high = value["difference_interval"]
    assert low <= value["difference"] <= high
    # Paired: the models differ in five rows, and far less than each alone may by chance.
    assert high - low < 0.4 * (value["dense_interval"][1] - value["dense_interval"][0])
