"""One-shot methods on one matrix, against plain numpy references."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from finllm_prune.errors import InputError
from finllm_prune.pruning import ONESHOT, ByMatrix, Calibrated, SparseGPT, Wanda
from finllm_prune.pruning.budgets import select
from finllm_prune.pruning.oneshot import Pattern

CALIBRATED: list[type[Calibrated]] = [cls for cls in ONESHOT.values() if issubclass(cls, Calibrated)]
BY_MATRIX: list[type[ByMatrix]] = [cls for cls in CALIBRATED if issubclass(cls, ByMatrix)]
Array = NDArray[np.float64]


def made(out: int = 8, inn: int = 24, tokens: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its inputs; the inputs are mixtures of few sources, with unlike scales, as hidden states are."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, inn, generator=g) * torch.linspace(0.3, 3.0, inn)[torch.randperm(inn, generator=g)]
    inputs += torch.randn(tokens, 4, generator=g) @ torch.randn(4, inn, generator=g)
    return torch.randn(out, inn, generator=g), inputs


def lowest(costs: Array, n: int) -> Array:
    """True for the n lowest entries of a flat array."""
    cut = np.zeros(costs.size, dtype=bool)
    cut[np.argsort(costs.ravel(), kind="stable")[:n]] = True
    return cut.reshape(costs.shape)


def obs(weight: Array, hessian: Array, block: int, cut_of_block: int, pattern: Pattern | None) -> tuple[Array, Array]:
    """Optimal brain surgeon as it is written down: for each column the inverse of the Hessian of the columns that are left."""
    weight, kept = weight.copy(), np.ones(weight.shape, dtype=bool)
    inn = weight.shape[1]
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(inn)]
    diagonal = np.array([inverse[0, 0] for inverse in inverses])
    for j in range(inn):
        if pattern is None and j % block == 0:
            part = slice(j, j + block)
            kept[:, part] = ~lowest(weight[:, part] ** 2 / diagonal[part], cut_of_block)
        if pattern is not None and j % pattern[1] == 0:
            n, m = pattern
            for row in range(len(weight)):
                kept[row, j : j + m] = ~lowest(weight[row, j : j + m] ** 2 / diagonal[j : j + m], m - n)
        for row in np.flatnonzero(~kept[:, j]):
            weight[row, j:] -= weight[row, j] / diagonal[j] * inverses[j][0]
    return kept, weight * kept


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_wanda_cuts_the_lowest_products_of_each_row(sparsity: float) -> None:
    weight, inputs = made(inn=40)
    method = Wanda()
    statistics = method.statistics(inputs[:30]) + method.statistics(inputs[30:])
    mask, pruned = method.prune(weight, statistics, sparsity)
    score = np.abs(weight.numpy()) * np.linalg.norm(inputs.numpy(), axis=0)
    for row in range(8):
        expected = ~lowest(score[row], round(sparsity * 40))
        assert np.array_equal(mask[row].numpy(), expected)
        assert np.array_equal(pruned[row].numpy(), weight[row].numpy() * expected)


def test_wanda_keeps_n_of_m_by_the_same_products() -> None:
    weight, inputs = made()
    mask, _ = Wanda().prune(weight, Wanda().statistics(inputs), 0.5, (2, 4))
    score = (np.abs(weight.numpy()) * np.linalg.norm(inputs.numpy(), axis=0)).reshape(-1, 4)
    expected = np.array([~lowest(four, 2) for four in score]).reshape(8, 24)
    assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("block", [1, 6, 8, 24, 128])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparsegpt_is_optimal_brain_surgeon(block: int, pattern: Pattern | None) -> None:
    weight, inputs = made()
    method = SparseGPT(block=block)
    mask, pruned = method.prune(weight, method.statistics(inputs[:50]) + method.statistics(inputs[50:]), 0.5, pattern)
    x = inputs.double().numpy()
    hessian = x.T @ x
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(24)
    kept, expected = obs(weight.double().numpy(), hessian, block, 8 * min(block, 24) // 2, pattern)
    assert np.array_equal(mask.numpy(), kept)
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=0, atol=1e-4)
    assert not pruned[~mask].any()


@pytest.mark.parametrize("method", [SparseGPT(), Wanda()])
def test_inputs_of_equal_length_at_right_angles_leave_magnitude(method: Calibrated) -> None:
    """The Hessian is a multiple of the identity: no column can make up for another."""
    weight, _ = made(out=1)
    mask, pruned = method.prune(weight, method.statistics(3.0 * torch.eye(24)), 0.75)
    assert torch.equal(mask, select([weight.abs()], 6)[0])
    torch.testing.assert_close(pruned, weight * mask)


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_the_better_a_method_knows_the_inputs_the_smaller_the_error_of_the_outputs(pattern: Pattern | None) -> None:
    weight, inputs = made(out=32, inn=64, tokens=512)
    ones = torch.ones(64)  # Wanda with equal norms is magnitude
    masks = [
        Wanda().prune(weight, ones, 0.5, pattern),
        *(method.prune(weight, method.statistics(inputs), 0.5, pattern) for method in (Wanda(), SparseGPT())),
    ]
    magnitude, wanda, sparsegpt = (float((inputs @ (weight - pruned).T).norm()) for _, pruned in masks)
    assert sparsegpt < 0.8 * wanda < wanda < magnitude


@given(
    cls=st.sampled_from(BY_MATRIX),
    out=st.integers(1, 9),
    inn=st.integers(1, 40),
    tokens=st.integers(1, 60),
    sparsity=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_any_matrix_gets_its_sparsity(
    cls: type[ByMatrix], out: int, inn: int, tokens: int, sparsity: float, seed: int
) -> None:
    """Also with fewer tokens than inputs, where the Hessian has no inverse of its own."""
    weight, inputs = made(out, inn, tokens, seed)
    method = cls()
    mask, pruned = method.prune(weight, method.statistics(inputs), sparsity)
    units = mask.sum(1) if cls is Wanda else mask.sum().view(1)
    size = mask.numel() // len(units)
    assert all(abs(int(kept) - max(1.0, (1 - sparsity) * size)) <= 0.5 for kept in units)
    assert torch.equal(pruned != 0, mask)
    assert pruned.isfinite().all()


@given(
    cls=st.sampled_from(BY_MATRIX), m=st.integers(2, 8), groups=st.integers(1, 5), seed=st.integers(0, 99), data=st.data()
)  # fmt: skip
def test_any_matrix_gets_its_pattern(cls: type[ByMatrix], m: int, groups: int, seed: int, data: Any) -> None:
    n = data.draw(st.integers(1, m - 1))
    weight, inputs = made(5, m * groups, 40, seed)
    method = SparseGPT(block=7) if cls is SparseGPT else cls()
    mask, _ = method.prune(weight, method.statistics(inputs), 1 - n / m, (n, m))
    assert bool((mask.view(-1, m).sum(1) == n).all())


@pytest.mark.parametrize("cls", BY_MATRIX)
def test_inputs_that_are_zero_are_cut_first_and_break_nothing(cls: type[ByMatrix]) -> None:
    weight, inputs = made()
    inputs[:, 3::2] = 0
    method = cls()
    mask, pruned = method.prune(weight, method.statistics(inputs), 11 / 24)
    assert not mask[:, 3::2].any()
    assert pruned.isfinite().all()
    mask, pruned = method.prune(weight, method.statistics(0 * inputs), 0.5)
    assert torch.equal(pruned, weight * mask)


def test_inputs_that_are_infinite_are_one_sentence() -> None:
    weight, inputs = made()
    inputs[0, 0] = torch.inf
    with pytest.raises(InputError, match="the Hessian of a matrix has no inverse"):
        SparseGPT().prune(weight, SparseGPT().statistics(inputs), 0.5)


def test_bf16_weights_are_pruned_in_fp32() -> None:
    weight, inputs = made()
    for method in (Wanda(), SparseGPT()):
        half = method.prune(weight.bfloat16(), method.statistics(inputs.bfloat16()), 0.5)[1]
        assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [({"damp": 0.0}, "damp lie between"), ({"block": 0}, "block of sparsegpt must be at least 1")],
)
def test_bad_knobs_are_one_sentence(knobs: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        SparseGPT(**knobs)


@pytest.mark.parametrize("cls", CALIBRATED)
def test_no_calibration_data_is_one_sentence(cls: type[Calibrated]) -> None:
    with pytest.raises(InputError, match=r"pruning\.oneshot\.rows: .* need calibration data"):
        cls(rows=0)
