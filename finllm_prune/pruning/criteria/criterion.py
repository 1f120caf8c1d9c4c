"""What every criterion is: knobs in a frozen dataclass, its memory of a group in a dict of tensors.

The Pruner owns, saves and restores that dict. Scores and moments are fp32 whatever the model's dtype: in bf16,
1.0 + 1e-3 is 1.0.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

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

    trains_weights: ClassVar[bool] = True
    """Whether the optimizer may move the target's weights; False freezes them for the whole run."""

    def check(self, group: "Group") -> None:
        """Raises InputError where the criterion does not fit the group."""

    def start(self, group: "Group") -> State:
        """The state of a group before the first step."""
        return {}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        """Gradients are ready and the weights are whole."""

    def score(self, group: "Group", state: State) -> Tensor:
        """The score grid (fp32, finite) from which the next mask is chosen."""
        raise NotImplementedError

    def worth(self, score: Tensor) -> Tensor | None:
        """Scores as the rise of the loss without a unit (fp32, not negative), which adds up over heads and neurons alike.

        In the order of the scores; None where they tell an order only.
        """
        return None

    def learned(self, state: State) -> Tensor | None:
        """What the gradients alone have taught (any shape), for the recorder, up to a factor; None where they teach nothing.

        A score may drift on while no gradient arrives; this stands still then, or all of it fades alike.
        """
        return None

    def cutoff(self, fraction: float) -> float | None:
        """The score that a unit must exceed, where the criterion itself decides; None leaves it to the budget."""
        return None

    def steer(self, states: Iterable[State], excess: float) -> None:
        """Told how much denser a rule is than the schedule asks, where ``cutoff`` decides."""

    def gate(self, group: "Group", state: State, now: float) -> Tensor | None:
        """Weights of the units (fp32, 0 to 1) in the next forward, at progress ``now``; None leaves it to the mask."""
        return None

    def compensate(self, group: "Group", state: State, leaving: Tensor) -> None:
        """Units of the grid are about to be cut (True in ``leaving``): the whole weights may be corrected for it."""


def norm(group: "Group") -> Tensor:
    """The l2 norm of each unit, over all matrices of the group."""
    return group.sum(lambda slot: slot.effective.float().square()).sqrt_()


def gate_gradient(group: "Group") -> Tensor:
    """``dL/dm = sum(dL/dW' * W)``: the gradient of the loss with respect to a mask over units."""
    if group.heard is not None:
        return group.heard.clone()
    return group.sum(lambda slot: gradient(slot) * slot.effective.float())


def gradient(slot: "Slot") -> Tensor:
    """``dL/dW'`` in fp32; a frozen parameter has none, which is an error here."""
    found = slot.effective_gradient
    if found is None:
        raise InputError(
            f"{slot.name} has no gradient, which its criterion needs: unfreeze it (requires_grad) or use magnitude"
        )
    return found.float()


def blend(average: Tensor, value: Tensor, decay: float, step: Step) -> None:
    """``average <- decay * average + (1 - decay) * value``, in place; a skipped step leaves it as it is."""
    average.lerp_(torch.where(step.skip > 0, average, value), 1.0 - decay)


def refuse_unless_fraction(criterion: str, **knobs: float) -> None:
    """Decays must lie in 0 <= x < 1."""
    for name, value in knobs.items():
        if not 0 <= value < 1:
            raise InputError(f"criterion {criterion}: {name} must be at least 0 and below 1, not {value}")
