"""Penalties on weights that prepare a cut: applied as proximal steps, right after the optimizer's.

A strength is given per *run*: one step pulls by ``strength`` times the part of the run that it is, times the part of the
final sparsity that is due, so that lambda ramps with the schedule and a recipe means the same on small and large data.
The pull does not pass through Adam, whose scaling would undo it (the reason for AdamW's decay).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from finllm_prune.errors import InputError

if TYPE_CHECKING:
    from finllm_prune.pruning.groups import Group


@dataclass(frozen=True)
class Regularizer:
    """The base of all regularizers.

    Args:
        strength: the pull of a whole run at full lambda; above 0.
    """

    strength: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise InputError(f"pruning.rules: a regularizer's strength must be above 0, not {self.strength}")

    def shrink(self, group: "Group", pull: Tensor) -> None:
        """One proximal step on the whole weights of a group; ``pull`` is a 0-dim fp32 tensor."""
        raise NotImplementedError


@dataclass(frozen=True)
class L1(Regularizer):
    """Soft thresholding, ``sign(w) max(|w| - pull, 0)``: small weights reach zero (Tibshirani 1996)."""

    def shrink(self, group: "Group", pull: Tensor) -> None:
        for slot in group.slots:
            weight = slot.weight
            weight.copy_(weight.sign() * (weight.float().abs() - pull).clamp_min_(0.0))


@dataclass(frozen=True)
class L2(Regularizer):
    """``w / (1 + pull)``: a decay of the targets alone."""

    strength: float = 0.1

    def shrink(self, group: "Group", pull: Tensor) -> None:
        for slot in group.slots:
            slot.weight.div_(1.0 + pull)


@dataclass(frozen=True)
class GroupLasso(Regularizer):
    """Whole units shrink together: ``w_u max(0, 1 - pull / rms(w_u))`` (Yuan and Lin 2006; lambda times sqrt of the size).

    Neurons, heads or blocks that the task does not need fade out before they are cut, so that the cut itself costs little.
    """

    def shrink(self, group: "Group", pull: Tensor) -> None:
        size = group.sum(lambda slot: slot.weight.new_ones(()).expand(slot.weight.shape).float())
        rms = (group.sum(lambda slot: slot.weight.float().square()) / size).sqrt_()
        factor = (1.0 - pull / rms).clamp_min_(0.0).nan_to_num_(0.0, neginf=0.0)
        for slot in group.slots:
            weight = slot.weight
            weight.mul_(group.expand(factor, slot).to(weight.dtype))


REGULARIZERS: dict[str, type[Regularizer]] = {"l1": L1, "l2": L2, "group_lasso": GroupLasso}
