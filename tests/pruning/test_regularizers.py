import numpy as np
import pytest
import torch
from torch import nn

from finllm_prune.errors import InputError
from finllm_prune.pruning import (
    L1,
    L2,
    REGULARIZERS,
    STRUCTURES,
    Block,
    Cubic,
    Group,
    GroupLasso,
    Magnitude,
    Neuron,
    Pruner,
    Rule,
    Site,
    Slot,
)
from finllm_prune.pruning.regularizers import Regularizer
from tests.conftest import tiny_model
from tests.pruning.runs import make_batches, make_optimizer, make_pruner, make_structure, train


def group_of(weight: list[list[float]], regularizer: Regularizer) -> Group:
    rule = Rule("encoder", 0.5, Block(1, 2), Magnitude(), regularizer=regularizer)
    return Group("layer", rule, [Slot("layer.weight", nn.Parameter(torch.tensor(weight)), Site("layer"))])


def shrunk(weight: list[list[float]], regularizer: Regularizer, pull: float) -> list[list[float]]:
    group = group_of(weight, regularizer)
    with torch.no_grad():
        regularizer.shrink(group, torch.tensor(pull))
    return group.slots[0].parameter.tolist()


def test_l1_is_soft_thresholding():
    assert shrunk([[1.0, -0.5, 0.1, -0.2]], L1(), 0.2)[0] == pytest.approx([0.8, -0.3, 0.0, 0.0])


def test_l2_scales_every_weight():
    assert shrunk([[1.0, -0.5, 0.1, 0.0]], L2(), 0.25)[0] == pytest.approx([0.8, -0.4, 0.08, 0.0])


def test_group_lasso_is_the_proximal_operator_of_the_units_norms():
    weight, pull = [[3.0, 4.0, 0.1, 0.1]], 0.5
    strong, weak = torch.tensor([3.0, 4.0]), torch.tensor([0.1, 0.1])
    out = torch.tensor(shrunk(weight, GroupLasso(), pull)[0])
    assert out[2:].tolist() == [0.0, 0.0]

    # prox(w) = argmin 0.5 |x - w|^2 + pull * sqrt(size) * |x|: at the minimum no other point is lower.
    def objective(x: torch.Tensor, w: torch.Tensor) -> float:
        return float(0.5 * (x - w).square().sum() + pull * 2**0.5 * x.norm())

    generator = torch.Generator().manual_seed(0)
    for x, w in ((out[:2], strong), (out[2:], weak)):
        for _ in range(100):
            assert objective(x, w) <= objective(x + 0.1 * torch.randn(2, generator=generator), w) + 1e-6


def test_group_lasso_shrinks_all_that_a_neuron_consists_of_by_its_norm():
    """A row, its bias and a column, by the proximal operator of the joint norm."""
    generator = np.random.default_rng(0)
    first, bias, second = (generator.normal(size=size).astype(np.float32) for size in ((3, 4), (3, 1), (2, 3)))
    sites = [Site("mlp.up", 0), Site("mlp.up", 0), Site("mlp.down", 1)]
    slots = [
        Slot(f"{site.path}.{number}", nn.Parameter(torch.tensor(values)), site)
        for number, (values, site) in enumerate(zip((first, bias, second), sites, strict=True))
    ]
    regularizer, pull = GroupLasso(), 0.8
    group = Group("mlp", Rule("mlp", 0.5, Neuron(), Magnitude(), regularizer=regularizer), slots)
    with torch.no_grad():
        regularizer.shrink(group, torch.tensor(pull))
    units = np.concatenate([first, bias, second.T], axis=1)
    norms = np.linalg.norm(units, axis=1, keepdims=True)
    expected = units * np.maximum(0.0, 1.0 - pull * np.sqrt(7) / norms)
    assert (expected == 0).any()
    assert (expected != 0).any()
    found = torch.cat([slots[0].parameter, slots[1].parameter, slots[2].parameter.T], dim=1).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_group_lasso_leaves_a_unit_of_zeros_finite():
    assert shrunk([[0.0, 0.0, 2.0, 2.0]], GroupLasso(), 0.5)[0] == pytest.approx([0.0, 0.0, 1.5, 1.5])
    assert shrunk([[0.0, 0.0, 2.0, 2.0]], GroupLasso(), 0.0)[0] == pytest.approx([0.0, 0.0, 2.0, 2.0])


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_run_with_a_penalty_ends_with_smaller_weights_and_the_same_sparsity(structure: str, name: str):
    norms = []
    for regularizer in (None, REGULARIZERS[name](strength=0.02)):
        cut = make_structure(structure)
        model = tiny_model(layers=2)
        rule = Rule(cut.couples or "encoder", 0.5, cut, Magnitude(), regularizer=regularizer)
        pruner = make_pruner(model, rule)
        train(model, pruner, make_optimizer(model), make_batches(8))
        pruner.finish()
        assert pruner.holds()
        assert pruner.sparsity() == pytest.approx(0.5, abs=0.02)
        norms.append(sum(float(slot.weight.norm()) for group in pruner.groups for slot in group.slots))
    assert norms[1] < norms[0]


def test_the_pull_grows_with_the_schedule_and_adds_up_over_the_run():
    parameter = nn.Parameter(torch.tensor([[7.0, 8.0, 9.0, 10.0]]))
    rule = Rule("encoder", 0.5, criterion=Magnitude(), regularizer=L1(strength=4.0))
    group = Group("layer", rule, [Slot("layer.weight", parameter, Site("layer"))])
    pruner = Pruner([group], Cubic(begin=0.25, end=0.5, freeze=0.999))
    values = []
    for step in range(100):
        parameter.grad = torch.zeros_like(parameter)
        pruner.before_step((step + 1) / 100)
        pruner.after_step()
        values.append(float(parameter.detach().max()))
    assert values[20] == 10.0, "before begin nothing pulls"
    assert values[60] - values[61] == pytest.approx(4.0 / 100, rel=1e-3), "the whole strength after end"
    assert values[30] - values[31] < 4.0 / 100


def test_a_skipped_step_pulls_nothing():
    parameter = nn.Parameter(torch.full((1, 4), 10.0))
    rule = Rule("encoder", 0.5, criterion=Magnitude(), regularizer=L1(strength=4.0))
    pruner = Pruner([Group("layer", rule, [Slot("layer.weight", parameter, Site("layer"))])], Cubic(begin=0.0))
    parameter.grad = torch.full_like(parameter, torch.nan)
    pruner.before_step(0.05)
    pruner.after_step()
    assert parameter.tolist() == [[10.0] * 4]


def test_a_strength_that_is_no_positive_number_is_refused():
    with pytest.raises(InputError, match="strength must be above 0"):
        L1(strength=0.0)
