"""Latency: engines of any kind are called in turn, on the same input, and the warm-up is not counted."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from finllm_prune.evaluation import alternate, measure, on_cpu, token_ids
from tests.conftest import tiny_model


def test_engines_are_called_in_turn_and_two_rounds_are_not_counted() -> None:
    inputs, calls = token_ids(300, 2, 5), []

    def engine(name: str, seconds: float) -> Any:
        def call(input_ids: Tensor, attention_mask: Tensor) -> None:
            assert torch.is_inference_mode_enabled()
            assert input_ids is inputs["input_ids"]
            assert attention_mask.all()
            # The first calls are slow, as those of a compiler are.
            time.sleep(0.1 if calls.count(name) < 2 else seconds)
            calls.append(name)

        return call

    times = alternate({"slow": engine("slow", 0.004), "fast": engine("fast", 0.0)}, inputs, rounds=4)
    assert calls == ["slow", "fast"] * 6
    assert {name: series.shape for name, series in times.items()} == {"slow": (4,), "fast": (4,)}
    assert times["slow"].min() > 4 > times["fast"].min()
    assert np.median(times["fast"]) < 50, "the first two of six calls are left out"


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (3600.0, 7)])
def test_after_the_time_is_up_no_round_begins_but_three_are_counted(seconds: float, rounds: int) -> None:
    times = alternate({"any": lambda **inputs: None}, token_ids(300, 1, 4), 7, seconds)
    assert times["any"].shape == (rounds,)


@pytest.mark.parametrize("small", [tiny_model(hidden=16), lambda input_ids, attention_mask: input_ids])
def test_a_model_and_any_other_engine_are_measured_against_the_dense_model(small: Any) -> None:
    dense = tiny_model(layers=4).train()
    latency = measure(dense, small, batch=2, tokens=6, rounds=3)
    assert (latency.batch, latency.tokens, latency.rounds) == (2, 6, 3)
    assert latency.dense_iqr_ms[0] <= latency.dense_ms <= latency.dense_iqr_ms[1]
    assert 0 < latency.ratio < 1.5
    assert dense.training


def test_a_model_is_measured_as_a_copy_in_fp32() -> None:
    model = tiny_model().to(torch.bfloat16).train()
    copied = on_cpu(model)
    assert isinstance(copied, PreTrainedModel)
    assert (copied.dtype, copied.training, model.dtype, model.training) == (torch.float32, False, torch.bfloat16, True)
