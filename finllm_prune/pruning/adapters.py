"""Pruning a frozen weight W with a low-rank product beside it: the model computes with ``W + s B A``, and trains A and B.

What criteria judge is that sum (``Slot.effective``), and what they need is its gradient G, of which a frozen weight has none:

- estimated from those of the factors, ``g_B = s G A^T`` and ``g_A = s B^T G``, as LoRAPrune does (Zhang et al. 2023,
  https://arxiv.org/abs/2305.18403): a step of gradient descent moves ``B A`` along ``g_B A + B g_A``, which stands for G up to
  a factor. The paper's third term, ``g_B g_A``, is of second order in the learning rate, which it leaves out as a factor.
- or exact: the backward makes G of one matrix, a hook sums ``G * (W + s B A)`` per unit, and G is freed at once.

The model computes with ``mask * (W + s B A)`` at every step, and that is what it becomes when the product is merged under
the mask. Neurons, heads and layers take their rows of W and B, or their columns of W and A, along, so that A and B learn by
the exact gradient. Where single weights are cut, the frozen weight holds ``-s B A``, anew after each step: the forward is
exact, and A and B learn straight through the mask, also from what their product would do in its holes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from finllm_prune.errors import InputError
from finllm_prune.pruning.groups import Group, Slot


@dataclass(frozen=True)
class Adapter:
    """The product ``scale * b @ a`` beside a weight of shape (out, in).

    Args:
        a: (rank, in).
        b: (out, rank).
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float


class Factor(Slot):
    """The factor of an adapter that is cut with its matrix: B where units are rows, A where they are columns."""

    judged: ClassVar[bool] = False

    def __init__(self, beside: Slot, adapter: Adapter):
        name, parameter = ("b", adapter.b) if beside.site.axis == 0 else ("a", adapter.a)
        super().__init__(f"{beside.name}.{name}", parameter, beside.site)


class Frozen(Slot):
    """A parameter that the optimizer does not move, with what is added to it."""

    frozen: ClassVar[bool] = True

    def __init__(self, slot: Slot, adapter: Adapter | None, single: bool):
        super().__init__(slot.name, slot.parameter, slot.site)
        self.adapter = adapter
        self._single = single
        self._holes: Tensor | None = None

    @property
    def effective(self) -> Tensor:
        effective = self._with_product(self.weight)
        return effective if self._holes is None else effective.masked_fill_(self._holes, 0)

    def cover(self, pruned: Tensor) -> None:
        if self._single and self.adapter is not None:
            self._holes = pruned
            product = self._with_product(torch.zeros_like(self.weight))
            self.weight.copy_(torch.where(pruned, -product, self.weight))

    def uncover(self) -> None:
        if self._holes is not None:
            self.weight.masked_fill_(self._holes, 0)
        self._holes = None

    @property
    def effective_gradient(self) -> Tensor | None:
        """The estimate; a bias has none, so that it says nothing of its unit."""
        if self.parameter.ndim == 1:
            return torch.zeros_like(self.weight)
        if self.adapter is None or self.adapter.a.grad is None or self.adapter.b.grad is None:
            return None
        along = self.adapter.b.grad.float() @ self.adapter.a.detach().float()
        return along.addmm_(self.adapter.b.detach().float(), self.adapter.a.grad.float())

    def hear(self, group: Group) -> None:
        """Take the exact gradient, which a backward has just left, and free it."""
        gradient = self.gradient
        assert gradient is not None
        self.parameter.grad = None
        whole = self.weight
        if self._single and self.parked is not None:  # of neurons, heads and layers that are cut, the gradient is zero
            whole = (whole if self._holes is None else whole.masked_fill(self._holes, 0)) + self.parked
        new = group.sum(lambda _: gradient.float() * self._with_product(whole), [self])
        group.heard = new if group.heard is None else group.heard + new

    def _with_product(self, weight: Tensor) -> Tensor:
        weight = weight.float()
        if self.adapter is None:
            return weight
        a, b = self.adapter.a.detach().float(), self.adapter.b.detach().float()
        return torch.addmm(weight, b, a, alpha=self.adapter.scale)


def attach(groups: Iterable[Group], adapters: Mapping[nn.Parameter, Adapter], estimated: bool) -> None:
    """Tell groups that their weights are frozen, and what is trained beside them.

    Raises:
        InputError: gradients are to be estimated where there is no adapter.
    """
    for group in groups:
        slots: list[Slot] = []
        for slot in group.slots:
            adapter = adapters.get(slot.parameter)
            if adapter is None and estimated and slot.parameter.ndim == 2:
                raise InputError(
                    f"peft.target_modules: {slot.site.path} is pruned and has no adapter, from which its gradient could be "
                    "estimated; add it (all-linear has each), or set peft.gradients: exact"
                )
            coupled = group.rule.structure.couples is not None
            slots.append(Frozen(slot, adapter, single=not coupled))
            if adapter is not None and coupled:
                slots.append(Factor(slot, adapter))
        group.slots = slots
