"""A model without what has no effect computes the same, on each family and with other widths in each block."""

import pytest
import torch

from finllm_prune.families import alive, find_family, shrink, without_effect
from finllm_prune.pruning import Constant, Global, Head, Neuron, Pruner, Random, Rule
from tests.conftest import FAMILIES, logits, loud, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_computes_the_same(family: str) -> None:
    model = loud(tiny_model(family, layers=3))
    rules = [Rule("mlp", 0.75, Neuron(), Random(), Global()), Rule("attention", 0.5, Head(), Random(), Global())]
    Pruner(find_family(family).groups(model, rules), Constant()).finish()
    small = shrink(model, without_effect(model))
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=0)
    linears = find_family(family).linears(small)
    assert all(linear.weight.shape == (linear.out_features, linear.in_features) for linear in linears.values())
    assert all(linear.weight.any(1).all() for linear in linears.values())
    assert without_effect(small) == {}
    if len(find_family(family).layers(model)) > 1:
        assert len({int(alive(small, find_family(family), "mlp", block).sum()) for block in range(3)}) > 1


def test_one_unit_stays_where_none_has_an_effect() -> None:
    model = loud(tiny_model())
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.zero_()
        model.bert.encoder.layer[0].attention.output.dense.weight.zero_()
    small = shrink(model, without_effect(model))
    assert small.bert.encoder.layer[1].intermediate.dense.weight.shape == (1, 32)
    assert small.bert.encoder.layer[0].attention.self.query.weight.shape == (8, 32)
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=0)


def test_a_cut_takes_a_moment_as_it_takes_its_parameter() -> None:
    model = loud(tiny_model("modernbert"))
    with torch.no_grad():
        model.model.layers[1].attn.Wo.weight[:, 8:16] = 0
    cut = without_effect(model)["model.layers.1.attn.Wqkv.weight"]
    weight = model.model.layers[1].attn.Wqkv.weight.detach()
    kept = [row for part in range(3) for row in range(32 * part, 32 * (part + 1)) if not 8 <= row % 32 < 16]
    assert torch.equal(cut.take(weight.square()), weight[kept].square())
