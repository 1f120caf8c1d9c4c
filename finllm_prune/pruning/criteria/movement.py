"""Movement pruning: scores that learn, by their own gradient, which units the fine-tuning wants to keep."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from finllm_prune.errors import InputError
from finllm_prune.pruning.criteria.criterion import Criterion, State, Step, gate_gradient, norm

if TYPE_CHECKING:
    from finllm_prune.pruning.groups import Group


_FLOOR = 1e-30  # below any second moment that a gradient leaves; keeps the logarithm finite where there was none


@dataclass(frozen=True)
class LearnedScores(Criterion):
    """Scores that descend the gradient of a mask: ``S <- S - lr * Adam(sum(dL/dW' * W))``.

    The learning rate of the scores decays linearly over the run and is given per *run*, as ``travel = lr * steps`` (the
    paper's 1e-2 over 256 steps is 2.56), so that a recipe means the same on small and large data.

    Args:
        travel: learning rate of the scores times the number of optimizer steps.
        initial: scores start at ``initial * travel * rank(|W|) / n`` in each matrix. From 0, the paper's start, Adam moves
            every score by about the same amount a step, so that after a few steps their order is chance, and short runs
            collapse. A start by magnitude outlasts that, and a weight that keeps moving to zero still falls.
        moments: in what Adam's two moments are kept; "bfloat16" takes half of their memory, and rounds them.
    """

    travel: float = 1.0
    initial: float = 1.0
    moments: Literal["float32", "bfloat16"] = field(default="float32", kw_only=True)

    def __post_init__(self) -> None:
        if not (0 < self.travel < math.inf and 0 <= self.initial < math.inf):
            raise InputError(
                "pruning.rules: a criterion's travel must be above 0 and its initial at least 0, not "
                f"{self.travel} and {self.initial}"
            )
        if self.moments not in ("float32", "bfloat16"):
            raise InputError(f"pruning.rules: a criterion's moments must be float32 or bfloat16, not {self.moments}")

    def start(self, group: "Group") -> State:
        size = group.whole(norm(group))
        rank = torch.empty_like(size).view(-1)
        rank[size.view(-1).argsort(stable=True)] = torch.arange(size.numel(), device=size.device, dtype=size.dtype)
        scores = group.part((rank * (self.initial * self.travel / size.numel())).view(size.shape))
        zeros = torch.zeros_like(scores, dtype=getattr(torch, self.moments))
        return {"scores": scores, "exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": scores.new_zeros(())}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        self._descend(state, gate_gradient(group), step)

    def score(self, group: "Group", state: State) -> Tensor:
        return state["scores"]

    def learned(self, state: State) -> Tensor:
        return state["scores"]

    def _descend(self, state: State, gradient: Tensor, step: Step) -> None:
        first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()
        adam(
            [state["scores"]], [gradient], [first], [second], [], [state["step"]],
            amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=False, fused=True,
            lr=self.travel * (step.now - step.before) * (1.0 - step.before), found_inf=step.skip,
        )  # fmt: skip
        if state["exp_avg"].dtype != torch.float32:
            # The second moment moves by 0.1 % a step, less than bf16 can tell: rounded to the nearest it would stand still.
            # Rounded up as often as it lies near the upper value, it is right in the mean.
            state["exp_avg_sq"].copy_(_rounded_at_random(second, dice=first))
            state["exp_avg"].copy_(first)


def _rounded_at_random(values: Tensor, dice: Tensor) -> Tensor:
    """fp32 values, none below 0, on the grid of bf16; the last bits of ``dice`` (fp32) decide, so all ranks throw the same."""
    thrown = dice.view(torch.int32).bitwise_and(0xFFFF)
    return thrown.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)


@dataclass(frozen=True)
class Movement(LearnedScores):
    """Hard movement pruning (Sanh et al. 2020, https://arxiv.org/abs/2005.07683): weights that move away from zero stay.

    Adam makes all scores move at the same pace, whether the loss feels their weight or not. Its second moment knows: the
    root of it is the rms of ``g * w``, the sensitivity of the loss to a cut. The mask is chosen by ``S + sensitivity *
    log rms(g * w)``, which costs nothing to keep and tells apart what movement alone cannot.

    Args:
        sensitivity: the weight of that logarithm beside the scores; 0 is the paper's criterion.
    """

    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sensitivity < math.inf:
            raise InputError(f"criterion movement: sensitivity must not be negative, not {self.sensitivity}")

    def score(self, group: "Group", state: State) -> Tensor:
        if self.sensitivity == 0:
            return state["scores"]
        return state["scores"].add(state["exp_avg_sq"].float().add(_FLOOR).log_(), alpha=0.5 * self.sensitivity)

    def worth(self, score: Tensor) -> Tensor | None:
        """``rms(g * w)`` times ``e^(S / sensitivity)``: the loss's first-order change, weighed by what the scores learnt."""
        return (score / self.sensitivity).exp() if self.sensitivity > 0 else None


@dataclass(frozen=True)
class SteeredScores(LearnedScores):
    """Scores that are the logits of staying: a penalty on ``mean(sigmoid(S))`` does the cutting.

    The penalty adds ``lambda * sigmoid(S) (1 - sigmoid(S)) / n`` to the gradient of the scores. lambda is steered to the
    sparsity that is due: it is proportional to the density above the schedule's, and below it turns into a reward that
    brings units back. What is still off when the masks freeze is settled by the budget, so that the sparsity asked for is
    the one reached.

    Args:
        penalty: the unit of lambda; None takes, at each step, that at which the penalty equals the mean gradient of the scores.
        gain: lambda is ``penalty * gain * excess density``; 0 keeps it at ``penalty``, as in the paper.
    """

    penalty: float | None = None
    gain: float = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gain < 0 or (self.penalty is not None and self.penalty < 0):
            raise InputError(
                f"pruning.rules: a criterion's gain must not be negative, nor its penalty: {self.gain} and {self.penalty}"
            )

    def start(self, group: "Group") -> State:
        state = super().start(group)
        return state | {"excess": state["scores"].new_zeros(())}

    def steer(self, states: Iterable[State], excess: float) -> None:
        for state in states:
            state["excess"].fill_(excess)

    def _descend(self, state: State, gradient: Tensor, step: Step) -> None:
        unit = 4.0 * gradient.abs().sum() if self.penalty is None else self.penalty
        strength = unit * (self.gain * state["excess"] if self.gain > 0 else 1.0)
        gate = torch.sigmoid(state["scores"])
        super()._descend(state, gradient + strength / gradient.numel() * gate * (1.0 - gate), step)


@dataclass(frozen=True)
class SoftMovement(SteeredScores):
    """Soft movement pruning (Sanh et al. 2020): kept where ``sigmoid(S) > tau``, under a steered penalty.

    Args:
        threshold: tau at the end of the schedule; it grows with the schedule from 0.
    """

    travel: float = 20.0
    initial: float = 0.1
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise InputError(
                f"criterion soft_movement: threshold must lie between 0 and 1 (exclusive), not {self.threshold}"
            )

    def cutoff(self, fraction: float) -> float | None:
        tau = self.threshold * fraction
        return math.log(tau / (1.0 - tau)) if tau > 0 else -math.inf


@dataclass(frozen=True)
class ScoreMovement(Movement):
    """Static model pruning (Jiang et al. 2023, https://arxiv.org/abs/2210.06210): the scores move, the weights do not.

    Fine-tuning is the choice of the mask alone, so that a task costs one bit per weight beside the shared dense model. What
    no rule targets (embeddings, norms, biases, the head) is trained unless its ``requires_grad`` says otherwise.
    """

    trains_weights: ClassVar[bool] = False
