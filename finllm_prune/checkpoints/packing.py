"""One matrix with zeros as three arrays: which weights are there (a bit each), their values, and a scale for 8-bit values.

Numpy finds the set bits, in half of torch's time.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finllm_prune.checkpoints import bitmask
from finllm_prune.errors import InputError

_PIECE, _ALIGNED = 32 * 2**20, 64  # bytes


@dataclass(frozen=True)
class Packed:
    """A matrix of r rows and c columns.

    Args:
        bitmask: uint8 [ceil(r * c / 8)]; weight i of the flat matrix is bit i % 8, the lowest first, of byte i // 8.
        values: [number of set bits], in the order of the flat matrix, in the matrix's dtype or int8.
        scale: fp32 [r], with int8 values only: what one step is worth in each row.
    """

    bitmask: Tensor
    values: Tensor
    scale: Tensor | None = None

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(part.nbytes for part in (self.bitmask, self.values, self.scale) if part is not None)

    def tensors(self) -> dict[str, Tensor]:
        """As they lie in a file, where each tensor costs its time to load: the scale's bytes behind the bitmask's."""
        scale = self.scale
        bits = self.bitmask if scale is None else torch.cat([self.bitmask, scale.view(torch.uint8)])
        return {"bitmask": bits, "values": self.values}

    @classmethod
    def of(cls, bitmask: Tensor, values: Tensor, shape: tuple[int, ...]) -> "Packed":
        """The inverse of ``tensors``, for a matrix of this shape; that they fit is for ``unpack`` to find."""
        size = -(-math.prod(shape) // 8)
        scale = bitmask[size:]
        if values.dtype != torch.int8 or scale.dtype != torch.uint8 or len(scale) % 4:
            return cls(bitmask, values)
        return cls(bitmask[:size], values, scale.clone().view(torch.float32))


def pack(matrix: Tensor, int8: bool = False) -> Packed:
    """A matrix without its zeros.

    Args:
        int8: round each row to 255 steps up to its largest absolute value, which loses precision.
    """
    matrix = matrix.detach().cpu().contiguous()
    mask = matrix != 0
    bits = bitmask.pack(mask)
    if not int8:
        return Packed(bits, matrix[mask])
    scale = matrix.float().abs().amax(1) / 127
    steps = (matrix.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return Packed(bits, steps[mask].to(torch.int8), scale)


class Memory:
    """Zeros for many matrices, cut off a few large pieces, which the system hands out in huge pages: in a quarter of the time.

    A piece is freed when none of its tensors is left; each tensor has a storage of its own.
    """

    def __init__(self) -> None:
        self._left = np.zeros(0, np.uint8)

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """So many of them, in one dimension, on the CPU."""
        size = count * dtype.itemsize
        if size > len(self._left):
            self._left = np.zeros(max(size, _PIECE), np.uint8)
        taken, self._left = self._left[:size], self._left[-(-size // _ALIGNED) * _ALIGNED :]
        return torch.from_numpy(taken).view(dtype)


def unpack(
    packed: Packed, shape: tuple[int, ...], dtype: torch.dtype, name: str = "a matrix", memory: Memory | None = None
) -> Tensor:
    """The matrix again, on the CPU.

    Args:
        memory: where many matrices are to lie.

    Raises:
        InputError: the parts are not those of one matrix of this shape.
    """
    places = _places(packed.bitmask) if packed.bitmask.dtype == torch.uint8 else np.zeros(0, np.int64)
    _check(packed, len(places), shape, name)
    flat = (memory or Memory()).zeros(math.prod(shape), dtype)
    matrix = flat.index_copy_(0, torch.from_numpy(places), packed.values.to(dtype)).view(shape)
    return matrix if packed.scale is None else matrix.mul_(packed.scale[:, None])  # the product is rounded once


def _places(bitmask: Tensor) -> NDArray[np.int64]:
    """Of the set bits.

    Such bits behind the mask keep numpy from its way for less than a tenth of them, which takes three times as long.
    """
    bits = bitmask.numpy().reshape(-1)
    behind = len(bits) // 8
    more = np.concatenate([bits, np.full(behind, 255, np.uint8)])
    found = np.flatnonzero(np.unpackbits(more, bitorder="little").view(bool))
    return found[: len(found) - 8 * behind]


def _check(packed: Packed, set_bits: int, shape: tuple[int, ...], name: str) -> None:
    """Raise InputError where the parts are not those of one matrix of this shape."""
    count, bits, values, scale = math.prod(shape), packed.bitmask, packed.values, packed.scale
    spare = 8 * len(bits) - count
    if (
        bits.dtype != torch.uint8
        or bits.shape != (-(-count // 8),)
        or values.shape != (set_bits,)
        or (spare and int(bits[-1]) >> (8 - spare))
        or (values.dtype == torch.int8) != (scale is not None)
        or (scale is not None and not (scale.shape == shape[:1] and bool(scale.isfinite().all())))
        or not (values.is_floating_point() or values.dtype == torch.int8)
    ):
        raise InputError(
            f"{name}: {len(values)} packed values and a bitmask of {set_bits} set bits in {len(bits)} bytes are no matrix "
            f"of {' x '.join(map(str, shape))}; the file is damaged or belongs to another model, so export or download it anew"
        )
