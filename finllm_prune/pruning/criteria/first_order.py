"""Criteria that average what the gradients say: how much the loss would change without a unit.

A unit's importance is ``|dL/dm| = |sum(g * w)|``, the first-order change of the loss when its mask m goes from 1 to 0;
for single weights that is ``|g * w|``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finllm_prune.pruning.criteria.criterion import (
    Criterion,
    State,
    Step,
    blend,
    gate_gradient,
    gradient,
    norm,
    refuse_unless_fraction,
)

if TYPE_CHECKING:
    from finllm_prune.pruning.groups import Group

_TINY = 1e-12


@dataclass(frozen=True)
class _RunningMean(Criterion):
    """The running mean of what the gradients of a step say about each unit.

    Args:
        decay: of the running mean; 0 looks at the last step alone.
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        refuse_unless_fraction(type(self).__name__.lower(), decay=self.decay)

    def importance(self, group: "Group") -> Tensor:
        """The unit grid (fp32) of one step."""
        raise NotImplementedError

    def start(self, group: "Group") -> State:
        return {"mean": _zeros(group)}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        blend(state["mean"], self.importance(group), self.decay, step)

    def score(self, group: "Group", state: State) -> Tensor:
        return state["mean"]

    def learned(self, state: State) -> Tensor:
        return state["mean"]


@dataclass(frozen=True)
class Gradient(_RunningMean):
    """The running mean of ``|g|``, summed over the weights of a unit: where the loss would change most at once.

    As RigL grows by it (Evci et al. 2020, https://arxiv.org/abs/1911.11134); alone it knows nothing of a weight's size.
    """

    def importance(self, group: "Group") -> Tensor:
        return group.sum(lambda slot: gradient(slot).abs())


@dataclass(frozen=True)
class Taylor(_RunningMean):
    """The running mean of ``|sum(g * w)|`` (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771).

    For single weights it is SNIP's ``|g * w|`` (Lee et al. 2019, https://arxiv.org/abs/1810.02340), averaged over the run.
    """

    def importance(self, group: "Group") -> Tensor:
        return gate_gradient(group).abs_()

    def worth(self, score: Tensor) -> Tensor | None:
        return score


@dataclass(frozen=True)
class Platon(Criterion):
    """Importance times its uncertainty (Zhang et al. 2022, https://arxiv.org/abs/2206.12562).

    ``I = |sum(g * w)|``, ``mean <- EMA(I)``, ``spread <- EMA(|I - mean|)``, score ``mean * spread``: a unit whose importance
    still varies is explored longer.

    Args:
        beta1: decay of the mean importance.
        beta2: decay of its spread.
    """

    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        refuse_unless_fraction("platon", beta1=self.beta1, beta2=self.beta2)

    def start(self, group: "Group") -> State:
        return {"mean": _zeros(group), "spread": _zeros(group)}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        importance = gate_gradient(group).abs_()
        blend(state["mean"], importance, self.beta1, step)
        blend(state["spread"], importance.sub_(state["mean"]).abs_(), self.beta2, step)

    def score(self, group: "Group", state: State) -> Tensor:
        return state["mean"] * state["spread"]

    def learned(self, state: State) -> Tensor:
        return state["mean"]

    def worth(self, score: Tensor) -> Tensor | None:
        """The geometric mean of both, which is in units of the loss."""
        return score.sqrt()


@dataclass(frozen=True)
class Variance(Criterion):
    """Signal to noise: ``mean / deviation`` of a unit's norm, times that of its importance.

    A weight that stands still is well known, one that swings is noise (Graves 2011, "Practical variational inference for
    neural networks", prunes by the signal-to-noise ratio of a weight); the same is asked of the importance ``|sum(g * w)|``.
    Variances are exponentially weighted (West 1979): ``v <- decay * (v + (1 - decay) * (x - mean)^2)``. A unit of many
    weights has no sign, so norms and absolute values are taken, of single weights too: one that swings through zero counts by
    how far it swings. The ratios know no scale: under one threshold over all matrices small weights that stand still stay,
    and at high sparsity the model can collapse (CONTRIBUTING.md, "What was tried for quality").

    Args:
        decay: of all four running values.
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        refuse_unless_fraction("variance", decay=self.decay)

    def start(self, group: "Group") -> State:
        values = {"weight": norm(group), "importance": _zeros(group)}
        zeros = {f"{name}_variance": torch.zeros_like(value) for name, value in values.items()}
        return {f"{name}_mean": value for name, value in values.items()} | zeros

    def observe(self, group: "Group", state: State, step: Step) -> None:
        self._blend(state, "weight", norm(group), step)
        self._blend(state, "importance", gate_gradient(group).abs_(), step)

    def score(self, group: "Group", state: State) -> Tensor:
        return _ratio(state, "weight") * _ratio(state, "importance")

    def learned(self, state: State) -> Tensor:
        return state["importance_mean"]

    def _blend(self, state: State, name: str, value: Tensor, step: Step) -> None:
        mean, variance = state[f"{name}_mean"], state[f"{name}_variance"]
        off = torch.where(step.skip > 0, 0.0, value - mean)
        decay = torch.where(step.skip > 0, 1.0, self.decay)
        variance.add_(off.square() * (1.0 - self.decay)).mul_(decay)
        mean.add_(off, alpha=1.0 - self.decay)


def _ratio(state: State, name: str) -> Tensor:
    """Mean by standard deviation; the floor on the deviation keeps what never moved finite."""
    mean = state[f"{name}_mean"]
    return mean / (state[f"{name}_variance"].sqrt() + _TINY + 1e-3 * mean.abs())


def _zeros(group: "Group") -> Tensor:
    return torch.zeros(group.mask.shape, device=group.mask.device)
