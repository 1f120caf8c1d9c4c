"""2:4 on sparse tensor cores, as far as a machine without them can show: what is found, and that the rest is left alone."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from finllm_prune.checkpoints.semi_structured import is_2_4, use_sparse_cores
from finllm_prune.families import find_family
from finllm_prune.pruning import NM, Constant, Magnitude, Pruner, Rule, Structure, Unstructured
from tests.conftest import tiny_model


def pruned(structure: Structure) -> PreTrainedModel:
    model = tiny_model()
    Pruner(find_family("bert").groups(model, [Rule("mlp", 0.5, structure, Magnitude())]), Constant()).finish()
    return model


def test_what_a_2_4_rule_has_cut_is_found() -> None:
    model = pruned(NM())
    found = {path for path, linear in find_family("bert").linears(model).items() if is_2_4(linear.weight)}
    assert len(found) == 2 * 2
    assert all(".attention." not in path for path in found)
    assert not any(is_2_4(linear.weight) for linear in find_family("bert").linears(pruned(Unstructured())).values())


@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=4))
def test_two_of_four_along_the_input_axis(rows: list[list[bool]]) -> None:
    expected = all(sum(row[start : start + 4]) <= 2 for row in rows for start in (0, 4))
    assert is_2_4(torch.tensor(rows).float()) == expected


def test_what_has_no_fours_is_not_2_4() -> None:
    assert not is_2_4(torch.zeros(4, 6))
    assert not is_2_4(torch.zeros(8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
@pytest.mark.parametrize(
    ("structure", "told"),
    [(NM(), "4 of 12 linear layers are 2:4, but cpu has no sparse tensor cores"), (Unstructured(), "No weight is 2:4")],
)
def test_where_it_cannot_be_the_model_stays_as_it_is(
    caplog: pytest.LogCaptureFixture, structure: Structure, told: str
) -> None:
    model = pruned(structure)
    before = {name: (id(parameter), parameter.clone()) for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.WARNING):
        assert use_sparse_cores(model) == []
    assert told in caplog.text
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs sparse tensor cores"
)
def test_on_a_gpu_the_logits_stay() -> None:
    model = tiny_model(hidden=128, intermediate_size=256).to("cuda", torch.bfloat16).eval()
    Pruner(find_family("bert").groups(model, [Rule("encoder", 0.5, NM(), Magnitude())]), Constant()).finish()
    ids = torch.arange(4, 132, device="cuda").view(8, 16)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert len(use_sparse_cores(model)) == 12
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=0.05, rtol=0.05)
