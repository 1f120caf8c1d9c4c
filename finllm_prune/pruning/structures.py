"""What is cut together: the unit grid of a weight, and the two linear maps between grid and weight.

``expand`` spreads a value per unit over the weight; ``reduce`` sums a weight-shaped tensor per unit. They are adjoint:
``<reduce(x), y> == <x, expand(y)>``. That is why ``reduce(dL/dW' * W)`` is the gradient of the loss with respect to a
mask over units, whatever the structure.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from finllm_prune.errors import InputError


@dataclass(frozen=True)
class Site:
    """One prunable matrix of a model, and the axis along which coupled cuts run.

    Args:
        path: the module path of the linear layer, from the model's root.
        axis: 0 cuts rows (outputs, together with their bias), 1 cuts columns (inputs).
        fused: how many equal matrices are stacked along ``axis`` (3 for a fused QKV, 2 for a fused gate and up).
        heads: how many heads (kv groups under GQA) lie along ``axis`` of each of them.
    """

    path: str
    axis: int = 0
    fused: int = 1
    heads: int = 1


class Structure(Protocol):
    """A way to cut a weight of shape ``(out, in)`` into units."""

    couples: ClassVar[str | None]
    """The part of a transformer block whose matrices share one grid ("mlp", "attention"); None cuts each matrix alone."""

    def units(self, weight: Tensor, site: Site) -> torch.Size:
        """The shape of the unit grid; raises InputError where the structure does not fit the weight."""
        ...

    def expand(self, units: Tensor, weight: Tensor, site: Site) -> Tensor:
        """Unit grid -> the weight's shape (a view where the structure allows one)."""
        ...

    def reduce(self, tensor: Tensor, site: Site) -> Tensor:
        """Weight shape -> unit grid, by sums: the adjoint of ``expand``."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Each weight is a unit. Smaller files when packed; no runtime that transformers offers is faster for it."""

    couples: ClassVar[str | None] = None

    def units(self, weight: Tensor, site: Site) -> torch.Size:
        return weight.shape

    def expand(self, units: Tensor, weight: Tensor, site: Site) -> Tensor:
        return units

    def reduce(self, tensor: Tensor, site: Site) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Block:
    """Tiles of ``rows`` x ``cols`` weights (Lagunas et al. 2021, https://arxiv.org/abs/2109.04838)."""

    couples: ClassVar[str | None] = None
    rows: int = 32
    cols: int = 32

    def __post_init__(self) -> None:
        if min(self.rows, self.cols) < 1:
            raise InputError(f"structure block: rows and cols must be at least 1, not {self.rows} and {self.cols}")

    def units(self, weight: Tensor, site: Site) -> torch.Size:
        out, inn = weight.shape
        if out % self.rows or inn % self.cols:
            raise InputError(
                f"structure block: {self.rows} x {self.cols} does not divide the {out} x {inn} weight of {site.path}; "
                "choose rows and cols that do"
            )
        return torch.Size((out // self.rows, inn // self.cols))

    def expand(self, units: Tensor, weight: Tensor, site: Site) -> Tensor:
        tall, wide = units.shape
        return units[:, None, :, None].expand(tall, self.rows, wide, self.cols).reshape(weight.shape)

    def reduce(self, tensor: Tensor, site: Site) -> Tensor:
        out, inn = tensor.shape
        return tensor.reshape(out // self.rows, self.rows, inn // self.cols, self.cols).sum((1, 3))


class _Slices:
    """Units that are whole slices of a matrix along ``site.axis``: the shared arithmetic of neurons and heads."""

    def count(self, weight: Tensor, site: Site) -> int:
        raise NotImplementedError

    def units(self, weight: Tensor, site: Site) -> torch.Size:
        count = self.count(weight, site)
        if count < 1 or weight.shape[site.axis] % (site.fused * count):
            raise InputError(
                f"structure {type(self).__name__.lower()}: {site.path} has {weight.shape[site.axis]} entries along its "
                f"axis {site.axis}, which {site.fused} x {count} units do not divide; use another structure there"
            )
        return torch.Size((count,))

    def expand(self, units: Tensor, weight: Tensor, site: Site) -> Tensor:
        width = weight.shape[site.axis] // (site.fused * units.numel())
        along = units if width == 1 else units.repeat_interleave(width)
        along = along if site.fused == 1 else along.repeat(site.fused)
        return along.unsqueeze(1 - site.axis).expand(weight.shape)

    def reduce(self, tensor: Tensor, site: Site) -> Tensor:
        count = self.count(tensor, site)
        return tensor.sum(1 - site.axis).view(site.fused, count, -1).sum((0, 2))


@dataclass(frozen=True)
class Neuron(_Slices):
    """FFN neurons: a row of the up (and gate) projection with its bias and a column of the down projection."""

    couples: ClassVar[str | None] = "mlp"

    def count(self, weight: Tensor, site: Site) -> int:
        return weight.shape[site.axis] // site.fused


@dataclass(frozen=True)
class Head(_Slices):
    """Attention heads: rows of q, k, v with their biases and columns of the output projection; a kv group under GQA."""

    couples: ClassVar[str | None] = "attention"

    def count(self, weight: Tensor, site: Site) -> int:
        return site.heads


STRUCTURES: dict[str, type[Structure]] = {
    "unstructured": Unstructured,
    "block": Block,
    "neuron": Neuron,
    "head": Head,
}
