"""Non-inferiority: how often a worse model passes, how often an equal one does, and what it is in the limit."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from finllm_prune.errors import InputError
from finllm_prune.evaluation.non_inferiority import NonInferiority, Outcome, holm, not_worse, refuse_wide
from finllm_prune.tasks.reranking import Reranking
from finllm_prune.tasks.scores import Scores
from finllm_prune.tasks.sentiment import Sentiment

POINT = NonInferiority(margin=0.01)


def flipped(units: int, lost: int, won: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of two models that are right or wrong."""
    dense, pruned = np.ones(units), np.ones(units)
    pruned[:lost], dense[lost : lost + won] = 0, 0
    return dense, pruned


def passing(units: int, worse: float, won: float, asked: NonInferiority) -> float:
    """How often a model passes that wins a part of the units and loses that part and ``worse``: exact, over all samples."""
    lost, rate = worse + won, 0.0
    for losses in range(int(stats.binom.isf(1e-6, units, lost)) + 1):
        for wins in range(int(stats.binom.isf(1e-6, units, won)) + 1 if won else 1):
            if not_worse(*flipped(units, losses, wins), asked).p < asked.alpha:
                chance = stats.binom.pmf(wins, units - losses, won / (1 - lost))
                rate += stats.binom.pmf(losses, units, lost) * chance
    return float(rate)


@pytest.mark.parametrize(("units", "margin"), [(50, 0.01), (300, 0.01), (700, 0.01), (200, 0.05)])
def test_right_or_wrong_a_model_that_is_worse_by_the_margin_passes_at_most_as_often_as_asked(
    units: int, margin: float
) -> None:
    asked = NonInferiority(margin)
    for won in (0.0, 0.005, 0.01):
        assert passing(units, margin, won, asked) <= 0.05


def test_graded_a_model_that_is_worse_by_the_margin_passes_at_most_as_often_as_asked() -> None:
    random, passed = np.random.default_rng(0), []
    for _ in range(600):  # nine queries of ten are as before, as with nDCG
        dense = random.beta(1, 2, 150)
        loss = np.where(random.random(150) < 0.1, random.normal(0.3, 0.2, 150), 0.0)
        passed.append(not_worse(dense, dense - loss, NonInferiority(margin=0.03)).p < 0.05)
    assert np.mean(passed) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 600)


def test_an_equal_model_passes_in_four_of_five_samples_of_the_units_needed() -> None:
    dense, pruned = flipped(1000, 20, 20)
    units = not_worse(dense, pruned, POINT).units_needed
    lost, won = np.random.default_rng(0).binomial(units, 0.02, (2, 300))
    passed = [not_worse(*flipped(units, a, b), POINT).p < 0.05 for a, b in zip(lost, won, strict=True)]
    assert 0.7 < np.mean(passed) < 0.9


def test_of_many_units_it_is_the_shifted_t_test() -> None:
    random = np.random.default_rng(0)
    dense = random.random(20_000)
    pruned = dense + random.normal(-0.008, 0.2, 20_000)
    found = not_worse(dense, pruned, POINT)
    plain = stats.ttest_1samp(pruned - dense, -0.01, alternative="greater")
    assert found.p == pytest.approx(plain.pvalue, abs=0.01)
    ends = stats.ttest_1samp(pruned - dense, 0).confidence_interval(0.9)
    assert found.interval == pytest.approx([ends.low, ends.high], abs=1e-4)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 0), (12, 9), (60, 10)])
def test_the_interval_says_what_the_test_says(lost: int, won: int) -> None:
    for units in (100, 500, 3000):
        found = not_worse(*flipped(units, lost, won), POINT)
        assert (found.interval[0] > -0.01) == (found.p < 0.05)
        assert found.interval[0] < found.difference < found.interval[1]


def test_few_units_prove_nothing_even_when_no_answer_flipped() -> None:
    assert not_worse(*flipped(50, 0, 0), POINT).verdict(0.3, 0.05) == "not shown"
    assert not_worse(*flipped(100, 0, 0), POINT).p > 0.05
    assert not_worse(*flipped(1, 0, 0), POINT).p > 0.05
    assert not_worse(*flipped(1000, 0, 0), POINT).p < 0.05


def test_worse_is_said_where_the_whole_interval_lies_beyond_the_margin() -> None:
    def verdict(found: Outcome) -> str:
        return found.verdict(found.p, 0.05)

    assert verdict(not_worse(*flipped(500, 60, 5), POINT)) == "worse"
    assert verdict(not_worse(*flipped(500, 15, 5), POINT)) == "not shown"
    assert verdict(not_worse(*flipped(5000, 15, 5), POINT)) == "not worse"


def test_holm_is_that_of_statsmodels() -> None:
    random = np.random.default_rng(0)
    for p in ([0.01, 0.04, 0.03], [0.05, 0.05, 0.001, 1.0], list(random.random(20) ** 4)):
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([]) == []


@pytest.mark.parametrize(("key", "value"), [("margin", 0.0), ("margin", float("inf")), ("alpha", 0.0), ("alpha", 0.7)])
def test_nonsense_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"non_inferiority\.{key}: "):
        NonInferiority(**{key: value})


def test_errors_are_judged_alike_in_any_unit() -> None:
    random = np.random.default_rng(0)
    dense = -(random.normal(0, 0.3, 400) ** 2)
    pruned = dense + random.normal(0, 0.1, 400)
    found = [not_worse(k * dense, k * pruned, NonInferiority(0.02 * k), bounded=False) for k in (1, 0.01, 2500)]
    shifted = stats.ttest_1samp(pruned - dense + 0.02, 0, alternative="greater").pvalue
    assert [each.p for each in found] == pytest.approx([shifted] * 3)
    assert found[0].units_needed == found[1].units_needed == found[2].units_needed < 500
    same = not_worse(dense, dense, NonInferiority(0.005), bounded=False)
    assert (same.p < 1e-9, same.units_needed) == (True, 1)


def test_only_squared_errors_may_have_a_margin_above_one() -> None:
    refuse_wide(50, Sentiment(scores=Scores()), "sets.0.margin")
    for task in (Sentiment(), Reranking()):
        with pytest.raises(InputError, match=r"^sets\.0\.margin: it lies between 0 and 1"):
            refuse_wide(1, task, "sets.0.margin")
