"""Movement pruning: scores that learn, by their own gradient, which units the fine-tuning wants to keep."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from finllm_prune.errors import InputError
from finllm_prune.pruning.criteria.criterion import Criterion, State, Step, blend, gate_gradient, norm

if TYPE_CHECKING:
    from finllm_prune.pruning.groups import Group
    from finllm_prune.pruning.structures import Structure


_MEMORY, _EPSILON = 0.999, 1e-8  # of Adam's second moment
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
    """

    travel: float = 1.0
    initial: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.travel < math.inf and 0 <= self.initial < math.inf):
            raise InputError(
                "pruning.rules: a criterion's travel must be above 0 and its initial at least 0, not "
                f"{self.travel} and {self.initial}"
            )

    def start(self, group: "Group") -> State:
        size = group.whole(norm(group))
        rank = torch.empty_like(size).view(-1)
        rank[size.view(-1).argsort(stable=True)] = torch.arange(size.numel(), device=size.device, dtype=size.dtype)
        scores = group.part((rank * (self.initial * self.travel / size.numel())).view(size.shape))
        return {"scores": scores, "step": scores.new_zeros(()), **self._moments(group, scores)}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        self._descend(state, gate_gradient(group), step)

    def score(self, group: "Group", state: State) -> Tensor:
        return state["scores"]

    def learned(self, state: State) -> Tensor:
        return state["scores"]

    def _moments(self, group: "Group", scores: Tensor) -> State:
        return {"exp_avg": torch.zeros_like(scores), "exp_avg_sq": torch.zeros_like(scores)}

    def _descend(self, state: State, gradient: Tensor, step: Step) -> None:
        adam(
            [state["scores"]], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            amsgrad=False, beta1=0.9, beta2=_MEMORY, eps=_EPSILON, weight_decay=0.0, maximize=False, fused=True,
            lr=self._pace(step), found_inf=step.skip,
        )  # fmt: skip

    def _pace(self, step: Step) -> float:
        return self.travel * (step.now - step.before) * (1.0 - step.before)


@dataclass(frozen=True)
class Movement(LearnedScores):
    """Hard movement pruning (Sanh et al. 2020, https://arxiv.org/abs/2005.07683): weights that move away from zero stay.

    Adam makes all scores move at the same pace, whether the loss feels their weight or not. Its second moment knows: the
    root of it is the rms of ``g * w``, the sensitivity of the loss to a cut. The mask is chosen by ``S + sensitivity *
    log rms(g * w)``, which costs nothing to keep and tells apart what movement alone cannot.

    Args:
        sensitivity: the weight of that logarithm beside the scores; 0 is the paper's criterion.
        moments: "whole" keeps Adam's two moments of each score. "factored" keeps, where single weights are cut, one number per
            row and column instead, as Adafactor does (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235): the mean
            square of g is about their product, and a sum over steps needs no first moment. That takes two of the three
            tensors of the weights' size off.
    """

    sensitivity: float = 1.0
    moments: Literal["whole", "factored"] = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sensitivity < math.inf:
            raise InputError(f"criterion movement: sensitivity must not be negative, not {self.sensitivity}")
        if self.moments not in ("whole", "factored"):
            raise InputError(f"criterion movement: moments must be whole or factored, not {self.moments}")

    def observe(self, group: "Group", state: State, step: Step) -> None:
        if not self.factors(group.rule.structure):
            super().observe(group, state, step)
            return
        weight = group.slots[0].effective.float()
        gradient = torch.where(weight == 0, 0.0, gate_gradient(group) / weight)
        square = gradient.square()
        blend(state["rows"], square.mean(1), _MEMORY, step)
        blend(state["columns"], square.mean(0), _MEMORY, step)
        state["step"] += 1.0 - step.skip
        corrected = _mean_square(state) / (1.0 - _MEMORY ** state["step"])
        change = gradient * weight.sign() / corrected.sqrt_().add_(_EPSILON)
        state["scores"].sub_(torch.where(step.skip > 0, 0.0, change), alpha=self._pace(step))

    def score(self, group: "Group", state: State) -> Tensor:
        if self.sensitivity == 0:
            return state["scores"]
        if self.factors(group.rule.structure):
            square = _mean_square(state).mul_(group.slots[0].effective.float().square())
        else:
            square = state["exp_avg_sq"].clone()
        return state["scores"].add(square.add_(_FLOOR).log_(), alpha=0.5 * self.sensitivity)

    def factors(self, structure: "Structure") -> bool:
        """Whether the moments of such units are means over rows and columns."""
        return self.moments == "factored" and structure.single

    def _moments(self, group: "Group", scores: Tensor) -> State:
        if not self.factors(group.rule.structure):
            return super()._moments(group, scores)
        rows, columns = group.shape
        return {"rows": scores.new_zeros(rows), "columns": scores.new_zeros(columns)}

    def worth(self, score: Tensor) -> Tensor | None:
        """``rms(g * w)`` times ``e^(S / sensitivity)``: the loss's first-order change, weighed by what the scores learnt."""
        return (score / self.sensitivity).exp() if self.sensitivity > 0 else None


def _mean_square(state: State) -> Tensor:
    """Of the gradient of each weight, from the means over rows and columns: the product that has the same means."""
    return torch.outer(state["rows"], state["columns"]) / state["rows"].mean().add(_FLOOR)


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
