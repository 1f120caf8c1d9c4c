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
from transformers import PreTrainedModel

from finllm_prune.errors import InputError
from finllm_prune.pruning import STRUCTURES, Cubic, Group, Magnitude, Pruner, Rule, Sensitivity, Site, Slot, Uniform
from finllm_prune.pruning.sensitivity import allocate
from finllm_prune.training import measure_sensitivity
from tests.conftest import loud, tiny_model
from tests.pruning.runs import Batch, make_batches, make_optimizer, make_pruner, train

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


# What a neuron and a head (kv group) are: the parameters of a block, and the axis along which a unit is a slice of them.
PARTS: dict[str, dict[str, dict[str, int]]] = {
    "bert": {
        "neuron": {"intermediate.dense.weight": 0, "intermediate.dense.bias": 0, "output.dense.weight": 1},
        "head": {f"attention.self.{name}.{kind}": 0 for name in ("query", "key", "value") for kind in ("weight", "bias")}
        | {"attention.output.dense.weight": 1},
    },
    "llama": {
        "neuron": {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1},
        "head": {f"self_attn.{name}_proj.weight": 0 for name in "qkv"} | {"self_attn.o_proj.weight": 1},
    },
}  # fmt: skip
TRIED = {"neuron": (0.3, 0.6, 0.9), "head": (0.25, 0.5, 0.75)}


@torch.no_grad()
def without(model: PreTrainedModel, block: str, parts: dict[str, int], units: int, level: float) -> PreTrainedModel:
    """A copy whose smallest units of a block are zeros, so many that they are this part of all."""
    changed = copy.deepcopy(model)
    slices = [changed.get_parameter(f"{block}.{name}").tensor_split(units, axis) for name, axis in parts.items()]
    sizes = [sum(float(piece.double().square().sum()) for piece in unit) for unit in zip(*slices, strict=True)]
    for unit in sorted(range(units), key=sizes.__getitem__)[: round(level * units)]:
        for pieces in slices:
            pieces[unit].zero_()
    return changed


@torch.no_grad()
def losses_of(model: PreTrainedModel, batches: list[Batch]) -> list[float]:
    changed = copy.deepcopy(model).eval()
    return [float(changed(**batch).loss) for batch in batches]


@pytest.mark.parametrize("model_type", PARTS)
@pytest.mark.parametrize("structure", TRIED)
def test_the_dry_pass_of_heads_and_neurons_takes_the_losses_of_models_without_them(structure: str, model_type: str):
    model = loud(tiny_model(model_type, num_attention_heads=8, num_key_value_heads=4)).train()
    units = {"neuron": 64, "head": 8 if model_type == "bert" else 4}[structure]
    root = f"{model.base_model_prefix}.{'encoder.layer' if model_type == 'bert' else 'layers'}"
    batches = [make_batches(1)[0], {key: value[:3] for key, value in make_batches(1, seed=1)[0].items()}]
    dense = losses_of(model, batches)
    curves = [
        [losses_of(without(model, f"{root}.{block}", PARTS[model_type][structure], units, level), batches)
         for level in TRIED[structure]]
        for block in range(2)
    ]  # fmt: skip
    seen: list[float] = []

    def loss(measured: nn.Module, batch: Batch) -> torch.Tensor:
        assert measured is model
        assert not model.training
        seen.append(float(found := model(**batch).loss))
        return found

    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = {"neuron": "mlp", "head": "attention"}[structure]
    budget = Sensitivity(levels=TRIED[structure])
    pruner = make_pruner(model, Rule(target, 0.5, STRUCTURES[structure](), Magnitude(), budget))
    measure_sensitivity(model, pruner.groups, batches, loss)
    assert seen == pytest.approx([*dense, *(value for curve in curves for each in curve for value in each)])
    assert len({round(value, 6) for value in seen}) == len(seen), "each cut was felt"

    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name
    assert model.training
    assert all(group.mask.all() and slot.parked is None for group in pruner.groups for slot in group.slots)
    means = [[(4 * first + 3 * second) / 7 for first, second in curve] for curve in (*curves, [dense])]
    densities = allocate(means[:2], means[2][0], [units] * 2, TRIED[structure], 0.5)
    assert pruner.groups[0].rule.budget.densities == pytest.approx(densities)


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


def test_a_row_counts_as_much_in_a_small_batch_as_in_a_large_one():
    """Three rows feel the first matrix and one row the second, twice as much: so the first one is felt more."""

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        parts = zip(model.children(), model.start, batch["felt"], strict=True)
        return sum(felt * (layer.weight - was).square().sum() for layer, was, felt in parts)

    model, rule = Pair(), sensitive_rule()
    groups = [
        Group(name, rule, [Slot(f"{name}.weight", layer.weight, Site(name))]) for name, layer in model.named_children()
    ]
    batches = [
        {"felt": torch.tensor([1.0, 0.0]), "labels": torch.zeros(3)},
        {"felt": torch.tensor([0.0, 2.0]), "labels": torch.zeros(1)},
    ]
    model.idle.weight.data = model.matters.weight.detach().clone()  # alike but for what is felt of them
    model.start[1] = model.start[0]
    measure_sensitivity(model, groups, batches, loss)
    first, second = groups[0].rule.budget.densities
    assert first > second


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
