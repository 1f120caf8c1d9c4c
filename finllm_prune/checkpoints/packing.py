"""One matrix with zeros as three arrays: which weights are there (a bit each), their values, and a scale for 8-bit values.

Numpy does the work, which is a hundred times faster than torch here.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finllm_prune.checkpoints import bitmask
from finllm_prune.errors import InputError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def unpack(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype, name: str = "a matrix") -> Tensor:
    """The matrix again, on the CPU.

    Raises:
        InputError: the parts are not those of one matrix of this shape.
    """
    check(packed, shape, name)
    mask, values = bitmask.unpack(packed.bitmask, shape).numpy(), packed.values
    if packed.scale is not None:
        in_rows = mask.view(np.uint8).sum(1, dtype=np.uint32)  # a third of the time of count_nonzero
        values = values.float() * torch.from_numpy(np.repeat(packed.scale.numpy(), in_rows))
    # As integers of the same width, for numpy knows no bfloat16.
    bits = values.to(dtype).contiguous().view(_BITS[dtype.itemsize]).numpy()
    flat = np.zeros(mask.size, bits.dtype)
    np.place(flat, mask.reshape(-1), bits)  # a third faster than an assignment
    return torch.from_numpy(flat).view(dtype).view(shape)


def check(packed: Packed, shape: tuple[int, ...], name: str) -> None:
    """Raise InputError where the parts are not those of one matrix of this shape."""
    count, bits, values, scale = math.prod(shape), packed.bitmask, packed.values, packed.scale
    set_bits = int(np.bitwise_count(bits.numpy()).sum()) if bits.dtype == torch.uint8 else -1
    spare = 8 * len(bits) - count
    if (
        bits.shape != (-(-count // 8),)
        or values.shape != (set_bits,)
        or (spare and int(bits[-1]) >> (8 - spare))
        or (values.dtype == torch.int8) != (scale is not None)
        or (scale is not None and scale.shape != shape[:1])
        or not (values.is_floating_point() or values.dtype == torch.int8)
    ):
        raise InputError(
            f"{name}: {len(values)} packed values and a bitmask of {set_bits} set bits in {len(bits)} bytes are no matrix "
            f"of {' x '.join(map(str, shape))}; the file is damaged or belongs to another model, so export or download it anew"
        )
