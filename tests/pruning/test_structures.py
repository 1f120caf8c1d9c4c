from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finllm_prune.errors import InputError
from finllm_prune.pruning import BUDGETS, NM, STRUCTURES, Block, Head, Layer, Neuron, Rule, Site, Structure
from tests.pruning.runs import make_structure


@st.composite
def weights_that_fit(draw: st.DrawFn, structure: str, axis: int, fused: int) -> tuple[Structure, Site, tuple[int, int]]:
    rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    cut = make_structure(structure)
    if structure == "block":
        cut = Block(rows, cols)
    if structure == "n:m" and rows * cols > 1:
        cut = NM(draw(st.integers(1, rows * cols - 1)), rows * cols)
    heads, blocks = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    along = fused * heads * rows * cols * draw(st.integers(1, 2))
    across = rows * cols * draw(st.integers(1, 3))
    if structure == "n:m" and rows * cols == 1:
        along, across = 4 * along, 4 * across
    site = Site("layer", axis, fused, heads, draw(st.integers(0, blocks - 1)), blocks)
    return cut, site, (along, across) if axis == 0 else (across, along)


def integers(shape: torch.Size | tuple[int, ...], seed: int) -> torch.Tensor:
    """Small whole numbers in float64: sums of them are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).double()


every_structure_and_site = pytest.mark.parametrize(
    ("structure", "axis", "fused"),
    [(name, axis, fused) for name in STRUCTURES for axis in (0, 1) for fused in (1, 2, 3)],
)


@every_structure_and_site
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_reduce_is_the_adjoint_of_expand(structure: str, axis: int, fused: int, data: st.DataObject, seed: int):
    cut, site, shape = data.draw(weights_that_fit(structure, axis, fused))
    x = integers(shape, seed)
    y = integers(cut.units(x, site), seed + 1)
    assert (cut.reduce(x, site) * y).sum() == (x * cut.expand(y, x, site)).sum()


@every_structure_and_site
@given(data=st.data())
def test_shapes_are_those_of_the_weight_and_of_its_units(structure: str, axis: int, fused: int, data: st.DataObject):
    cut, site, shape = data.draw(weights_that_fit(structure, axis, fused))
    weight = torch.zeros(shape)
    units = cut.units(weight, site)
    assert cut.expand(torch.zeros(units), weight, site).shape == weight.shape
    assert cut.reduce(weight, site).shape == units


@every_structure_and_site
@given(data=st.data())
def test_units_share_the_weight_out_evenly_and_leave_nothing_over(
    structure: str, axis: int, fused: int, data: st.DataObject
):
    cut, site, shape = data.draw(weights_that_fit(structure, axis, fused))
    weight = torch.zeros(shape)
    units = cut.units(weight, site)
    # Whole layers are units of all blocks together, so there the weights of all blocks are shared out.
    sites = [replace(site, index=i) for i in range(site.blocks)] if structure == "layer" else [site]
    numbers = [cut.expand(torch.arange(units.numel()).view(units), weight, place).flatten() for place in sites]
    counts = torch.bincount(torch.cat(numbers), minlength=units.numel())
    assert counts.tolist() == [len(sites) * weight.numel() // units.numel()] * units.numel()


@every_structure_and_site
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_expand_spreads_a_boolean_mask_as_it_spreads_numbers(
    structure: str, axis: int, fused: int, data: st.DataObject, seed: int
):
    cut, site, shape = data.draw(weights_that_fit(structure, axis, fused))
    weight = torch.zeros(shape)
    mask = integers(cut.units(weight, site), seed) > 0
    spread = cut.expand(mask, weight, site)
    assert spread.dtype == torch.bool
    assert torch.equal(spread.double(), cut.expand(mask.double(), weight, site))


def test_unstructured_units_are_the_weights():
    weight = torch.arange(6.0).view(2, 3)
    cut, site = make_structure("unstructured"), Site("layer")
    assert torch.equal(cut.expand(weight, weight, site), weight)
    assert torch.equal(cut.reduce(weight, site), weight)


def test_block_units_are_tiles():
    spread = Block(2, 3).expand(torch.tensor([[1, 2], [3, 4]]), torch.zeros(4, 6), Site("layer"))
    assert spread.tolist() == [[1, 1, 1, 2, 2, 2]] * 2 + [[3, 3, 3, 4, 4, 4]] * 2


def test_a_neuron_is_a_row_of_the_up_projection_and_its_bias_and_a_column_of_the_down_projection():
    units = torch.tensor([1, 2, 3])
    assert Neuron().expand(units, torch.zeros(3, 2), Site("up", 0)).tolist() == [[1, 1], [2, 2], [3, 3]]
    assert Neuron().expand(units, torch.zeros(3, 1), Site("up", 0)).tolist() == [[1], [2], [3]]
    assert Neuron().expand(units, torch.zeros(2, 3), Site("down", 1)).tolist() == [[1, 2, 3], [1, 2, 3]]


def test_a_neuron_of_a_fused_gate_and_up_projection_has_a_row_in_each():
    spread = Neuron().expand(torch.tensor([1, 2, 3]), torch.zeros(6, 1), Site("gate_up", 0, fused=2))
    assert spread.flatten().tolist() == [1, 2, 3, 1, 2, 3]


def test_a_head_of_a_fused_qkv_is_a_slice_of_each_of_the_three():
    spread = Head().expand(torch.tensor([1, 2]), torch.zeros(12, 1), Site("qkv", 0, fused=3, heads=2))
    assert spread.flatten().tolist() == [1, 1, 2, 2] * 3


def test_a_head_is_a_slice_of_the_columns_of_the_output_projection():
    spread = Head().expand(torch.tensor([1, 2]), torch.zeros(1, 6), Site("output", 1, heads=2))
    assert spread.flatten().tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("cut", "site", "shape", "message"),
    [
        (
            Block(32, 32),
            Site("some.layer"),
            (48, 64),
            "block: 32 x 32 does not divide the 48 x 64 weight of some.layer",
        ),
        (
            Block(32, 32),
            Site("some.layer"),
            (64, 48),
            "block: 32 x 32 does not divide the 64 x 48 weight of some.layer",
        ),
        (Head(), Site("some.layer", 0, heads=3), (8, 6), "head: some.layer has 8 entries along its axis 0"),
        (Head(), Site("some.layer", 1, heads=4), (8, 6), "head: some.layer has 6 entries along its axis 1"),
        (Head(), Site("some.layer", 0, fused=3, heads=4), (16, 6), "head: some.layer has 16 entries"),
        (Head(), Site("some.layer", 0, heads=0), (16, 6), "head: some.layer has 16 entries"),
        (NM(2, 4), Site("some.layer"), (8, 6), "n:m: m=4 does not divide the 6 inputs of some.layer"),
        (Neuron(), Site("some.layer", 0, fused=2), (7, 6), "neuron: some.layer has 7 entries along its axis 0"),
        (Neuron(), Site("some.layer", 1, fused=3), (6, 2), "neuron: some.layer has 2 entries along its axis 1"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused_by_name_and_size(
    cut: Structure, site: Site, shape: tuple[int, int], message: str
):
    with pytest.raises(InputError, match=message):
        cut.units(torch.zeros(shape), site)


@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (8, 0), (-1, 8)])
def test_a_block_without_extent_is_refused(rows: int, cols: int):
    with pytest.raises(InputError, match="rows and cols must be at least 1"):
        Block(rows, cols)


def test_a_layer_is_every_weight_of_its_block():
    site = Site("some.layer", index=1, blocks=3)
    assert Layer().expand(torch.tensor([1, 2, 3]), torch.zeros(2, 2), site).tolist() == [[2, 2], [2, 2]]
    assert Layer().reduce(torch.ones(2, 2), site).tolist() == [0, 4, 0]


def test_units_are_ranked_by_their_scores_where_nothing_binds_them():
    scores = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    assert all(torch.equal(make_structure(name).rank(scores), scores) for name in STRUCTURES if name != "n:m")


ratios = st.integers(2, 8).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def best_of_each_run(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """True at the n highest of every m consecutive scores, the first of equals first."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    flat = scores.flatten().tolist()
    for start in range(0, len(flat), m):
        run = sorted(range(start, start + m), key=lambda i: (-flat[i], i))
        kept[run[:n]] = True
    return kept.view(scores.shape)


@st.composite
def grids_of_scores(draw: st.DrawFn, m: int) -> list[torch.Tensor]:
    """Weight-shaped scores of very different sizes, with many ties."""
    values = st.integers(-3, 3).map(float) | st.sampled_from([0.0, 1e-30, -1e-30, 1e30, -1e30, 3e38, -3e38])
    grids = []
    for _ in range(draw(st.integers(1, 3))):
        rows, runs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        numbers = draw(st.lists(values, min_size=rows * runs * m, max_size=rows * runs * m))
        grids.append(torch.tensor(numbers).view(rows, runs * m))
    return grids


@pytest.mark.parametrize("budget", ["uniform", "global"])
@given(data=st.data(), ratio=ratios)
def test_any_budget_keeps_the_best_n_of_every_m_once_they_are_ranked(
    budget: str, data: st.DataObject, ratio: tuple[int, int]
):
    cut = NM(*ratio)
    scores = data.draw(grids_of_scores(cut.m))
    masks = BUDGETS[budget]().share([cut.rank(s) for s in scores], 1.0 - (1.0 - cut.n / cut.m))
    for mask, s in zip(masks, scores, strict=True):
        assert torch.equal(mask, best_of_each_run(s, cut.n, cut.m))


@given(data=st.data(), ratio=ratios)
def test_ranks_keep_the_order_of_the_scores_on_either_side(data: st.DataObject, ratio: tuple[int, int]):
    cut = NM(*ratio)
    for scores in data.draw(grids_of_scores(cut.m)):
        rank, best = cut.rank(scores), best_of_each_run(scores, cut.n, cut.m)
        assert rank.isfinite().all()
        assert rank[best].min() > rank[~best].max()
        for side in (best, ~best):
            order = scores[side].argsort(stable=True)
            assert (rank[side][order].diff() >= 0).all()
        small = ~best & (scores.abs() < 10)
        assert rank[small].unique().numel() == scores[small].unique().numel()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4), (1, 1)])
def test_n_m_that_keeps_nothing_or_all_is_refused(n: int, m: int):
    with pytest.raises(InputError, match="it must hold that 1 <= n < m"):
        NM(n, m)


@pytest.mark.parametrize(("n", "m", "sparsity"), [(2, 4, 0.5), (4, 8, 0.5), (1, 4, 0.75), (1, 3, 2 / 3), (7, 10, 0.3)])
def test_a_rule_for_n_m_has_one_sparsity(n: int, m: int, sparsity: float):
    assert Rule("encoder", sparsity, NM(n, m)).sparsity == sparsity
    with pytest.raises(InputError, match=rf"{n} of every {m} weights stay, so set sparsity: 0\.\d+, not 0.9"):
        Rule("encoder", 0.9, NM(n, m))
