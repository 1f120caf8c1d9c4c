"""Soft movement's penalty and what steers it: autograd of the penalised loss, and a whole run in plain numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from finllm_prune.pruning import Cubic, Global, Group, Pruner, Rule, Site, Slot, SoftMovement, Unstructured
from finllm_prune.pruning.criteria import State, Step

STEPS = 60
SHAPES = {"small": (3, 4), "large": (5, 8), "other": (5, 8)}
SCHEDULE = Cubic(begin=0.1, end=0.5, freeze=0.9, updates=20)  # a choice in every second or third step


def group_of(name: str, rule: Rule, seed: int = 0) -> Group:
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(SHAPES[name], generator=generator))
    weight.grad = torch.randn(SHAPES[name], generator=generator)
    return Group(name, rule, [Slot(f"{name}.weight", weight, Site(name))])


def told(criterion: SoftMovement, excess: float) -> tuple[Group, State, torch.Tensor]:
    """A group with the scores that it had, and the gradient that they were told in one step: Adam keeps a tenth of it."""
    group = group_of("large", Rule("encoder", 0.5, Unstructured(), criterion))
    state = criterion.start(group)
    criterion.steer([state], excess)
    before = {key: value.clone() for key, value in state.items()}
    criterion.observe(group, state, Step(0.3, 0.4, torch.tensor(0.0)))
    return group, before, state["exp_avg"] / 0.1


@pytest.mark.parametrize("excess", [0.2, -0.1])
@pytest.mark.parametrize(("penalty", "gain"), [(0.05, 0.0), (0.05, 60.0), (0.0, 60.0)])
def test_scores_descend_the_loss_with_a_penalty_on_their_mean_sigmoid(
    penalty: float, gain: float, excess: float
) -> None:
    group, state, found = told(SoftMovement(initial=0.1, penalty=penalty, gain=gain), excess)
    slot = group.slots[0]
    scores = state["scores"].double().requires_grad_()
    mask = torch.ones_like(scores) + scores - scores.detach()  # straight through
    loss = (slot.parameter.grad.double() * slot.weight.double() * mask).sum()
    strength = penalty if gain == 0 else penalty * gain * excess
    (loss + strength * torch.sigmoid(scores).mean()).backward()
    torch.testing.assert_close(found.double(), scores.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("excess", [1 / 60, -1 / 60, 0.5 / 60])
def test_the_unit_of_lambda_is_a_penalty_as_strong_as_the_mean_gradient_of_the_scores(excess: float) -> None:
    """At scores of 0, where a sigmoid is steepest."""
    group, state, found = told(SoftMovement(initial=0.0, gain=60.0), excess)
    assert not state["scores"].any()
    loss = group.slots[0].parameter.grad * group.slots[0].weight
    added = loss.abs().mean() * 60.0 * excess
    torch.testing.assert_close(found - loss, added.expand(loss.shape), rtol=1e-4, atol=1e-6)


class Written:
    """Soft movement as it is written down, in plain numpy: what one matrix's scores do."""

    def __init__(self, criterion: SoftMovement, weight: np.ndarray):
        self.criterion, self.weight = criterion, weight
        self.first, self.second = np.zeros(weight.shape), np.zeros(weight.shape)
        rank = np.abs(weight).ravel().argsort().argsort().reshape(weight.shape)
        self.scores = criterion.initial * criterion.travel * rank / weight.size
        self.mask = np.ones(weight.shape, dtype=bool)

    def step(self, gradient: np.ndarray, excess: float, step: int) -> None:
        told = gradient * self.weight
        unit = 4.0 * np.abs(told).sum() if self.criterion.penalty is None else self.criterion.penalty
        kept = 1.0 / (1.0 + np.exp(-self.scores))
        told = told + unit * self.criterion.gain * excess * kept * (1.0 - kept) / self.weight.size
        self.first, self.second = 0.9 * self.first + 0.1 * told, 0.999 * self.second + 0.001 * told**2
        mean, square = self.first / (1.0 - 0.9 ** (step + 1)), self.second / (1.0 - 0.999 ** (step + 1))
        rate = self.criterion.travel / STEPS * (1.0 - step / STEPS)
        self.scores = self.scores - rate * mean / (np.sqrt(square) + 1e-8)

    def choose(self, fraction: float) -> None:
        self.mask = 1.0 / (1.0 + np.exp(-self.scores)) > self.criterion.threshold * fraction
        self.mask.flat[self.scores.argmax()] = True


@pytest.mark.parametrize("penalty", [None, 40.0])
def test_a_run_is_the_one_written_down_whose_lambda_follows_the_density_of_all_matrices_of_its_rule(
    penalty: float | None,
) -> None:
    criterion = SoftMovement(travel=30.0, initial=0.1, threshold=0.2, penalty=penalty)
    rule = Rule("encoder", 0.6, Unstructured(), criterion, Global())
    # The density of a second rule is no business of the first.
    groups = [group_of("small", rule), group_of("large", rule, 1), group_of("other", replace(rule, sparsity=0.3), 2)]
    pruner = Pruner(groups, SCHEDULE)
    whole = [group.slots[0].weight.clone() for group in groups]
    written = [Written(criterion, weight.double().numpy()) for weight in whole[:2]]
    rng = np.random.default_rng(3)
    excess, seen = 0.0, []
    for step in range(int(0.88 * STEPS)):
        gradients = [rng.normal(size=weight.shape) for weight in whole]
        for group, gradient in zip(groups, gradients, strict=True):
            group.slots[0].parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        pruner.before_step((step + 1) / STEPS)
        pruner.after_step()
        for matrix, gradient in zip(written, gradients, strict=False):
            matrix.step(gradient, excess, step)
        if SCHEDULE.due(step / STEPS, (step + 1) / STEPS):
            fraction = 1.0 - (1.0 - min(1.0, ((step + 1) / STEPS - 0.1) / 0.4)) ** 3
            for matrix in written:
                matrix.choose(fraction)
            kept = sum(matrix.mask.sum() for matrix in written) / sum(matrix.mask.size for matrix in written)
            excess = kept - (1.0 - 0.6 * fraction)
            seen.append(excess)
        state = pruner.state_dict()
        for group, matrix in zip(groups, written, strict=False):
            assert np.array_equal(group.mask.numpy(), matrix.mask), f"step {step}"
            assert float(state[f"{group.name}/state/excess"]) == pytest.approx(excess, abs=1e-6)
            np.testing.assert_allclose(state[f"{group.name}/state/scores"].numpy(), matrix.scores, rtol=0, atol=2e-3)
    assert not pruner.frozen
    assert float(state["other/state/excess"]) != pytest.approx(excess, abs=1e-3)
    assert len(seen) > 15
    assert max(seen) > 0.1, "it was steered down"
    assert min(seen) < -0.02, "and up again"
    assert abs(seen[-1]) < 0.1
