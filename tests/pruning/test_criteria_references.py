"""Each criterion that observes gradients, against its paper's formulas in plain numpy: 20 steps of changing weights."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from finllm_prune.errors import InputError
from finllm_prune.pruning import (
    Block,
    Criterion,
    Gradient,
    Group,
    Head,
    Movement,
    Neuron,
    Platon,
    Rule,
    SecondOrder,
    Site,
    Slot,
    Structure,
    Taylor,
    Unstructured,
    Variance,
)
from finllm_prune.pruning.criteria import State, Step

ROWS, COLUMNS, STEPS, TILE = 6, 8, 20, 2
History = list[tuple[np.ndarray, np.ndarray]]
Reduce = Callable[[np.ndarray], np.ndarray]


def tiles(values: np.ndarray) -> np.ndarray:
    out = np.zeros((ROWS // TILE, COLUMNS // TILE))
    for row in range(ROWS):
        for column in range(COLUMNS):
            out[row // TILE, column // TILE] += values[row, column]
    return out


STRUCTURES: dict[str, tuple[Structure, Reduce]] = {
    "unstructured": (Unstructured(), lambda values: values),
    "block": (Block(TILE, TILE), tiles),
}


def history(seed: int = 0) -> History:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(ROWS, COLUMNS))
    return [(first + 0.1 * rng.normal(size=first.shape), rng.normal(size=first.shape)) for _ in range(STEPS)]


def observed(
    criterion: Criterion, past: History, structure: Structure | None = None, skip: int = -1
) -> tuple[Group, State]:
    """A group whose criterion has seen the history; step number ``skip`` comes with infinite gradients."""
    parameter = nn.Parameter(torch.tensor(past[0][0], dtype=torch.float32))
    slot = Slot("layer.weight", parameter, Site("layer"))
    group = Group("layer", Rule("encoder", 0.5, structure or Unstructured(), criterion), [slot])
    state = criterion.start(group)
    for number, (weight, gradient) in enumerate(past):
        parameter.data = torch.tensor(weight, dtype=torch.float32)
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        if number == skip:
            parameter.grad.fill_(torch.inf)
        criterion.observe(group, state, Step(0.0, 0.1, torch.tensor(float(number == skip))))
    return group, state


def gradient(past: History, reduce: Reduce) -> np.ndarray:
    mean = np.zeros_like(reduce(past[0][0]))
    for _, g in past:
        mean = 0.8 * mean + 0.2 * reduce(np.abs(g))
    return mean


def taylor(past: History, reduce: Reduce) -> np.ndarray:
    mean = np.zeros_like(reduce(past[0][0]))
    for w, g in past:
        mean = 0.8 * mean + 0.2 * np.abs(reduce(g * w))
    return mean


def platon(past: History, reduce: Reduce) -> np.ndarray:
    mean = np.zeros_like(reduce(past[0][0]))
    spread = mean.copy()
    for w, g in past:
        importance = np.abs(reduce(g * w))
        mean = 0.7 * mean + 0.3 * importance
        spread = 0.9 * spread + 0.1 * np.abs(importance - mean)
    return mean * spread


def variance(past: History, reduce: Reduce) -> np.ndarray:
    """Weighted sums over the whole past instead of a recursion."""
    ratios = []
    for series, first in (
        ([np.sqrt(reduce(w * w)) for w, _ in past], np.sqrt(reduce(past[0][0] ** 2))),
        ([np.abs(reduce(g * w)) for w, g in past], np.zeros_like(reduce(past[0][0]))),
    ):
        values = [first, *series]
        weights = np.array([0.8 ** len(series)] + [0.2 * 0.8 ** (len(series) - 1 - i) for i in range(len(series))])
        mean = sum(a * v for a, v in zip(weights, values, strict=True))
        squares = sum(a * (v - mean) ** 2 for a, v in zip(weights, values, strict=True))
        ratios.append(mean / (np.sqrt(squares) + 1e-12 + 1e-3 * np.abs(mean)))
    return ratios[0] * ratios[1]


REFERENCES: list[tuple[Criterion, Callable[[History, Reduce], np.ndarray]]] = [
    (Gradient(decay=0.8), gradient),
    (Taylor(decay=0.8), taylor),
    (Platon(beta1=0.7, beta2=0.9), platon),
    (Variance(decay=0.8), variance),
]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("criterion", "reference"), REFERENCES)
def test_scores_equal_the_formulas(criterion: Criterion, reference: Callable, structure: str):
    cut, reduce = STRUCTURES[structure]
    group, state = observed(criterion, history(), cut)
    np.testing.assert_allclose(criterion.score(group, state).numpy(), reference(history(), reduce), rtol=2e-4)


# What is cut together: for each parameter its shape, the axis of its cuts, how many matrices are stacked, and heads along it.
COUPLED: dict[str, tuple[Structure, int, dict[str, tuple[tuple[int, ...], int, int]]]] = {
    "neuron": (Neuron(), 6, {"up.weight": ((6, 4), 0, 1), "up.bias": ((6,), 0, 1), "down.weight": ((3, 6), 1, 1)}),
    "neuron, gate and up in one matrix": (
        Neuron(), 6, {"in.weight": ((12, 4), 0, 2), "in.bias": ((12,), 0, 2), "out.weight": ((3, 6), 1, 1)}
    ),
    "head": (
        Head(), 3,
        {f"{name}.{kind}": ((6, 4) if kind == "weight" else (6,), 0, 1) for name in "qkv" for kind in ("weight", "bias")}
        | {"o.weight": ((4, 6), 1, 1)},
    ),
    "head, two queries to a key": (
        Head(), 3,
        {"q.weight": ((12, 4), 0, 1), "k.weight": ((6, 4), 0, 1), "v.weight": ((6, 4), 0, 1), "o.weight": ((4, 12), 1, 1)},
    ),
}  # fmt: skip


def units_of(shape: tuple[int, ...], axis: int, fused: int, units: int) -> np.ndarray:
    """The number of the unit of every weight of a parameter, flat."""
    wide = shape[axis] // fused // units
    line = [entry % (shape[axis] // fused) // wide for entry in range(shape[axis])]
    return np.array([line[place[axis]] for place in np.ndindex(*shape)])


@pytest.mark.parametrize("kind", COUPLED)
@pytest.mark.parametrize(("criterion", "reference"), REFERENCES)
def test_scores_of_coupled_units_are_those_of_all_their_weights_together(
    criterion: Criterion, reference: Callable, kind: str
):
    """The formulas on one long vector of all weights; biases count, and so do rows and columns that belong together."""
    structure, units, parts = COUPLED[kind]
    unit = np.concatenate([units_of(*part, units) for part in parts.values()])
    rng = np.random.default_rng(1)
    first = rng.normal(size=unit.size)
    past = [(first + 0.1 * rng.normal(size=unit.size), rng.normal(size=unit.size)) for _ in range(STEPS)]
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, (shape, _, _) in parts.items()}
    slots = [Slot(name, parameters[name], Site(name, axis, fused, units)) for name, (_, axis, fused) in parts.items()]
    group = Group("part", Rule(structure.couples or "", 0.5, structure, criterion), slots)
    torch.nn.utils.vector_to_parameters(torch.tensor(past[0][0], dtype=torch.float32), parameters.values())
    state = criterion.start(group)
    for weight, gradient in past:
        torch.nn.utils.vector_to_parameters(torch.tensor(weight, dtype=torch.float32), parameters.values())
        told = torch.tensor(gradient, dtype=torch.float32).split([p.numel() for p in parameters.values()])
        for parameter, part in zip(parameters.values(), told, strict=True):
            parameter.grad = part.view_as(parameter)
        criterion.observe(group, state, Step(0.0, 0.1, torch.tensor(0.0)))
    expected = reference(past, lambda values: np.bincount(unit, values, minlength=units))
    assert expected.shape == (units,)
    np.testing.assert_allclose(criterion.score(group, state).numpy(), expected, rtol=2e-4)


@pytest.mark.parametrize("criterion", [criterion for criterion, _ in REFERENCES] + [SecondOrder(block=4, damp=0.1)])
def test_a_step_with_infinite_gradients_leaves_no_trace(criterion: Criterion):
    past = history()
    group, state = observed(criterion, [*past[:9], past[9], *past[10:]], skip=9)
    other, expected = observed(criterion, [*past[:9], *past[10:]])
    np.testing.assert_allclose(criterion.score(group, state), criterion.score(other, expected), rtol=1e-6)


def fisher(past: History, block: int, gradients: int, damp: float) -> list[np.ndarray]:
    """The blocks of the empirical Fisher, without any inverse."""
    flat = [g.reshape(-1) for _, g in past]
    return [
        damp * np.eye(block) + sum(np.outer(g[i : i + block], g[i : i + block]) for g in flat) / gradients
        for i in range(0, ROWS * COLUMNS, block)
    ]


def test_second_order_scores_come_from_the_inverse_of_the_fisher_blocks():
    criterion = SecondOrder(block=4, gradients=16, damp=0.1)
    group, state = observed(criterion, history())
    diagonal = np.concatenate([np.linalg.inv(f).diagonal() for f in fisher(history(), 4, 16, 0.1)])
    expected = history()[-1][0].reshape(-1) ** 2 / (2.0 * diagonal)
    np.testing.assert_allclose(criterion.score(group, state).reshape(-1), expected, rtol=1e-3)


@pytest.mark.parametrize("block", [1, 5, 48])
def test_second_order_knows_the_size_of_its_state(block: int):
    criterion = SecondOrder(block=block)
    group, state = observed(criterion, history())
    assert criterion.bytes(group) == state["inverse"].nbytes


def test_second_order_takes_a_last_block_that_is_not_full():
    criterion = SecondOrder(block=10, damp=0.1)
    group, state = observed(criterion, history())
    score = criterion.score(group, state)
    assert score.shape == (ROWS, COLUMNS)
    assert score.isfinite().all()


def test_second_order_moves_the_weights_that_stay_to_the_minimum_of_the_quadratic_loss():
    """Several weights of a block at once, and again after more gradients, which the cut ones take no part in."""
    criterion = SecondOrder(block=6, gradients=16, damp=0.1)
    past = history()
    group, state = observed(criterion, past)
    parameter = group.slots[0].parameter
    expected = parameter.detach().numpy().astype(np.float64).reshape(-1, 6).copy()
    curvature = fisher(past, 6, 16, 0.1)
    alive = np.ones((len(expected), 6), dtype=bool)
    for number, leaving in enumerate(([(0, 1), (0, 3), (0, 4), (2, 5)], [(0, 0), (0, 2), (3, 1), (2, 4)])):
        gone = np.zeros_like(alive)
        gone[tuple(zip(*leaving, strict=True))] = True
        cut = torch.from_numpy(gone.reshape(ROWS, COLUMNS))
        criterion.compensate(group, state, cut)
        for block in np.flatnonzero(gone.any(1)):
            f, out, stay = curvature[block], gone[block], alive[block] & ~gone[block]
            # min over d of d' F d with d = -w where a weight goes: the others solve a linear system.
            if stay.any():
                expected[block][stay] += np.linalg.solve(
                    f[np.ix_(stay, stay)], f[np.ix_(stay, out)] @ expected[block][out]
                )
        alive &= ~gone
        found = parameter.detach().numpy().reshape(-1, 6)
        np.testing.assert_allclose(found[alive], expected[alive], rtol=1e-3, atol=1e-6, err_msg=f"cut {number}")
        group.set_mask(group.mask & ~cut)
        with torch.no_grad():
            parameter.masked_fill_(cut, 0.0)
        for _, g in past[:7]:
            parameter.grad = torch.from_numpy(g.astype(np.float32))
            criterion.observe(group, state, Step(0.5, 0.6, torch.tensor(0.0)))
            masked = g.reshape(-1, 6) * alive
            curvature += np.einsum("bi,bj->bij", masked, masked) / 16
        weights = parameter.detach().numpy().reshape(-1, 6)
        costs = [w**2 / (2 * np.diag(np.linalg.inv(f[np.ix_(a, a)]))) for w, f, a in
                 ((w[a], f, a) for w, f, a in zip(weights, curvature, alive, strict=True))]  # fmt: skip
        score = criterion.score(group, state).numpy().reshape(-1, 6)
        np.testing.assert_allclose(score[alive], np.concatenate(costs), rtol=1e-3)
        assert (score[~alive] == -1.0).all()


def test_second_order_without_correction_moves_nothing():
    criterion = SecondOrder(block=4, correct=False)
    group, state = observed(criterion, history())
    before = group.slots[0].parameter.detach().clone()
    criterion.compensate(group, state, torch.ones(ROWS, COLUMNS, dtype=torch.bool))
    assert torch.equal(group.slots[0].parameter.detach(), before)


def test_second_order_refuses_units_of_many_weights():
    with pytest.raises(InputError, match=r"second_order.*single weights.*taylor"):
        observed(SecondOrder(), history(), Block(TILE, TILE))


@pytest.mark.parametrize(
    ("criterion", "knobs", "message"),
    [
        (Gradient, {"decay": 1.0}, "criterion gradient: decay"),
        (Taylor, {"decay": -0.1}, "criterion taylor: decay"),
        (Platon, {"beta2": 1.0}, "criterion platon: beta2"),
        (Variance, {"decay": 2.0}, "criterion variance: decay"),
        (SecondOrder, {"damp": 0.0}, "damp above 0"),
        (SecondOrder, {"block": 0}, "must be at least 1"),
    ],
)
def test_a_knob_out_of_range_is_refused(criterion: type[Criterion], knobs: dict, message: str):
    with pytest.raises(InputError, match=message):
        criterion(**knobs)


def test_factored_moments_are_those_of_rows_and_columns():
    """Adafactor's second moment under movement: what a weight adds to its score is sign(w) g / rms(g)."""
    past, steps = history(), 0
    rows, columns, scores = np.zeros(ROWS), np.zeros(COLUMNS), np.zeros((ROWS, COLUMNS))
    for number, (w, g) in enumerate(past):
        if number == 5:
            continue  # skipped: the loss scaler saw an overflow
        steps += 1
        rows, columns = 0.999 * rows + 0.001 * (g**2).mean(1), 0.999 * columns + 0.001 * (g**2).mean(0)
        square = np.outer(rows, columns) / rows.mean()
        scores -= 2.0 * 0.1 * np.sign(w) * g / (np.sqrt(square / (1 - 0.999**steps)) + 1e-8)
    criterion = Movement(travel=2.0, initial=0.0, sensitivity=0.5, moments="factored")
    group, state = observed(criterion, past, skip=5)
    np.testing.assert_allclose(state["scores"].numpy(), scores, rtol=1e-4, atol=1e-5)
    expected = scores + 0.25 * np.log(square * past[-1][0] ** 2)
    np.testing.assert_allclose(criterion.score(group, state).numpy(), expected, rtol=1e-4, atol=1e-4)
    assert sum(tensor.numel() for tensor in state.values()) == ROWS * COLUMNS + ROWS + COLUMNS + 1
    blocks, kept = observed(criterion, past, Block(TILE, TILE))
    assert kept["exp_avg"].shape == blocks.mask.shape, "of larger units there is nothing to save"
