"""The dry pass: what it measures, how it shares, and that it leaves the model alone."""

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from finllm_prune.errors import InputError
from finllm_prune.pruning import Cubic, Group, Magnitude, Pruner, Rule, Sensitivity, Site, Slot, Uniform
from finllm_prune.pruning.sensitivity import allocate
from finllm_prune.training import measure_sensitivity
from tests.conftest import tiny_model
from tests.pruning.runs import make_batches, make_optimizer, make_pruner, train

LEVELS = (0.25, 0.5, 0.75, 1.0)


@given(
    steps=st.lists(st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4), min_size=2, max_size=3),
    sparsity=st.sampled_from([0.25, 0.5, 0.75]),
)
def test_on_convex_curves_no_other_choice_of_levels_costs_less(steps: list[list[float]], sparsity: float):
    curves = [list(itertools.accumulate(sorted(step))) for step in steps]
    sizes = [100] * len(curves)
    cost = {0.0: [0.0] * len(curves)} | {level: [curve[i] for curve in curves] for i, level in enumerate(LEVELS)}
    densities = allocate(curves, 0.0, sizes, LEVELS, sparsity)
    assert sum(densities) == pytest.approx((1 - sparsity) * len(curves))

    def price(density: float, grid: int) -> float:
        below = int((1 - density) * 4 + 1e-9) / 4
        part = ((1 - density) - below) * 4
        above = min(1.0, below + 0.25)
        return cost[below][grid] * (1 - part) + cost[above][grid] * part

    found = sum(price(density, grid) for grid, density in enumerate(densities))
    for choice in itertools.product(cost, repeat=len(curves)):
        if sum(choice) == pytest.approx(sparsity * len(curves)):
            assert found <= sum(cost[level][grid] for grid, level in enumerate(choice)) + 1e-6


def test_the_grid_that_costs_nothing_is_cut_first():
    assert allocate([[0.0, 0.0], [1.0, 2.0]], 0.0, [10, 10], [0.4, 0.8], 0.4) == pytest.approx([0.2, 1.0])


def test_a_larger_grid_bears_more_of_the_same_loss():
    assert allocate([[1.0, 2.0], [1.0, 2.0]], 0.0, [10, 1000], [0.45, 0.9], 0.8) == pytest.approx([1.0, 0.192])


def sensitive_rule(sparsity: float = 0.5) -> Rule:
    return Rule("encoder", sparsity, criterion=Magnitude(), budget=Sensitivity(levels=(0.3, 0.6, 0.9)))


def test_the_dry_pass_leaves_model_and_masks_as_they_were():
    model = tiny_model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = make_pruner(model, sensitive_rule())
    measure_sensitivity(model, pruner.groups, make_batches(2))
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())
    assert all(group.mask.all() for group in pruner.groups)
    assert model.training


class Pair(nn.Module):
    """The loss is how far two matrices are from where they started, the second weighing a thousandth of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matters, self.idle = nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False)
        self.start = [layer.weight.detach().clone() for layer in (self.matters, self.idle)]

    def forward(self, labels: torch.Tensor) -> SimpleNamespace:
        first, second = (
            (layer.weight - was).square().sum() for layer, was in zip(self.children(), self.start, strict=True)
        )
        return SimpleNamespace(loss=first + 1e-3 * second)


def test_the_matrix_that_the_loss_sees_less_is_cut_more_and_the_run_reaches_its_sparsity():
    model = Pair()
    rule = sensitive_rule()
    groups = [
        Group(name, rule, [Slot(f"{name}.weight", layer.weight, Site(name))]) for name, layer in model.named_children()
    ]
    measure_sensitivity(model, groups, [{"labels": torch.zeros(4)}])
    budget = groups[0].rule.budget
    assert isinstance(budget, Sensitivity)
    assert budget.densities == pytest.approx((0.9, 0.1))
    pruner = Pruner(groups, Cubic())
    for step in range(10):
        model(torch.zeros(4)).loss.backward()
        pruner.before_step((step + 1) / 10)
        pruner.after_step()
    pruner.finish()
    assert [float(group.mask.float().mean()) for group in groups] == pytest.approx([0.9, 0.1])


def test_a_resumed_run_has_the_densities_without_measuring(tmp_path: Path):
    batches, model = make_batches(10), tiny_model(layers=1)
    pruner, optimizer = make_pruner(model, sensitive_rule()), make_optimizer(model)
    measure_sensitivity(model, pruner.groups, make_batches(2))
    train(model, pruner, optimizer, batches, range(5))
    save_file(pruner.state_dict(), tmp_path / "pruner.safetensors")
    other = make_pruner(copy.deepcopy(model), sensitive_rule())
    other.load_state_dict(load_file(tmp_path / "pruner.safetensors"))
    assert other.groups[0].rule == pruner.groups[0].rule
    assert len({id(group.rule) for group in other.groups}) == 1
    for one in (pruner, other):
        one.finish()
        assert one.sparsity() == pytest.approx(0.5, abs=1e-3)
    assert other.mask_hash() == pruner.mask_hash()


def test_a_state_without_the_densities_that_the_rules_need_is_refused():
    model = tiny_model(layers=1)
    state = make_pruner(model, Rule("encoder", 0.5, criterion=Magnitude())).state_dict()
    with pytest.raises(InputError, match=r"belongs to other rules than this run's \(see bert\S+/density\)"):
        make_pruner(model, sensitive_rule()).load_state_dict(state)


def test_rules_with_other_budgets_are_left_alone():
    model = tiny_model()
    mlp = Rule("mlp", 0.5, criterion=Magnitude(), budget=Sensitivity())
    attention = Rule("attention", 0.5, criterion=Magnitude(), budget=Uniform())
    pruner = make_pruner(model, attention, mlp)
    measure_sensitivity(model, pruner.groups, make_batches(1))
    rules = {group.rule.target: group.rule for group in pruner.groups}
    assert rules["attention"] is attention
    assert len(rules["mlp"].budget.densities) == 4


def test_a_sparsity_above_the_levels_is_refused():
    with pytest.raises(InputError, match=r"0\.95 is above the highest level tried by budget sensitivity, 0\.9"):
        sensitive_rule(0.95)


def test_a_run_without_the_dry_pass_is_refused():
    model = tiny_model()
    pruner = make_pruner(model, sensitive_rule())
    with pytest.raises(InputError, match="0 densities for 12 matrices"):
        train(model, pruner, make_optimizer(model), make_batches(6))


@pytest.mark.parametrize("levels", [(), (0.5, 0.5), (0.0, 0.5), (0.5, 1.0), (0.9, 0.5)])
def test_levels_must_ascend_between_0_and_1(levels: tuple[float, ...]):
    with pytest.raises(InputError, match="levels must ascend"):
        Sensitivity(levels=levels)
