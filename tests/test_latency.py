"""Latency: engines of any kind are called in turn, on the same input, and the warm-up is not counted."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from finllm_prune.evaluation import alternate, measure, on_cpu, token_ids
from tests.conftest import Clock, tiny_model


def test_engines_are_called_in_turn_and_two_rounds_are_not_counted(clock: Clock) -> None:
    inputs, calls = token_ids(300, 2, 5), []

    def engine(name: str, seconds: float) -> Any:
        def call(input_ids: Tensor, attention_mask: Tensor) -> None:
            assert torch.is_inference_mode_enabled()
            assert input_ids is inputs["input_ids"]
            assert attention_mask.all()
            # The first calls are slow, as those of a compiler are.
            clock.sleep(0.1 if calls.count(name) < 2 else seconds)
            calls.append(name)

        return call

    times = alternate({"slow": engine("slow", 0.004), "fast": engine("fast", 0.001)}, inputs, rounds=4)
    assert calls == ["slow", "fast"] * 6
    assert times["slow"] == pytest.approx([4.0] * 4)
    assert times["fast"] == pytest.approx([1.0] * 4), "the first two of six calls are left out"


def test_the_ratio_is_that_of_calls_side_by_side(clock: Clock) -> None:
    rounds: list[float] = []

    def dense(**inputs: Tensor) -> None:
        rounds.append(0.01 * (1 + len(rounds)))
        clock.sleep(rounds[-1])

    def small(**inputs: Tensor) -> None:
        clock.sleep(rounds[-1] / 4)

    latency = measure(dense, small, batch=1, tokens=4, rounds=5, vocabulary=300)
    assert latency.ratio == pytest.approx(0.25)
    assert (latency.dense_ms, latency.small_ms) == pytest.approx((50.0, 12.5)), "the third of rounds 3 to 7"
    assert latency.dense_iqr_ms == pytest.approx([40.0, 60.0])


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (0.35, 4), (3600.0, 7)])
def test_after_the_time_is_up_no_round_begins_but_three_are_counted(seconds: float, rounds: int, clock: Clock) -> None:
    times = alternate({"any": lambda **inputs: clock.sleep(0.1)}, token_ids(300, 1, 4), 7, seconds)
    assert times["any"].shape == (rounds,)


@pytest.mark.parametrize("small", [tiny_model(hidden=16), lambda input_ids, attention_mask: input_ids])
def test_a_model_and_any_other_engine_are_measured_against_the_dense_model(small: Any) -> None:
    dense = tiny_model(layers=4).train()
    latency = measure(dense, small, batch=2, tokens=6, rounds=3)
    assert (latency.batch, latency.tokens, latency.rounds) == (2, 6, 3)
    assert latency.dense_iqr_ms[0] <= latency.dense_ms <= latency.dense_iqr_ms[1]
    assert latency.ratio > 0
    assert dense.training


def test_a_model_is_measured_as_a_copy_in_fp32() -> None:
    model = tiny_model().to(torch.bfloat16).train()
    copied = on_cpu(model)
    assert isinstance(copied, PreTrainedModel)
    assert (copied.dtype, copied.training, model.dtype, model.training) == (torch.float32, False, torch.bfloat16, True)
