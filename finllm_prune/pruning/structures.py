"""What is cut together: the unit grid of a weight, and the two linear maps between grid and weight.

``expand`` spreads a value per unit over the weight; ``reduce`` sums a weight-shaped tensor per unit. They are adjoint:
``<reduce(x), y> == <x, expand(y)>``. That is why ``reduce(dL/dW' * W)`` is the gradient of the loss with respect to a
mask over units, whatever the structure.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
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
        index: the number of the transformer block that it lies in.
        blocks: how many such blocks the model has.
    """

    path: str
    axis: int = 0
    fused: int = 1
    heads: int = 1
    index: int = 0
    blocks: int = 1


class Structure:
    """A way to cut a weight of shape ``(out, in)`` into units; the base of all structures."""

    couples: ClassVar[str | None] = None
    """What shares one grid: the matrices of one "mlp" or one "attention", or those of the whole "encoder"; None cuts each
    matrix alone."""

    sliced: ClassVar[bool] = False
    """Whether a unit is whole rows or whole columns (along ``Site.axis``) of each matrix, so that cuts can be told by these."""

    single: ClassVar[bool] = False
    """Whether each weight is a unit, so that the grid is split among ranks as its weight is; other grids lie on every rank."""

    def units(self, weight: Tensor, site: Site) -> torch.Size:
        """The shape of the unit grid; raises InputError where the structure does not fit the weight."""
        raise NotImplementedError

    def expand(self, units: Tensor, weight: Tensor, site: Site) -> Tensor:
        """Unit grid -> the weight's shape (a view where the structure allows one)."""
        raise NotImplementedError

    def reduce(self, tensor: Tensor, site: Site) -> Tensor:
        """Weight shape -> unit grid, by sums: the adjoint of ``expand``."""
        raise NotImplementedError

    def reduce_rows(self, rows: Tensor, site: Site, first: int, weight: Tensor) -> Tensor:
        """``reduce`` of a tensor that is zero but for some rows, from row ``first`` on; ``weight`` has the shape of all."""
        return self.reduce(_among_zeros(rows, first, len(weight)), site)

    def rank(self, scores: Tensor) -> Tensor:
        """Scores as a budget should see them (fp32, of the grid's shape), where the structure binds units to each other."""
        return scores

    def check(self, sparsity: float) -> None:
        """Raise InputError where the structure cannot reach a rule's final sparsity."""


def _among_zeros(rows: Tensor, first: int, count: int) -> Tensor:
    return F.pad(rows, (0, 0, first, count - first - len(rows)))


def best(scores: Tensor, n: int, m: int) -> Tensor:
    """The mask of the ``n`` highest of every ``m`` scores along a row; ties go to the lower index."""
    grid = scores.reshape(-1, m)
    order = grid.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(grid, dtype=torch.bool).scatter_(1, order[:, :n], True).view(scores.shape)


@dataclass(frozen=True)
class Unstructured(Structure):
    """Each weight is a unit. Smaller files when packed; no runtime that transformers offers is faster for it."""

    single: ClassVar[bool] = True

    def units(self, weight: Tensor, site: Site) -> torch.Size:
        return weight.shape

    def expand(self, units: Tensor, weight: Tensor, site: Site) -> Tensor:
        return units

    def reduce(self, tensor: Tensor, site: Site) -> Tensor:
        return tensor


@dataclass(frozen=True)
class NM(Unstructured):
    """``n`` of every ``m`` consecutive weights along the input axis stay (Mishra et al. 2021, https://arxiv.org/abs/2104.08378).

    2:4 is what the sparse tensor cores of NVIDIA GPUs can run. On the way to the final sparsity any weight outside the best
    ``n`` of its ``m`` may be cut; at ``1 - n / m`` exactly those are.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise InputError(f"structure n:m: it must hold that 1 <= n < m, not n={self.n} and m={self.m}")

    def units(self, weight: Tensor, site: Site) -> torch.Size:
        if weight.shape[1] % self.m:
            raise InputError(
                f"structure n:m: m={self.m} does not divide the {weight.shape[1]} inputs of {site.path}; "
                "choose an m that does, or another structure there"
            )
        return super().units(weight, site)

    def rank(self, scores: Tensor) -> Tensor:
        """The best ``n`` of every ``m`` (ties: the lower index) above all others of any matrix, each side in its order.

        All scores are squeezed into -1..1 first, so that one number lifts the best above the others of every grid.
        """
        return scores / (1.0 + scores.abs()) + 4.0 * best(scores, self.n, self.m)

    def check(self, sparsity: float) -> None:
        due = 1.0 - self.n / self.m
        if not math.isclose(sparsity, due, abs_tol=1e-9):
            raise InputError(
                f"structure n:m: {self.n} of every {self.m} weights stay, so set sparsity: {due:.12g}, not {sparsity}"
            )


@dataclass(frozen=True)
class Block(Structure):
    """Tiles of ``rows`` x ``cols`` weights (Lagunas et al. 2021, https://arxiv.org/abs/2109.04838)."""

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

    def reduce_rows(self, rows: Tensor, site: Site, first: int, weight: Tensor) -> Tensor:
        out, inn = weight.shape
        narrow = rows.reshape(len(rows), inn // self.cols, self.cols).sum(2)
        return _among_zeros(narrow, first, out).view(out // self.rows, self.rows, -1).sum(1)


class _Slices(Structure):
    """Units that are whole slices of a matrix along ``site.axis``: the shared arithmetic of neurons and heads."""

    sliced: ClassVar[bool] = True

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

    def reduce_rows(self, rows: Tensor, site: Site, first: int, weight: Tensor) -> Tensor:
        if site.axis == 1:
            return self.reduce(rows, site)
        return self.reduce(_among_zeros(rows.sum(1, keepdim=True), first, len(weight)), site)


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


@dataclass(frozen=True)
class Layer(Structure):
    """Whole layers: every matrix and bias of a block (target encoder), or of its attention or MLP, is one unit.

    A cut sub-layer adds nothing to the residual stream: where the norms come before it (Llama, ModernBERT) it is as if it
    were not there; behind a post-norm (BERT) the norm stays.
    """

    couples: ClassVar[str | None] = "encoder"
    sliced: ClassVar[bool] = True

    def units(self, weight: Tensor, site: Site) -> torch.Size:
        return torch.Size((site.blocks,))

    def expand(self, units: Tensor, weight: Tensor, site: Site) -> Tensor:
        return units[site.index].expand(weight.shape)

    def reduce(self, tensor: Tensor, site: Site) -> Tensor:
        totals = tensor.new_zeros(site.blocks)
        totals[site.index] = tensor.sum()
        return totals

    def reduce_rows(self, rows: Tensor, site: Site, first: int, weight: Tensor) -> Tensor:
        return self.reduce(rows, site)


STRUCTURES: dict[str, type[Structure]] = {
    "unstructured": Unstructured,
    "n:m": NM,
    "block": Block,
    "neuron": Neuron,
    "head": Head,
    "layer": Layer,
}
