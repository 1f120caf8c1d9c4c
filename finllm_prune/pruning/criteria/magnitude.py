"""Criteria that look at weights alone."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finllm_prune.pruning.criteria.criterion import Criterion, State, norm

if TYPE_CHECKING:
    from finllm_prune.pruning.groups import Group


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The weight itself: ``|w|``, or the l2 norm of a unit (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878)."""

    def score(self, group: "Group", state: State) -> Tensor:
        return norm(group)


@dataclass(frozen=True)
class Random(Criterion):
    """The control: a fixed random order, drawn from ``seed`` and the group's name."""

    seed: int = 0

    def start(self, group: "Group") -> State:
        digest = hashlib.sha256(f"{self.seed}/{group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return {"scores": group.part(torch.rand(group.shape, generator=generator)).to(group.mask.device)}

    def score(self, group: "Group", state: State) -> Tensor:
        return state["scores"]
