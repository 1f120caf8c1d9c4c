"""The joint choice of widths: within its limit, nearly all of it spent, and worth as much as equal widths at least."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.pruning import Constant, Costs, Cubic, Head, Magnitude, Movement, Neuron, Pruner, Rule, Taylor
from finllm_prune.pruning.targets import equal_widths, spread
from tests.conftest import tiny_model
from tests.test_families import find_family

NEAR = 1e-9


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], float]:
    """Up to three groups of up to five units, with costs that rise in uneven steps, some of them free."""
    worth, tables = [], []
    for _ in range(draw(st.integers(1, 3))):
        units = draw(st.integers(2, 5))
        worth.append(torch.tensor(draw(st.lists(st.integers(0, 9), min_size=units, max_size=units))).float())
        steps = draw(st.lists(st.integers(0, 6), min_size=units, max_size=units))
        tables.append(torch.tensor([0, *itertools.accumulate(steps)], dtype=torch.float64))
    lowest, whole = (sum(float(table[k]) for table in tables) for k in (1, -1))
    return worth, tables, lowest + draw(st.floats(0, 1)) * (whole - lowest)


def paid(tables: list[Tensor], kept: tuple[int, ...]) -> float:
    return sum(float(table[k]) for table, k in zip(tables, kept, strict=True))


def gained(worth: list[Tensor], kept: tuple[int, ...]) -> float:
    return sum(float(grid.sort(descending=True).values[:k].sum()) for grid, k in zip(worth, kept, strict=True))


@given(problems())
def test_the_choice_against_all_choices(problem: tuple[list[Tensor], list[Tensor], float]) -> None:
    worth, tables, limit = problem
    masks = spread(worth, tables, limit)
    kept = tuple(int(mask.sum()) for mask in masks)
    assert min(kept) >= 1
    assert paid(tables, kept) <= limit + NEAR
    for group, table in enumerate(tables):
        if kept[group] < len(table) - 1:
            more = tuple(k + (number == group) for number, k in enumerate(kept))
            assert paid(tables, more) > limit - NEAR, "one more unit would have been affordable"
    own = sum(float(grid[mask].sum()) for grid, mask in zip(worth, masks, strict=True))
    assert own == pytest.approx(gained(worth, kept)), "the best units of each group stay"
    assert own >= gained(worth, tuple(equal_widths(tables, limit))) - NEAR
    widths = itertools.product(*(range(1, len(table)) for table in tables))
    best = max(gained(worth, kept) for kept in widths if paid(tables, kept) <= limit + NEAR)
    # What a greedy choice can lose is less than what one piece of a hull brings; here pieces are whole groups at most.
    assert own >= best - max(float(grid.sum() - grid.max()) for grid in worth) - NEAR


@given(problems())
def test_where_costs_are_proportional_the_choice_loses_less_than_one_unit(problem) -> None:
    worth, _, _ = problem
    tables = [torch.arange(grid.numel() + 1, dtype=torch.float64) for grid in worth]
    limit = float(sum(grid.numel() for grid in worth) // 2 + 1)
    kept = tuple(int(mask.sum()) for mask in spread(worth, tables, max(limit, len(worth))))
    widths = itertools.product(*(range(1, len(table)) for table in tables))
    assert gained(worth, kept) == max(
        gained(worth, kept) for kept in widths if paid(tables, kept) <= max(limit, len(worth))
    )


def costs(limit: float) -> Costs:
    tables = {}
    for block in range(2):
        tables[f"bert.encoder.layer.{block}.mlp"] = torch.arange(65, dtype=torch.float64) / 256
        tables[f"bert.encoder.layer.{block}.attention"] = torch.arange(5, dtype=torch.float64) / 32
    return Costs(tables, 0.25, limit)


RULES = [Rule("mlp", None, Neuron(), Taylor()), Rule("attention", None, Head(), Taylor())]


def pruned(limit: float) -> Pruner:
    model = tiny_model()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.mul_(0.3)
    pruner = Pruner(find_family("bert").groups(model, RULES), Cubic(), costs=costs(limit))
    model.train()
    ids = torch.randint(5, 300, (4, 8), generator=torch.Generator().manual_seed(1))
    for step in range(20):
        model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        pruner.before_step((step + 1) / 20)
        pruner.after_step()
        model.zero_grad()
    return pruner


def test_the_cost_follows_the_schedule_down_to_the_limit() -> None:
    pruner = pruned(0.5)
    assert pruner.frozen
    found = costs(0.5).total({group.name: int(group.mask.sum()) for group in pruner.groups})
    assert 0.5 - 1 / 256 < found <= 0.5
    assert costs(0.5).start == pytest.approx(1.0)
    assert costs(0.5).due(0.5) == pytest.approx(0.75)
    first, second = (int(group.mask.sum()) for group in pruner.groups if group.name.endswith("mlp"))
    assert first > 2 * second, "the loss feels the neurons of the second block less"
    assert pruner.mask_hash() == pruned(0.5).mask_hash()


def test_a_resumed_run_goes_on_with_the_costs_it_began_with() -> None:
    began, other = pruned(0.5), pruned(0.7)
    other.load_state_dict(began.state_dict())
    assert other.costs is not None
    assert other.costs.limit == 0.5
    assert torch.equal(other.costs.tables["bert.encoder.layer.0.mlp"], costs(0.5).tables["bert.encoder.layer.0.mlp"])


def test_rules_without_a_sparsity_need_costs() -> None:
    with pytest.raises(InputError, match="give each rule a sparsity, or the Pruner the costs"):
        Pruner(find_family("bert").groups(tiny_model(), RULES), Constant())


@pytest.mark.parametrize("criterion", [Magnitude(), Movement(sensitivity=0.0)])
def test_scores_that_do_not_add_up_are_refused(criterion) -> None:
    with pytest.raises(InputError, match="tell an order only; set criterion to taylor"):
        Rule("mlp", None, Neuron(), criterion)


def test_the_worth_of_movement_keeps_the_order_of_its_scores() -> None:
    scores = torch.tensor([-30.0, -2.0, 0.5, 1.0])
    worth = Movement(sensitivity=0.5).worth(scores)
    assert worth is not None
    assert worth.min() > 0
    assert torch.equal(worth.argsort(), torch.arange(4))
    assert worth[3] / worth[2] == pytest.approx(torch.tensor(1.0).exp())
