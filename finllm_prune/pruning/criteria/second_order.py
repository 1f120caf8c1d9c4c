"""The loss's curvature: what a cut costs to second order, and how the weights that stay can make up for it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from finllm_prune.errors import InputError
from finllm_prune.pruning.criteria.criterion import Criterion, State, Step, gradient

if TYPE_CHECKING:
    from finllm_prune.pruning.groups import Group

_AT_ONCE = 4096  # blocks whose inverses are taken apart together: 41 MB of 50 x 50


@dataclass(frozen=True)
class SecondOrder(Criterion):
    """oBERT (Kurtic et al. 2022, https://arxiv.org/abs/2203.07259): ``w^2 / (2 [F^-1]_ii)`` of an empirical Fisher F.

    F is block-diagonal over ``block`` consecutive weights: ``F = damp * I + 1/m * sum g g^T``, its inverse kept up to date
    by the Sherman-Morrison formula, a rank-one step for each observed batch gradient. A cut of weight i moves the others of
    its block by ``-w_i / [F^-1]_ii * F^-1[:, i]``, the optimal brain surgeon's correction, and i leaves F; of several that
    are cut at once in a block, one after the other, which comes to their joint correction.

    The inverse takes ``4 * block`` bytes per weight, in memory and in each checkpoint, fp32 because it starts at
    ``1 / damp``, beyond fp16, and bf16 has too few digits for a sum over a whole run; a run says how much before it trains.

    Args:
        block: weights per block of F.
        gradients: m, the number of gradients that one estimate is meant to hold.
        damp: the diagonal before any gradient.
        every: optimizer steps between two observed gradients.
        correct: whether cuts move the weights that stay.
    """

    block: int = 50
    gradients: int = 64
    damp: float = 1e-7
    every: int = 1
    correct: bool = True

    def __post_init__(self) -> None:
        if min(self.block, self.gradients, self.every) < 1 or not 0 < self.damp < math.inf:
            raise InputError(
                "criterion second_order: block, gradients and every must be at least 1 and damp above 0, not "
                f"{self.block}, {self.gradients}, {self.every} and {self.damp}"
            )

    def check(self, group: "Group") -> None:
        if group.mask.shape != group.slots[0].weight.shape:
            raise InputError(
                "criterion second_order: it weighs single weights; use structure unstructured or n:m with it, "
                "or criterion taylor for larger units"
            )

    def bytes(self, group: "Group") -> int:
        """The size of the state of a group."""
        return 4 * self.block**2 * -(-group.mask.numel() // self.block)

    def start(self, group: "Group") -> State:
        blocks = -(-group.mask.numel() // self.block)
        eye = torch.eye(self.block, device=group.mask.device) / self.damp
        return {"inverse": eye.repeat(blocks, 1, 1), "step": torch.zeros((), device=group.mask.device)}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        due = state["step"].remainder(self.every) == 0
        state["step"] += 1
        # A cut weight is no longer a variable of the loss: without its gradient, its row of the inverse stays zero.
        g = self._blocks(gradient(group.slots[0]) * group.mask)
        g = torch.where(due & (step.skip == 0), g, 0.0)
        inverse = state["inverse"]
        projected = torch.bmm(inverse, g.unsqueeze(2))
        scale = self.gradients + torch.bmm(g.unsqueeze(1), projected)
        inverse.baddbmm_(projected / scale, projected.transpose(1, 2), alpha=-1.0)

    def score(self, group: "Group", state: State) -> Tensor:
        weight = self._blocks(group.slots[0].weight.float())
        cost = self._grid(weight.square() / (2.0 * self._diagonal(state)), group)
        # The others have made up for what is cut: it does not come back.
        return cost.masked_fill(~group.mask, -1.0)

    def learned(self, state: State) -> Tensor:
        return self._diagonal(state)

    def compensate(self, group: "Group", state: State, leaving: Tensor) -> None:
        weight = group.slots[0].weight
        values, out = self._blocks(weight.float()), self._blocks(leaving)
        for start in range(0, len(out), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            self._eliminate(state["inverse"][part], values[part], out[part])
        if self.correct:
            stay = group.mask & ~leaving
            weight.copy_(torch.where(stay, self._grid(values, group).to(weight.dtype), weight))

    def _eliminate(self, inverse: Tensor, values: Tensor, out: Tensor) -> None:
        """Take the weights of ``out`` from some blocks, in place, one of each block at a time.

        The others move to where the loss is least without it, and the inverse becomes that of F without its row and column;
        so the order does not matter.
        """
        turns = out.cumsum(1) * out
        for turn in range(1, int(turns.max()) + 1):
            blocks, places = turns.eq(turn).nonzero(as_tuple=True)
            rows = inverse[blocks, places]
            others = inverse.diagonal(dim1=1, dim2=2)[blocks].clamp_min(self._least)
            # An element's square is at most the product of the two on the diagonal that it belongs to, but for rounding.
            pivots = torch.maximum((rows.square() / others).amax(1), others.gather(1, places[:, None]).squeeze(1))
            ratios = rows / pivots[:, None]
            values.index_add_(0, blocks, -values[blocks, places, None] * ratios)
            inverse.index_add_(0, blocks, -rows.unsqueeze(2) * ratios.unsqueeze(1))
            inverse[blocks, places] = 0.0
            inverse[blocks, :, places] = 0.0

    def _diagonal(self, state: State) -> Tensor:
        return state["inverse"].diagonal(dim1=1, dim2=2).clamp_min(self._least)

    @property
    def _least(self) -> float:
        """Below this nothing but rounding is left of the first ``1 / damp``."""
        return torch.finfo(torch.float32).eps / self.damp

    def _blocks(self, values: Tensor) -> Tensor:
        flat = values.reshape(-1)
        return F.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)

    def _grid(self, blocks: Tensor, group: "Group") -> Tensor:
        return blocks.reshape(-1)[: group.mask.numel()].view(group.mask.shape)
