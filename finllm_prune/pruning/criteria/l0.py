"""L0 by hard-concrete gates: units are weighed at random while their odds to stay are learned."""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finllm_prune.pruning.criteria.criterion import State, Step, gate_gradient
from finllm_prune.pruning.criteria.movement import SteeredScores

if TYPE_CHECKING:
    from finllm_prune.pruning.groups import Group

_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2.0 / 3.0  # the paper's stretch (gamma, zeta) and beta
_SHIFT = _TEMPERATURE * math.log(-_LOW / _HIGH)


@dataclass(frozen=True)
class L0(SteeredScores):
    """Hard-concrete gates (Louizos et al. 2018, https://arxiv.org/abs/1712.01312), steered to a sparsity as in CoFi.

    From the schedule's begin each forward sees ``z * W``, with ``z = clamp(1.2 s - 0.1, 0, 1)`` per unit,
    ``s = sigmoid((logit(u) + log_alpha) / beta)`` and u uniform. The scores ``S = log_alpha + 1.6`` are the logits of
    ``P(z > 0)`` and descend ``dL/dz * dz/dlog_alpha``; their mean sigmoid, the expected density, is penalised and steered
    (Xia et al. 2022, https://arxiv.org/abs/2204.00408, ascend a Lagrangian for it). From the freeze on z = 1 for the best
    units. Gates are drawn anew at each step, so the masks on the way are samples, and the recorder tells that they churn.

    Args:
        open: the score of each matrix's worst unit at the start; at 3 its gate is open with 95 %.
    """

    travel: float = 60.0
    initial: float = 0.02
    gain: float = 300.0
    open: float = 3.0

    def start(self, group: "Group") -> State:
        state = super().start(group)
        state["scores"] += self.open
        return state | {"slope": torch.zeros_like(state["scores"])}

    def observe(self, group: "Group", state: State, step: Step) -> None:
        self._descend(state, gate_gradient(group) * state["slope"], step)

    def gate(self, group: "Group", state: State, now: float) -> Tensor | None:
        # The place in the run is the seed: a resumed run, and each rank, draws the same.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{group.name} {now}".encode()))
        noise = torch.rand(group.mask.shape, generator=generator).logit(eps=1e-6).to(group.mask.device)
        soft = torch.sigmoid((noise + state["scores"] + _SHIFT) / _TEMPERATURE)
        wide = soft * (_HIGH - _LOW) + _LOW
        slope = (_HIGH - _LOW) / _TEMPERATURE * soft * (1.0 - soft)
        state["slope"] = slope.masked_fill_((wide <= 0) | (wide >= 1), 0)
        return wide.clamp_(0, 1)

    def cutoff(self, fraction: float) -> float | None:
        return 0.0

    def steer(self, states: Iterable[State], excess: float) -> None:
        """By the expected density, instead of the part of the gates that are open more often than not."""
        states = list(states)
        scores = torch.cat([state["scores"].reshape(-1) for state in states])
        super().steer(states, excess + float(torch.sigmoid(scores).mean() - (scores > 0).float().mean()))
