"""One bit an element: whatever is packed comes back, in the fewest whole bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finllm_prune.checkpoints import bitmask

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(shape=SHAPES, density=st.floats(0, 1), seed=st.integers(0, 99))
def test_what_is_packed_comes_back(shape: tuple[int, ...], density: float, seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    bits = bitmask.pack(mask)
    assert (bits.dtype, bits.shape) == (torch.uint8, (-(-mask.numel() // 8),))
    unpacked = bitmask.unpack(bits, shape)
    assert unpacked.dtype == torch.bool
    assert torch.equal(unpacked, mask)
    assert sum(int(byte).bit_count() for byte in bits) == int(mask.sum()), "what fills the last byte up is zero"


@given(place=st.integers(0, 40))
def test_the_order_on_disk_is_the_lowest_bit_first(place: int) -> None:
    mask = torch.zeros(41, dtype=torch.bool)
    mask[place] = True
    bits = bitmask.pack(mask)
    assert bits[place // 8] == 1 << place % 8
    assert int(bits.sum()) == 1 << place % 8


def test_a_mask_of_strides_is_packed_row_by_row() -> None:
    mask = torch.rand(6, 5) < 0.5
    assert torch.equal(bitmask.unpack(bitmask.pack(mask.T), (5, 6)), mask.T)


@pytest.mark.parametrize("bits", [torch.zeros(2, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), torch.zeros(3)])
def test_bytes_that_are_no_such_mask_are_refused(bits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"a mask of shape \(4, 5\) has 3 bytes, not"):
        bitmask.unpack(bits, (4, 5))
