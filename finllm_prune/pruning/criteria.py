"""Who survives: a score per unit, high = keep.

A criterion is a frozen dataclass of knobs; what it remembers about a group lies in a dict of tensors that the Pruner
owns, saves and restores. Scores and moments are fp32 whatever the model's dtype: in bf16, 1.0 + 1e-3 is 1.0.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam

from finllm_prune.errors import InputError

if TYPE_CHECKING:
    from finllm_prune.pruning.groups import Group, Slot

State = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """Where a run stands: progress before and after this optimizer step (0..1), and whether to ignore its gradients.

    ``skip`` is a 0-dim fp32 tensor, 1.0 where a gradient is infinite or NaN: then nothing may reach a score.
    """

    before: float
    now: float
    skip: Tensor


@dataclass(frozen=True)
class Criterion:
    """The base of all criteria: override what the idea needs."""

    needs_gradient: ClassVar[bool] = False

    def start(self, group: "Group") -> State:
        """The state of a group before the first step."""
        return {}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        """Gradients are ready and the weights are whole."""

    def score(self, group: "Group", state: State) -> Tensor:
        """The score grid (fp32, finite) from which the next mask is chosen."""
        raise NotImplementedError

    def cutoff(self, fraction: float) -> float | None:
        """The score that a unit must exceed, where the criterion itself decides; None leaves it to the budget."""
        return None

    def steer(self, states: Iterable[State], excess: float) -> None:
        """Told how much denser a rule is than the schedule asks, where ``cutoff`` decides."""


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The weight itself: ``|w|``, or the l2 norm of a unit (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878)."""

    def score(self, group: "Group", state: State) -> Tensor:
        return _norm(group)


@dataclass(frozen=True)
class Random(Criterion):
    """The control: a fixed random order, drawn from ``seed`` and the group's name."""

    seed: int = 0

    def start(self, group: "Group") -> State:
        digest = hashlib.sha256(f"{self.seed}/{group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return {"scores": torch.rand(group.mask.shape, generator=generator).to(group.mask.device)}

    def score(self, group: "Group", state: State) -> Tensor:
        return state["scores"]


@dataclass(frozen=True)
class Movement(Criterion):
    """Hard movement pruning (Sanh et al. 2020, https://arxiv.org/abs/2005.07683): weights that move away from zero stay.

    ``S <- S - lr * Adam(reduce(dL/dW' * W))``. The learning rate of the scores decays linearly over the run and is given
    per *run*, as ``travel = lr * steps`` (the paper's 1e-2 over 256 steps is 2.56), so that a recipe means the same on
    small and large data.

    Args:
        travel: learning rate of the scores times the number of optimizer steps.
        initial: scores start at ``initial * travel * rank(|W|) / n`` in each matrix. At 0, the paper's start, short runs
            collapse: Adam moves every score by about the same amount a step, so that after a few steps their order is
            chance. A start by magnitude outlasts that, and a weight that keeps moving to zero still falls.
    """

    needs_gradient: ClassVar[bool] = True
    travel: float = 1.0
    initial: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.travel < math.inf and 0 <= self.initial < math.inf):
            raise InputError(
                f"criterion movement: travel must be above 0 and initial at least 0, not {self.travel} and {self.initial}"
            )

    def start(self, group: "Group") -> State:
        norm = _norm(group)
        rank = torch.empty_like(norm).view(-1)
        rank[norm.view(-1).argsort(stable=True)] = torch.arange(norm.numel(), device=norm.device, dtype=norm.dtype)
        scores = (rank * (self.initial * self.travel / norm.numel())).view(norm.shape)
        zeros = torch.zeros_like(scores)
        return {"scores": scores, "exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": scores.new_zeros(())}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        gradient = group.sum(_movement)
        self._descend(state, gradient, step)

    def score(self, group: "Group", state: State) -> Tensor:
        return state["scores"]

    def _descend(self, state: State, gradient: Tensor, step: Step) -> None:
        adam(
            [state["scores"]], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=False, fused=True,
            lr=self.travel * (step.now - step.before) * (1.0 - step.before), found_inf=step.skip,
        )  # fmt: skip


@dataclass(frozen=True)
class SoftMovement(Movement):
    """Soft movement pruning (Sanh et al. 2020): kept where ``sigmoid(S) > tau``; a penalty on the scores does the cutting.

    The penalty ``lambda * mean(sigmoid(S))`` adds ``lambda * sigmoid(S) (1 - sigmoid(S)) / n`` to the gradient of the
    scores. lambda follows the schedule: it grows while the rule is denser than is due and shrinks while it is sparser.
    What is still missing when the masks freeze is cut by the budget, so that the sparsity asked for is the one reached.

    Args:
        threshold: tau at the end of the schedule; it grows with the schedule from 0.
        penalty: lambda at the start; None starts it at the size of the gradient of the scores.
        gain: how fast lambda follows: it changes by the factor ``exp(gain * excess density)`` at each update; 0 fixes it.
    """

    travel: float = 20.0
    initial: float = 0.1
    threshold: float = 0.1
    penalty: float | None = None
    gain: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 1 or self.gain < 0:
            raise InputError(
                "criterion soft_movement: threshold must lie between 0 and 1 and gain must not be negative"
            )

    def start(self, group: "Group") -> State:
        state = super().start(group)
        return state | {"penalty": state["scores"].new_full((), math.nan if self.penalty is None else self.penalty)}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        gradient = group.sum(_movement)
        n, penalty = gradient.numel(), state["penalty"]
        size = 4.0 * gradient.abs().sum()
        start = torch.where((step.skip > 0) | (size == 0), math.nan, size)
        penalty.copy_(torch.where(penalty.isnan(), start, penalty))
        gate = torch.sigmoid(state["scores"])
        self._descend(state, gradient + penalty.nan_to_num() / n * gate * (1.0 - gate), step)

    def cutoff(self, fraction: float) -> float | None:
        tau = self.threshold * fraction
        return math.log(tau / (1.0 - tau)) if tau > 0 else -math.inf

    def steer(self, states: Iterable[State], excess: float) -> None:
        for state in states:
            state["penalty"].mul_(math.exp(self.gain * excess))


def _norm(group: "Group") -> Tensor:
    """The l2 norm of each unit, over all matrices of the group."""
    return group.sum(lambda slot: slot.weight.float().square()).sqrt_()


def _movement(slot: "Slot") -> Tensor:
    """``dL/dW' * W``: the gradient of the loss with respect to a mask on each weight."""
    gradient = slot.gradient
    if gradient is None:
        raise InputError(
            f"{slot.name} has no gradient, which its criterion needs: unfreeze it (requires_grad) or use magnitude"
        )
    return gradient.float() * slot.weight.float()


CRITERIA: dict[str, type[Criterion]] = {
    "movement": Movement,
    "soft_movement": SoftMovement,
    "magnitude": Magnitude,
    "random": Random,
}
