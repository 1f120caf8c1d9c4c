import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finllm_prune.errors import InputError
from finllm_prune.pruning import (
    CRITERIA,
    Block,
    Criterion,
    Cubic,
    Global,
    Group,
    Magnitude,
    Movement,
    Neuron,
    Random,
    Rule,
    Site,
    Slot,
    SoftMovement,
    Structure,
    Unstructured,
)
from finllm_prune.pruning.criteria import Step
from tests.conftest import tiny_model
from tests.pruning.runs import make_batches, make_optimizer, make_pruner, train


def make_group(criterion: Criterion, rows: int = 3, columns: int = 4, name: str = "layer") -> Group:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(rows, columns, generator=generator))
    weight.grad = torch.randn(rows, columns, generator=generator)
    return Group(name, Rule("encoder", 0.5, Unstructured(), criterion), [Slot(f"{name}.weight", weight, Site(name))])


def step(before: float = 0.0, now: float = 0.1, skip: float = 0.0) -> Step:
    return Step(before, now, torch.tensor(skip))


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_finite_fp32_in_the_shape_of_the_grid(name: str):
    criterion = CRITERIA[name]()
    group = make_group(criterion)
    state = criterion.start(group)
    criterion.observe(group, state, step())
    score = criterion.score(group, state)
    assert score.shape == group.mask.shape
    assert score.dtype == torch.float32
    assert score.isfinite().all()


@pytest.mark.parametrize("name", CRITERIA)
def test_observing_and_scoring_leave_weight_and_gradient_alone(name: str):
    criterion = CRITERIA[name]()
    group = make_group(criterion)
    parameter = group.slots[0].parameter
    weight, gradient = parameter.detach().clone(), parameter.grad.clone()
    state = criterion.start(group)
    criterion.observe(group, state, step())
    criterion.score(group, state)
    assert torch.equal(parameter.detach(), weight)
    assert torch.equal(parameter.grad, gradient)


def test_magnitude_is_the_norm_of_a_unit_over_its_row_its_bias_and_its_column():
    up, bias, down = (
        nn.Parameter(torch.tensor(value)) for value in ([[3.0, 0.0], [1.0, 1.0]], [4.0, 1.0], [[12.0, 1.0]])
    )
    slots = [Slot("up", up, Site("up", 0)), Slot("bias", bias, Site("up", 0)), Slot("down", down, Site("down", 1))]
    group = Group("mlp", Rule("mlp", 0.5, Neuron(), Magnitude()), slots)
    assert Magnitude().score(group, {}).tolist() == [13.0, 2.0]


def random_scores(seed: int, name: str) -> Tensor:
    criterion = Random(seed=seed)
    group = make_group(criterion, name=name)
    return criterion.score(group, criterion.start(group))


def test_random_is_a_function_of_its_seed_and_the_group_alone():
    first = random_scores(0, "layer.0")
    torch.manual_seed(12345)
    assert torch.equal(first, random_scores(0, "layer.0"))
    assert not torch.equal(first, random_scores(1, "layer.0"))
    assert not torch.equal(first, random_scores(0, "layer.1"))


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    random_scores(0, "layer.0")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("criterion", [Movement(travel=2.0, initial=0.3), SoftMovement(travel=2.0, initial=0.3)])
def test_movement_starts_in_the_order_of_magnitude(criterion: Movement):
    group = make_group(criterion)
    scores = criterion.start(group)["scores"]
    weight = group.slots[0].weight
    assert torch.equal(scores.flatten().argsort(), weight.abs().flatten().argsort())
    assert scores.flatten().sort().values.tolist() == pytest.approx([0.3 * 2.0 * i / 12 for i in range(12)])


def test_movement_keeps_what_moves_away_from_zero():
    criterion = Movement(initial=0.0, sensitivity=0.0)
    group = make_group(criterion, 1, 4)
    slot = group.slots[0]
    slot.parameter.data = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    slot.parameter.grad = torch.tensor([[-1.0, 1.0, 1.0, -1.0]])  # descent grows the first two and shrinks the others
    state = criterion.start(group)
    criterion.observe(group, state, step())
    assert criterion.score(group, state).sign().tolist() == [[1.0, 1.0, -1.0, -1.0]]


def test_of_two_weights_that_move_alike_movement_keeps_the_one_that_the_loss_feels():
    criterion = Movement(initial=0.0)
    group = make_group(criterion, 1, 2)
    slot = group.slots[0]
    slot.parameter.data, slot.parameter.grad = torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, -0.01]])
    state = criterion.start(group)
    for i in range(5):
        criterion.observe(group, state, step(i / 10, (i + 1) / 10))
    assert state["scores"][0, 0] == pytest.approx(float(state["scores"][0, 1]), rel=1e-4)
    feels, hardly = criterion.score(group, state)[0]
    assert float(feels - hardly) == pytest.approx(math.log(100.0), rel=1e-3)


@pytest.mark.parametrize("steps", [10, 1000])
def test_movement_travels_the_same_way_in_a_short_and_a_long_run(steps: int):
    criterion = Movement(travel=3.0, initial=0.0)
    group = make_group(criterion)
    state = criterion.start(group)
    for i in range(steps):
        criterion.observe(group, state, step(i / steps, (i + 1) / steps))
    # A steady gradient moves Adam by its learning rate; that decays linearly, so half of the travel is covered.
    assert state["scores"].abs().flatten().tolist() == pytest.approx([1.5] * 12, rel=0.12)


@pytest.mark.parametrize(("excess", "sign"), [(0.2, -1.0), (-0.2, 1.0)])
def test_scores_fall_while_the_rule_is_too_dense_and_rise_while_it_is_too_sparse(excess: float, sign: float):
    criterion = SoftMovement(initial=0.0, gain=60.0)
    group = make_group(criterion)
    state = criterion.start(group)
    criterion.observe(group, state, step(0.0, 0.1, skip=1.0))
    criterion.steer([state], excess)
    before = state["scores"].clone()
    criterion.observe(group, state, step(0.1, 0.2))
    assert ((state["scores"] - before).sign() == sign).all()


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize(
    ("target", "structure"), [("encoder", Unstructured()), ("mlp", Neuron()), ("encoder", Block(8, 8))]
)
def test_soft_movement_follows_its_schedule_without_the_help_of_the_budget(
    target: str, structure: Structure, sparsity: float
):
    model = tiny_model(layers=1)
    rule = Rule(target, sparsity, structure, SoftMovement(), Global())
    pruner = make_pruner(model, rule, schedule=Cubic(0.05, 0.5, 0.9))
    train(model, pruner, make_optimizer(model), make_batches(120), range(107))
    assert not pruner.frozen
    assert pruner.sparsity() == pytest.approx(sparsity, abs=0.05)


def test_the_cutoff_of_soft_movement_is_where_the_sigmoid_is_the_threshold():
    criterion = SoftMovement(threshold=0.2)
    assert criterion.cutoff(0.0) == -math.inf
    assert [float(torch.sigmoid(torch.tensor(criterion.cutoff(part)))) for part in (0.25, 0.5, 1.0)] == pytest.approx(
        [0.05, 0.1, 0.2]
    )


@pytest.mark.parametrize("name", ["movement", "magnitude", "random"])
def test_the_other_criteria_leave_the_cut_to_the_budget(name: str):
    assert CRITERIA[name]().cutoff(0.5) is None


@pytest.mark.parametrize(
    ("criterion", "knobs", "message"),
    [
        (Movement, {"travel": 0.0}, "travel must be above 0"),
        (Movement, {"initial": -0.1}, "initial at least 0"),
        (Movement, {"sensitivity": -1.0}, "sensitivity must not be negative"),
        (SoftMovement, {"travel": -1.0}, "travel must be above 0"),
        (SoftMovement, {"threshold": 0.0}, "threshold must lie between 0 and 1"),
        (SoftMovement, {"threshold": 1.0}, "threshold must lie between 0 and 1"),
        (SoftMovement, {"gain": -1.0}, "gain must not be negative"),
    ],
)
def test_a_knob_out_of_range_is_refused(criterion: type[Criterion], knobs: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        criterion(**knobs)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 90.0, float("nan")])
def test_a_rule_whose_sparsity_is_no_fraction_is_refused(sparsity: float):
    with pytest.raises(InputError, match="sparsity must lie between 0 and 1"):
        Rule("encoder", sparsity)
