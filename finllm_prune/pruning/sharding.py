"""Matrices of which each rank holds some rows (FSDP2, ``fully_shard``): what lies here, what lies elsewhere, and their sums."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from finllm_prune.errors import InputError


@dataclass(frozen=True)
class Split:
    """How a matrix of ``shape`` (out, in) is split: its rows, in turn, over the ranks of a mesh of one dimension."""

    mesh: DeviceMesh
    shape: torch.Size

    @classmethod
    def of(cls, parameter: Tensor, name: str) -> "Split | None":
        """The split of a parameter (a bias is a matrix of one column); None where it is whole.

        Raises:
            InputError: it is split in another way, as by tensor parallelism.
        """
        if not isinstance(parameter, DTensor):
            return None
        along = [placement for placement in parameter.placements if not isinstance(placement, Replicate)]
        if [type(placement) for placement in along] != [Shard] or along[0] != Shard(0):
            raise InputError(
                f"{name}: pruning knows parameters that are split by rows (FSDP2), not as {parameter.placements}; "
                "launch without tensor or expert parallelism"
            )
        shape = parameter.shape if parameter.ndim == 2 else torch.Size((*parameter.shape, 1))
        return cls(_along_rows(parameter), shape)

    @property
    def rows(self) -> slice:
        """The rows that lie on this rank; there may be none."""
        count = self.shape[0]
        share = -(-count // self.mesh.size())
        first = min(count, self.mesh.get_local_rank() * share)
        return slice(first, min(count, first + share))

    def part(self, whole: Tensor) -> Tensor:
        """A copy of this rank's rows."""
        return whole[self.rows].clone()

    def spread(self, part: Tensor) -> DTensor:
        """This rank's rows as a part of the whole; all ranks have to join in."""
        stride = (self.shape[1], 1)
        return DTensor.from_local(part.contiguous(), self.mesh, [Shard(0)], shape=self.shape, stride=stride)

    def whole(self, part: Tensor) -> Tensor:
        """All ranks' rows; all ranks have to join in."""
        # gloo gathers no truth values
        rows = self.spread(part.byte() if part.dtype == torch.bool else part).full_tensor()
        return rows.to(part.dtype)


def moved(tensor: Tensor, before: Split | None, after: Split | None) -> Tensor:
    """What this rank holds of a matrix that is split anew."""
    if before == after:
        return tensor
    whole = tensor if before is None else before.whole(tensor)
    return whole if after is None else after.part(whole)


def here(tensor: Tensor) -> Tensor:
    """What lies on this rank, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """A part that lies as ``tensor`` does."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


def mesh_of(tensors: Sequence[Tensor]) -> DeviceMesh | None:
    """Over which ranks the tensors are split; None where they are whole."""
    return next((_along_rows(tensor) for tensor in tensors if isinstance(tensor, DTensor)), None)


def _along_rows(tensor: DTensor) -> DeviceMesh:
    """The ranks that share the rows of a tensor; beside them there may be others with copies (HSDP)."""
    mesh, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names
    if mesh.ndim == 1 or names is None:
        return mesh
    return mesh[names[next(dim for dim, placement in enumerate(tensor.placements) if placement == Shard(0))]]


def total(tensor: Tensor, mesh: DeviceMesh | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or maximum, or minimum) over all ranks, in place; without a mesh the tensor itself."""
    if mesh is not None:
        dist.all_reduce(tensor, op, mesh.get_group())
    return tensor


def joined(part: Tensor, mesh: DeviceMesh | None, fill: float) -> Tensor:
    """The values of all ranks, in the order of ranks, short parts filled up; without a mesh the tensor itself."""
    if mesh is None:
        return part
    longest = int(total(torch.tensor(part.numel(), device=part.device), mesh, dist.ReduceOp.MAX))
    filled = part.new_full((longest,), fill)
    filled[: part.numel()] = part
    parts = [torch.empty_like(filled) for _ in range(mesh.size())]
    dist.all_gather(parts, filled, mesh.get_group())
    return torch.cat(parts)


def sampled(part: Tensor, split: Split | None, count: int) -> Tensor:
    """About ``count`` values (fp32) at even distances over the whole of a matrix; all ranks have to join in."""
    # The stride is odd, so that it does not fall on the same few columns in each row.
    stride = max(1, (part.numel() if split is None else split.shape.numel()) // count) | 1
    before = 0 if split is None else split.rows.start * split.shape[1]
    mine = part.detach().reshape(-1)[-before % stride :: stride].to(torch.float32, copy=True).contiguous()
    if split is None:
        return mine
    longest = joined(mine, split.mesh, 0.0).view(split.mesh.size(), -1)
    lengths = joined(torch.tensor([mine.numel()], device=mine.device), split.mesh, 0).tolist()
    return torch.cat([row[:length] for row, length in zip(longest, lengths, strict=True)])


def split_mesh(model: nn.Module) -> DeviceMesh | None:
    """Over which ranks the rows of a model's parameters are split; None where each rank has all of them."""
    splits = (Split.of(parameter, name) for name, parameter in model.named_parameters())
    return next((split.mesh for split in splits if split is not None), None)
