import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from finllm_prune.errors import InputError
from finllm_prune.families import find_family
from finllm_prune.pruning import (
    CRITERIA,
    L1,
    NM,
    SCHEDULES,
    STRUCTURES,
    Block,
    Budget,
    Cubic,
    Global,
    Group,
    Head,
    Layer,
    Magnitude,
    Neuron,
    Pruner,
    Rule,
    ScoreMovement,
    Sensitivity,
    Site,
    Slot,
    Structure,
    Uniform,
    Unstructured,
    refuse_unreachable,
)
from tests.conftest import tiny_model
from tests.pruning.runs import PAIRS, SHARES, fits, make_batches, make_optimizer, make_pruner, make_rule, train


def trained(*rules: Rule, steps: int = 6, layers: int = 1) -> tuple[PreTrainedModel, Pruner]:
    """A model after a whole short run, with its pruner."""
    model = tiny_model(layers=layers)
    pruner = make_pruner(model, *rules)
    train(model, pruner, make_optimizer(model), make_batches(steps))
    pruner.finish()
    return model, pruner


def expand(group: Group, slot: Slot) -> Tensor:
    """True where a weight of the slot is cut, in the shape of its parameter."""
    return group.rule.structure.expand(~group.mask, slot.weight, slot.site).view_as(slot.parameter)


@pytest.mark.parametrize("budget", SHARES)
@pytest.mark.parametrize(("criterion", "structure"), PAIRS)
def test_the_final_sparsity_is_the_one_asked_for_and_cut_weights_are_exact_zeros(
    criterion: str, structure: str, budget: str
):
    _, pruner = trained(make_rule(structure, criterion, budget, sparsity=0.6), layers=2)
    kept = [int(group.mask.sum()) for group in pruner.groups]
    units = [group.mask.numel() for group in pruner.groups]
    if budget == "uniform":
        assert all(abs(k - 0.4 * n) <= 1 for k, n in zip(kept, units, strict=True))
    assert abs(sum(kept) - 0.4 * sum(units)) <= (1 if budget == "global" else len(units))
    for group in pruner.groups:
        for slot in group.slots:
            cut = expand(group, slot)
            assert (slot.parameter[cut] == 0).all()
            # The others have all been moved off their first values, biases too, so a zero here would be a wrong cut;
            # a bias that its criterion freezes stays at the zeros of a fresh model.
            if group.rule.criterion.trains_weights or slot.parameter.ndim == 2:
                assert (slot.parameter[~cut] != 0).all(), slot.name


@pytest.mark.parametrize("budget", SHARES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_two_of_every_four_weights_stay_under_every_criterion_and_budget(criterion: str, budget: str):
    _, pruner = trained(make_rule("n:m", criterion, budget, sparsity=0.5), layers=2)
    assert pruner.sparsity() == 0.5
    for group in pruner.groups:
        assert (group.mask.view(-1, 4).sum(1) == 2).all()
        assert torch.equal(group.slots[0].parameter != 0, group.mask)


@pytest.mark.parametrize(
    ("structure", "biases"), [("neuron", 1), ("head", 3), ("unstructured", 0), ("n:m", 0), ("block", 0)]
)
def test_biases_go_with_the_rows_that_are_cut_whole_and_with_no_others(structure: str, biases: int):
    model, pruner = trained(make_rule(structure), layers=1)
    names = [slot.name for group in pruner.groups for slot in group.slots if slot.parameter.ndim == 1]
    assert len(names) == biases
    parameters = dict(model.named_parameters())
    for name in names:
        assert (parameters[name] == 0).float().mean() == 0.5
    others = [p for name, p in parameters.items() if name.endswith("dense.bias") and name not in names]
    assert all((bias != 0).all() for bias in others)


@pytest.mark.parametrize("budget", SHARES)
@pytest.mark.parametrize(("criterion", "structure"), PAIRS)
def test_at_least_one_unit_of_each_group_is_kept(criterion: str, structure: str, budget: str):
    _, pruner = trained(make_rule(structure, criterion, budget, sparsity=0.999), steps=4, layers=2)
    assert all(group.mask.any() for group in pruner.groups)
    assert pruner.sparsity() >= (0.5 if structure == "layer" else 0.74)  # 1 of 2 layers, 3 of 4 heads


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_sparsity_on_the_way_is_the_one_that_the_schedule_says(schedule: str):
    model = tiny_model(layers=1)
    pruner = make_pruner(model, make_rule(criterion="magnitude", sparsity=0.8), schedule=SCHEDULES[schedule]())
    optimizer, batches = make_optimizer(model), make_batches(12)
    for step in range(12):
        train(model, pruner, optimizer, batches, [step])
        progress = (step + 1) / 12
        assert pruner.sparsity() == pytest.approx(0.8 * pruner.schedule.fraction(progress), abs=1e-3)
        assert pruner.frozen == (progress >= pruner.schedule.freeze)
    assert pruner.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_two_rules_are_carried_out_side_by_side():
    _, pruner = trained(make_rule("head", "movement", "uniform", 0.5), make_rule("neuron", "magnitude", "global", 0.75))
    density = {group.name.rpartition(".")[2]: float(group.mask.float().mean()) for group in pruner.groups}
    assert density == {"attention": 0.5, "mlp": 0.25}


def test_masks_are_fixed_from_freeze_on_while_kept_weights_still_learn():
    model, batches = tiny_model(layers=1), make_batches(20)
    pruner, optimizer = make_pruner(model, make_rule()), make_optimizer(model)
    train(model, pruner, optimizer, batches, range(18))
    assert pruner.frozen
    masks, weight = pruner.mask_hash(), pruner.groups[0].slots[0].parameter.detach().clone()
    train(model, pruner, optimizer, batches, range(18, 20))
    assert pruner.mask_hash() == masks
    assert not torch.equal(pruner.groups[0].slots[0].parameter, weight)


def test_a_cut_weight_comes_back_with_the_value_that_it_would_have_had():
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    site = Site("layer")
    rule = Rule("encoder", 0.5, Unstructured(), Magnitude())
    pruner = Pruner([Group("layer", rule, [Slot("layer.weight", linear.weight, site)])], Cubic(0.0, 0.1, 1.0, 64))
    linear.weight.grad = torch.zeros(1, 4)

    def step(progress: float, change: list[float]) -> list[float]:
        pruner.before_step(progress)
        linear.weight.data += torch.tensor([change])  # an optimizer's momentum, say
        pruner.after_step()
        return linear.weight.detach().flatten().tolist()

    assert step(0.25, [0.0, 0.0, 0.0, 0.0]) == [4.0, 3.0, 0.0, 0.0]
    assert step(0.50, [0.0, -2.0, 0.5, 0.5]) == [4.0, 0.0, 2.5, 0.0]
    assert step(0.75, [0.0, 0.0, 0.0, 8.0]) == [4.0, 0.0, 0.0, 9.5]
    assert step(1.00, [0.0, 4.0, 0.0, 0.0]) == [0.0, 5.0, 0.0, 9.5]
    assert step(1.25, [1.0, 1.0, 1.0, 1.0]) == [0.0, 6.0, 0.0, 10.5]
    pruner.finish()
    assert linear.weight.flatten().tolist() == [0.0, 6.0, 0.0, 10.5]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_group_whose_units_have_all_come_back_is_whole_for_good(structure: str):
    model = tiny_model(layers=2)
    whole = [parameter.detach().clone() for parameter in model.parameters()]
    group = make_pruner(model, make_rule(structure)).groups[0]
    some = torch.zeros_like(group.mask)
    some.flatten()[0] = True
    for mask in (some, torch.ones_like(some), torch.ones_like(some)):
        with torch.no_grad():
            group.unpark()
            group.set_mask(mask)
            group.park()
        same = all(torch.equal(one, other) for one, other in zip(whole, model.parameters(), strict=True))
        assert same == bool(mask.all())


def test_gradients_of_cut_weights_are_cleared_before_the_optimizer_steps():
    model = tiny_model(layers=1)
    pruner, optimizer, batches = make_pruner(model, make_rule("block")), make_optimizer(model), make_batches(10)
    train(model, pruner, optimizer, batches, range(5))
    model(**batches[5]).loss.backward()
    slots = [(slot, expand(group, slot)) for group in pruner.groups for slot in group.slots]
    assert all(slot.parameter.grad[cut].any() for slot, cut in slots)
    pruner.before_step(0.6)
    for slot, cut in slots:
        assert not slot.parameter.grad[cut].any()
        assert slot.parameter.grad[~cut].any()


def uninterrupted_and_resumed(rule: Rule, stop: int, path: Path) -> list[tuple[PreTrainedModel, Pruner]]:
    """The same run of 10 steps twice, the second one stopped after ``stop`` steps and resumed in new objects."""
    batches = make_batches(10)
    model = tiny_model(layers=1)
    pruner, optimizer = make_pruner(model, rule), make_optimizer(model)
    train(model, pruner, optimizer, batches, range(stop))

    save_file(pruner.state_dict(), path)
    resumed = tiny_model(layers=1, seed=1)
    resumed.load_state_dict(model.state_dict())
    resumed_pruner, resumed_optimizer = make_pruner(resumed, rule), make_optimizer(resumed)
    resumed_pruner.load_state_dict(load_file(path))
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share its moments otherwise

    train(model, pruner, optimizer, batches, range(stop, 10))
    train(resumed, resumed_pruner, resumed_optimizer, batches, range(stop, 10))
    return [(model, pruner), (resumed, resumed_pruner)]


@pytest.mark.parametrize("stop", [1, 5, 9])
@pytest.mark.parametrize(("criterion", "structure"), [pair for pair in PAIRS if pair[1] in ("unstructured", "neuron")])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    criterion: str, structure: str, stop: int, tmp_path: Path
):
    (model, pruner), (resumed, resumed_pruner) = uninterrupted_and_resumed(
        make_rule(structure, criterion), stop, tmp_path / "pruner.safetensors"
    )
    for (name, one), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert pruner.mask_hash() == resumed_pruner.mask_hash()
    assert pruner.progress == resumed_pruner.progress == 1.0
    assert pruner.frozen
    assert resumed_pruner.frozen


@pytest.mark.parametrize("steps", [0, 1, 5, 10])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_state_survives_safetensors(criterion: str, steps: int, tmp_path: Path):
    model = tiny_model(layers=1)
    pruner = make_pruner(model, make_rule("neuron" if fits(criterion, "neuron") else "unstructured", criterion))
    train(model, pruner, make_optimizer(model), make_batches(10), range(steps))
    state = pruner.state_dict()
    assert any(key.endswith("/parked") for key in state) == (steps == 5)
    save_file(state, tmp_path / "pruner.safetensors")
    loaded = load_file(tmp_path / "pruner.safetensors")
    other = make_pruner(tiny_model(layers=1), pruner.groups[0].rule)
    other.load_state_dict(loaded)
    for restored in (loaded, other.state_dict()):
        assert restored.keys() == state.keys()
        for key, tensor in state.items():
            assert restored[key].dtype == tensor.dtype
            assert torch.equal(restored[key].nan_to_num(-1.0), tensor.nan_to_num(-1.0)), key


def test_a_state_is_a_copy_that_later_steps_do_not_change():
    model, batches = tiny_model(layers=1), make_batches(10)
    rule = make_rule(criterion="soft_movement")
    pruner, optimizer = make_pruner(model, rule), make_optimizer(model)
    train(model, pruner, optimizer, batches, range(5))
    state = pruner.state_dict()
    first = {key: tensor.clone() for key, tensor in state.items()}
    pruner.load_state_dict(state)
    train(model, pruner, optimizer, batches, range(5, 8))
    for key, tensor in state.items():
        assert torch.equal(tensor, first[key]), key


def test_a_state_of_other_rules_is_refused():
    neurons = make_pruner(tiny_model(layers=1), make_rule("neuron"))
    heads = make_pruner(tiny_model(layers=1), make_rule("head"))
    both = make_pruner(tiny_model(layers=1), make_rule("neuron"), make_rule("head"))
    with pytest.raises(InputError, match=r"belongs to other rules.*see bert\.encoder\.layer\.0\.attention"):
        heads.load_state_dict(neurons.state_dict())
    with pytest.raises(InputError, match="belongs to other rules"):
        neurons.load_state_dict(both.state_dict())


@pytest.mark.parametrize("rules", [("unstructured", "neuron"), ("head", "unstructured"), ("neuron", "neuron")])
def test_rules_that_cut_the_same_weight_are_refused_by_its_name(rules: tuple[str, str]):
    with pytest.raises(InputError, match=r"bert\.encoder\.layer\.0\.\S+\.weight is cut by two rules"):
        make_pruner(tiny_model(layers=1), *(make_rule(structure) for structure in rules))


def test_rules_that_match_nothing_are_refused():
    with pytest.raises(InputError, match="match nothing in this model"):
        make_pruner(tiny_model(layers=1))


def test_an_unknown_target_is_refused_by_name():
    with pytest.raises(InputError, match="target 'embeddings' matches no linear layer; use attention, mlp or encoder"):
        make_pruner(tiny_model(layers=1), Rule("embeddings", 0.5))


@pytest.mark.parametrize(
    ("structure", "target", "right"),
    [("neuron", "attention", "mlp"), ("neuron", "encoder", "mlp"), ("head", "mlp", "attention"),
     ("head", "encoder", "attention")],
)  # fmt: skip
def test_a_structure_that_does_not_exist_in_the_target_is_refused_by_name(structure: str, target: str, right: str):
    rule = Rule(target, 0.5, STRUCTURES[structure]())
    with pytest.raises(InputError, match=f"structure {structure} exists in target {right} only, not in {target}"):
        make_pruner(tiny_model(layers=1), rule)


def test_a_block_that_does_not_fit_is_refused_with_the_layer_named():
    with pytest.raises(InputError, match=r"5 x 5 does not divide the 32 x 32 weight of bert\.encoder\.layer\.0\."):
        make_pruner(tiny_model(layers=1), Rule("encoder", 0.5, Block(5, 5)))


def test_matrices_without_a_common_grid_are_no_group():
    up, down = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(4, 6))
    slots = [Slot("up", up, Site("up", 0)), Slot("down", down, Site("down", 1))]
    with pytest.raises(InputError, match=r"block.3.mlp: its matrices do not share one unit grid"):
        Group("block.3.mlp", Rule("mlp", 0.5, Neuron()), slots)


@pytest.mark.parametrize("criterion", ["movement", "soft_movement"])
def test_a_target_without_gradient_is_refused_by_name_under_movement(criterion: str):
    model = tiny_model(layers=1)
    model.bert.requires_grad_(False)
    pruner = make_pruner(model, make_rule(criterion=criterion))
    model(**make_batches(1)[0]).loss.backward()
    with pytest.raises(InputError, match=r"bert\.encoder\.layer\.0\.attention\S+weight has no gradient.*requires_grad"):
        pruner.before_step(0.1)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_a_target_without_gradient_is_cut_by_a_criterion_that_needs_none(criterion: str):
    model = tiny_model(layers=1)
    model.bert.requires_grad_(False)
    pruner = make_pruner(model, make_rule(criterion=criterion))
    train(model, pruner, make_optimizer(model), make_batches(5))
    assert pruner.sparsity() == 0.5


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("steps", [1, 5])
def test_finish_before_freeze_makes_the_last_cut(criterion: str, steps: int):
    model = tiny_model(layers=1)
    structure = "neuron" if fits(criterion, "neuron") else "unstructured"
    pruner = make_pruner(model, make_rule(structure, criterion, sparsity=0.75))
    train(model, pruner, make_optimizer(model), make_batches(10), range(steps))
    before = pruner.sparsity()
    pruner.finish()
    assert before != 0.75
    assert before < 0.75 or criterion == "l0", "its masks on the way are samples"
    assert pruner.sparsity() == 0.75
    assert pruner.frozen
    assert all(slot.parked is None for group in pruner.groups for slot in group.slots)
    for group in pruner.groups:
        for slot in group.slots:
            if (
                group.rule.criterion.trains_weights or slot.parameter.ndim == 2
            ):  # a fresh bias is zero until it is trained
                assert torch.equal(slot.parameter == 0, expand(group, slot))


def test_finish_lets_a_better_weight_back_from_the_parked_ones():
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[2.0, 1.0]])
    rule = Rule("encoder", 0.5, Unstructured(), Magnitude())
    # One update from begin to freeze, so the mask of the first step stays while the weights change places.
    pruner = Pruner(
        [Group("layer", rule, [Slot("layer.weight", linear.weight, Site("layer"))])], Cubic(0.0, 0.1, 1.0, 2)
    )
    for progress, change in [(0.5, [0.0, 0.0]), (0.6, [0.0, 4.0])]:
        pruner.before_step(progress)
        linear.weight.data += torch.tensor([change])
        pruner.after_step()
        assert linear.weight.tolist() == [[2.0, 0.0]]
    pruner.finish()
    assert linear.weight.tolist() == [[0.0, 5.0]]


def test_finish_twice_is_finish_once():
    model, pruner = trained(make_rule("head"))
    masks, weights = pruner.mask_hash(), [parameter.detach().clone() for parameter in model.parameters()]
    pruner.finish()
    assert pruner.mask_hash() == masks
    assert all(torch.equal(one, other) for one, other in zip(weights, model.parameters(), strict=True))


def test_the_mask_hash_changes_with_the_masks_and_only_with_them():
    model, batches = tiny_model(layers=1), make_batches(10)
    pruner, optimizer = make_pruner(model, make_rule("neuron", "magnitude")), make_optimizer(model)
    hashes, masks = [], []
    for step in range(10):
        train(model, pruner, optimizer, batches, [step])
        hashes.append(pruner.mask_hash())
        masks.append(pruner.masks()["bert.encoder.layer.0.mlp"].tolist())
    assert len(set(hashes)) > 4
    for i in range(10):
        for j in range(10):
            assert (hashes[i] == hashes[j]) == (masks[i] == masks[j])


def test_masks_are_named_after_the_groups_and_have_the_shapes_of_their_grids():
    pruner = make_pruner(tiny_model(layers=2), make_rule("head"), make_rule("neuron"))
    assert {name: tuple(mask.shape) for name, mask in pruner.masks().items()} == {
        "bert.encoder.layer.0.attention": (4,), "bert.encoder.layer.1.attention": (4,),
        "bert.encoder.layer.0.mlp": (64,), "bert.encoder.layer.1.mlp": (64,),
    }  # fmt: skip


def test_a_state_of_another_criterion_or_structure_is_refused():
    saved = make_pruner(tiny_model(layers=1), make_rule("unstructured", "movement")).state_dict()
    with pytest.raises(InputError, match="state/excess"):
        make_pruner(tiny_model(layers=1), make_rule("unstructured", "soft_movement")).load_state_dict(saved)
    with pytest.raises(InputError, match=r"see bert\.encoder\.layer\.0\.attention\.output\.dense/mask"):
        make_pruner(tiny_model(layers=1), make_rule("block", "movement")).load_state_dict(saved)


def test_a_state_saved_after_an_early_finish_loads_as_final():
    model = tiny_model(layers=1)
    pruner = make_pruner(model, make_rule("neuron"))
    batches = make_batches(10)
    train(model, pruner, make_optimizer(model), batches, range(3))
    pruner.finish()
    other = make_pruner(model, make_rule("neuron"))
    other.load_state_dict(pruner.state_dict())
    assert other.frozen
    other.finish()
    assert other.mask_hash() == pruner.mask_hash()


def test_holds_sees_a_weight_that_came_back():
    model = tiny_model(layers=1)
    pruner = make_pruner(model, make_rule("neuron", "random"))
    pruner.finish()
    assert pruner.holds()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias += 1.0
    assert not pruner.holds()


def test_a_step_that_the_scaler_skips_reaches_no_score():
    """An infinite gradient elsewhere: clipping makes the targets' gradients zeros, which look harmless."""
    model = tiny_model(layers=1)
    pruner = make_pruner(model, make_rule("unstructured"))
    batches = make_batches(10)
    train(model, pruner, make_optimizer(model), batches, range(2))
    before = pruner.state_dict()
    model(**batches[2]).loss.backward()
    pruner.before_step(0.3, skip=torch.tensor(1.0))
    pruner.after_step()
    after = pruner.state_dict()
    assert int(after["skipped"]) == 1
    for key in before:
        if "/state/" in key:
            assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"structure": NM(), "budget": Uniform(multiple=8)}, "n:m leaves n of every m"),
        ({"structure": NM(), "budget": Global(floor=0.1)}, "n:m leaves n of every m"),
        ({"criterion": ScoreMovement(), "regularizer": L1()}, "score_movement freezes them"),
        ({"budget": Global(floor=0.6)}, r"floor of 0\.6 leaves no way to sparsity 0\.5; set floor to at most 0\.5"),
        (
            {"budget": Global(ceiling=0.4)},
            r"ceiling of 0\.4 keeps less than sparsity 0\.5 does; set ceiling to at least 0\.5",
        ),
        ({"budget": Sensitivity(levels=(0.2, 0.4))}, "above the highest level tried"),
    ],
)
def test_parts_of_a_rule_that_undo_each_other_are_refused(parts: dict, message: str):
    with pytest.raises(InputError, match=message):
        Rule("encoder", 0.5, **parts)


@pytest.mark.parametrize(
    ("target", "structure", "budget", "sparsity", "message"),
    [
        ("attention", Head(), Uniform(), 0.9, r"0\.9 of the 4 units would leave none in bert.*layer\.0.*at most 0\.75"),
        ("attention", Head(), Uniform(), 0.1, r"0\.1 of the 4 units would cut none in bert.*layer\.0.*at least 0\.25"),
        (
            "attention",
            Head(),
            Uniform(multiple=8),
            0.5,
            "in multiples of 8 would leave none.*lower the budget's multiple",
        ),
        ("mlp", Neuron(), Uniform(multiple=16), 0.1, "in multiples of 16 would cut none.*lower the budget's multiple"),
        (
            "attention",
            Head(),
            Global(),
            0.9,
            r"8 units would leave none in each of bert.*and 1 more; set at most 0\.75",
        ),
        ("encoder", Layer(), Uniform(), 0.9, r"2 units would leave none.*at most 0\.5"),
    ],
)
def test_a_sparsity_that_would_empty_a_layer_or_cut_nothing_is_refused(
    target: str, structure: Structure, budget: Budget, sparsity: float, message: str
):
    groups = find_family("bert").groups(tiny_model(layers=2), [Rule(target, sparsity, structure, Magnitude(), budget)])
    with pytest.raises(InputError, match=message):
        refuse_unreachable(groups)
    refuse_unreachable(
        find_family("bert").groups(tiny_model(layers=2), [Rule(target, 0.5, structure, Magnitude(), Global())])
    )


@pytest.mark.parametrize("structure", ["unstructured", "neuron"])
def test_rewind_takes_the_kept_weights_back_to_where_the_cut_began_and_survives_a_resume(structure: str):
    model, batches = tiny_model(layers=1), make_batches(20)
    schedule = Cubic(0.2, 0.5, 0.6, rewind=True)
    pruner, optimizer = (
        make_pruner(model, make_rule(structure, "magnitude"), schedule=schedule),
        make_optimizer(model),
    )
    train(model, pruner, optimizer, batches, range(4))
    began = {slot.name: slot.parameter.detach().clone() for group in pruner.groups for slot in group.slots}
    train(model, pruner, optimizer, batches, range(4, 8))
    state = {key: value.clone() for key, value in pruner.state_dict().items()}
    pruner.load_state_dict(state)
    train(model, pruner, optimizer, batches, range(8, 12))
    assert pruner.frozen
    for group in pruner.groups:
        for slot in group.slots:
            kept = ~expand(group, slot)
            assert torch.equal(slot.parameter.detach(), began[slot.name] * kept)


def test_rewind_without_training_after_it_is_refused():
    with pytest.raises(InputError, match="rewind needs training after freeze"):
        Cubic(freeze=1.0, rewind=True)


def test_a_run_that_stops_early_is_not_rewound():
    model = tiny_model(layers=1)
    schedule = Cubic(0.2, 0.5, 0.9, rewind=True)
    pruner = make_pruner(model, make_rule("unstructured", "magnitude"), schedule=schedule)
    train(model, pruner, make_optimizer(model), make_batches(20), range(10))
    before = {slot.name: slot.parameter.detach().clone() for group in pruner.groups for slot in group.slots}
    pruner.finish()
    for group in pruner.groups:
        for slot in group.slots:
            kept = slot.parameter.detach() != 0
            was = before[slot.name] != 0
            assert torch.equal(slot.parameter.detach()[kept & was], before[slot.name][kept & was])


def test_weights_of_another_step_get_no_parked_values_when_a_run_ends():
    model, batches = tiny_model(layers=1), make_batches(20)
    pruner, optimizer = make_pruner(model, make_rule("unstructured", "movement")), make_optimizer(model)
    train(model, pruner, optimizer, batches, range(5))
    best = {slot.name: slot.parameter.detach().clone() for group in pruner.groups for slot in group.slots}
    train(model, pruner, optimizer, batches, range(5, 9))
    with torch.no_grad():
        for group in pruner.groups:
            for slot in group.slots:
                slot.parameter.copy_(best[slot.name])
    pruner.finish(replaced=True)
    for group in pruner.groups:
        for slot in group.slots:
            assert torch.equal(slot.parameter.detach(), best[slot.name] * group.mask)
