import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.pruning import BUDGETS, Budget, Global, Rule, Uniform
from finllm_prune.pruning.budgets import kth_largest, select
from tests.pruning.runs import SHARES

MANY = 140_000  # above 131072 values the bracket search runs; below, one selection does it all


def normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator)


def heavy_tailed(n: int, generator: torch.Generator) -> Tensor:
    return torch.exp(8.0 * torch.randn(n, generator=generator))


def integers(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-3, 4, (n,), generator=generator).float()


def constant(n: int, generator: torch.Generator) -> Tensor:
    return torch.full((n,), 0.25)


def mostly_zero(n: int, generator: torch.Generator) -> Tensor:
    return torch.relu(torch.randn(n, generator=generator) - 2.0)


def with_an_outlier(n: int, generator: torch.Generator) -> Tensor:
    values = 1e-3 * torch.randn(n, generator=generator)
    values[n // 2] = 1e30
    return values


def with_a_misleading_sample(n: int, generator: torch.Generator) -> Tensor:
    """Every 64th value, which is what the search looks at first, is far above all others."""
    values = torch.randn(n, generator=generator)
    values[::64] += 100.0
    return values


def all_huge(n: int, generator: torch.Generator) -> Tensor:
    return 1e10 + 1024.0 * torch.randint(0, 9, (n,), generator=generator)


DISTRIBUTIONS: list[Callable[[int, torch.Generator], Tensor]] = [
    normal, heavy_tailed, integers, constant, mostly_zero, with_an_outlier, with_a_misleading_sample, all_huge,
]  # fmt: skip


def draw(distribution: Callable[[int, torch.Generator], Tensor], n: int, seed: int = 0) -> Tensor:
    return distribution(n, torch.Generator().manual_seed(seed))


def number_kept(masks: list[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("n", [1, 2, 1000, MANY])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_kth_largest_is_that_of_a_full_sort(distribution: Callable[[int, torch.Generator], Tensor], n: int):
    scores = draw(distribution, n)
    order = scores.sort(descending=True).values
    for k in sorted({1, min(2, n), max(1, n // 10), max(1, n // 2), max(1, n - 7), n}):
        assert kth_largest([scores], k) == order[k - 1], f"k = {k}"


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32), part=st.floats(0.0, 1.0),
    mixture=st.lists(st.tuples(st.sampled_from(DISTRIBUTIONS), st.floats(-50, 50)), min_size=2, max_size=4),
)  # fmt: skip
def test_kth_largest_over_several_tensors_is_that_of_their_union(seed: int, part: float, mixture: list):
    scores = [draw(distribution, MANY // 2 + i, seed + i) + shift for i, (distribution, shift) in enumerate(mixture)]
    union = torch.cat(scores)
    k = max(1, round(part * union.numel()))
    assert kth_largest(scores, k) == union.sort(descending=True).values[k - 1]


def test_kth_largest_takes_tensors_of_any_shape():
    scores = draw(normal, 60)
    parts = [scores[:6], scores[6:30].view(4, 6), scores[30:].view(5, 3, 2)]
    assert kth_largest(parts, 17) == scores.sort(descending=True).values[16]


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=4), st.data())
def test_select_keeps_exactly_k_and_ties_go_to_the_lower_index(grids: list[list[int]], data: st.DataObject):
    scores = [torch.tensor(grid, dtype=torch.float32) for grid in grids]
    values = [value for grid in grids for value in grid]
    k = data.draw(st.integers(1, len(values)))
    best_first = sorted(range(len(values)), key=lambda i: (-values[i], i))
    kept = torch.cat(select(scores, k)).nonzero().flatten().tolist()
    assert kept == sorted(best_first[:k])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_select_among_many_keeps_exactly_k_and_those_are_the_highest(
    distribution: Callable[[int, torch.Generator], Tensor],
):
    scores = [draw(distribution, MANY // 2, seed).view(2, -1) for seed in (0, 1)]
    for k in (1, MANY // 10, MANY - 1):
        masks = select(scores, k)
        assert [mask.shape for mask in masks] == [score.shape for score in scores]
        assert number_kept(masks) == k
        lowest_kept = min(score[mask].min() for score, mask in zip(scores, masks, strict=True) if mask.any())
        highest_cut = max(score[~mask].max() for score, mask in zip(scores, masks, strict=True) if not mask.all())
        assert lowest_kept >= highest_cut


grids_of_scores = st.lists(
    st.lists(st.integers(-4, 4), min_size=1, max_size=12).map(lambda grid: torch.tensor(grid, dtype=torch.float32)),
    min_size=1, max_size=4,
)  # fmt: skip
densities = st.floats(0.001, 1.0)


@pytest.mark.parametrize("name", SHARES)
@given(scores=grids_of_scores, density=densities)
def test_a_budget_keeps_a_unit_of_each_grid_and_does_not_touch_the_scores(
    name: str, scores: list[Tensor], density: float
):
    before = [score.clone() for score in scores]
    masks = BUDGETS[name]().share(scores, density)
    assert all(torch.equal(score, old) for score, old in zip(scores, before, strict=True))
    for score, mask in zip(scores, masks, strict=True):
        assert mask.shape == score.shape
        assert mask.dtype == torch.bool
        assert mask.any()
        assert mask[score.argmax()], "the best unit of a grid is cut"


@pytest.mark.parametrize("name", SHARES)
@given(scores=grids_of_scores, density=densities)
def test_a_budget_is_within_a_unit_of_the_density_in_each_grid_or_overall(
    name: str, scores: list[Tensor], density: float
):
    masks = BUDGETS[name]().share(scores, density)
    total = sum(score.numel() for score in scores)
    due = max(density * total, len(scores))
    assert abs(number_kept(masks) - due) <= len(scores), "more than one unit a grid away"
    if name == "global":
        assert abs(number_kept(masks) - due) <= 1
    if name == "uniform":
        for score, mask in zip(scores, masks, strict=True):
            assert abs(int(mask.sum()) - max(1.0, density * score.numel())) <= 1


@pytest.mark.parametrize("name", SHARES)
def test_a_budget_decides_the_same_way_twice(name: str):
    scores = [draw(integers, 500, seed).view(20, 25) for seed in range(3)]
    one, two = BUDGETS[name]().share(scores, 0.3), BUDGETS[name]().share([s.clone() for s in scores], 0.3)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@given(scores=grids_of_scores, density=densities)
def test_global_cuts_no_unit_that_beats_a_kept_one_unless_that_is_the_best_of_its_grid(
    scores: list[Tensor], density: float
):
    masks = Global().share(scores, density)
    kept, cut = [], []
    for score, mask in zip(scores, masks, strict=True):
        others = mask.clone()
        others[score.argmax()] = False
        kept += score[others].tolist()
        cut += score[~mask].tolist()
    assert min(kept, default=9) >= max(cut, default=-9)


@pytest.mark.parametrize("shift", [1e2, 1e6, 1e12])
@pytest.mark.parametrize("budget", [Uniform(), Global()])
def test_a_grid_whose_scores_are_all_far_below_keeps_its_best_unit(budget: Budget, shift: float):
    strong, weak, weakest = draw(normal, 900).view(30, 30), draw(normal, 90, 1) - shift, draw(normal, 10, 2) - 2 * shift
    masks = budget.share([strong, weak, weakest], 0.2)
    assert number_kept(masks) == 200
    for score, mask in zip((strong, weak, weakest), masks, strict=True):
        assert mask.flatten()[score.argmax()]
    if isinstance(budget, Global):
        assert [int(mask.sum()) for mask in masks] == [198, 1, 1]


def test_global_at_a_tiny_density_keeps_one_unit_of_each_grid():
    masks = Global().share([draw(normal, 100, seed) + seed for seed in range(5)], 0.001)
    assert [int(mask.sum()) for mask in masks] == [1] * 5


def test_uniform_gives_each_grid_the_same_density_where_global_follows_the_scores():
    scores = [torch.arange(100.0), torch.arange(100.0) + 60.0]
    assert [int(mask.sum()) for mask in Uniform().share(scores, 0.5)] == [50, 50]
    assert [int(mask.sum()) for mask in Global().share(scores, 0.5)] == [20, 80]


@given(scores=grids_of_scores, density=densities, floor=st.floats(0.0, 0.5), ceiling=st.floats(0.6, 1.0))
def test_global_keeps_every_grid_between_its_floor_and_its_ceiling(
    scores: list[Tensor], density: float, floor: float, ceiling: float
):
    masks = Global(floor, ceiling).share(scores, density)
    total = sum(score.numel() for score in scores)
    least = [max(1, math.ceil(floor * score.numel())) for score in scores]
    most = [max(low, math.floor(ceiling * score.numel())) for low, score in zip(least, scores, strict=True)]
    kept = [int(mask.sum()) for mask in masks]
    assert sum(kept) == max(sum(least), round(density * total)), "the density is met first"
    assert all(k >= low for k, low in zip(kept, least, strict=True))
    if sum(kept) <= sum(most):
        assert all(k <= high for k, high in zip(kept, most, strict=True))
    for score, mask in zip(scores, masks, strict=True):
        assert min(score[mask].tolist()) >= max(score[~mask].tolist(), default=-9.0), "within a grid the best stay"


def test_floor_and_ceiling_hold_where_one_grid_would_take_all():
    scores = [torch.arange(100.0) + 1000.0, torch.arange(100.0)]
    assert [int(mask.sum()) for mask in Global().share(scores, 0.5)] == [99, 1]
    assert [int(mask.sum()) for mask in Global(floor=0.2).share(scores, 0.5)] == [80, 20]
    assert [int(mask.sum()) for mask in Global(ceiling=0.7).share(scores, 0.5)] == [70, 30]


@given(scores=grids_of_scores, density=densities, multiple=st.integers(1, 5))
def test_uniform_snaps_the_kept_width_to_the_nearest_multiple(scores: list[Tensor], density: float, multiple: int):
    for score, mask in zip(scores, Uniform(multiple).share(scores, density), strict=True):
        kept, due = int(mask.sum()), density * score.numel()
        assert kept == score.numel() or kept % multiple == 0
        assert kept >= min(multiple, score.numel())
        if multiple <= due <= score.numel() - multiple:
            assert abs(kept - due) <= multiple / 2 + 0.5


@pytest.mark.parametrize("floor_and_ceiling", [(-0.1, 1.0), (0.5, 0.5), (0.2, 1.1)])
def test_a_floor_and_a_ceiling_that_exclude_each_other_are_refused(floor_and_ceiling: tuple[float, float]):
    with pytest.raises(InputError, match="0 <= floor < ceiling <= 1"):
        Global(*floor_and_ceiling)


def test_a_multiple_below_1_is_refused():
    with pytest.raises(InputError, match="multiple must be at least 1"):
        Uniform(multiple=0)


@pytest.mark.parametrize(("floor", "sparsity"), [(0.1, 0.9), (0.3, 0.7), (0.05, 0.95)])
def test_a_floor_of_all_that_stays_is_no_rounding_error_too_much(floor: float, sparsity: float):
    rule = Rule("encoder", sparsity, budget=Global(floor=floor))
    scores = [torch.arange(100.0), 1000.0 + torch.arange(100.0)]
    masks = rule.budget.share(scores, 1.0 - sparsity)
    assert [int(mask.sum()) for mask in masks] == [round(100 * floor)] * 2


def test_a_floor_and_a_ceiling_that_are_whole_units_are_these():
    scores = [torch.arange(100.0), 1000.0 + torch.arange(100.0)]
    assert [int(mask.sum()) for mask in Global(floor=0.07).share(scores, 0.2)] == [7, 33]
    assert [int(mask.sum()) for mask in Global(ceiling=0.29).share(scores, 0.2)] == [11, 29]
