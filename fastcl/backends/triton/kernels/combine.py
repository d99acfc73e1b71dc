"""The end of a sweep: adds the slots of the partial results in their order and makes of them the plan's statistics."""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.sweep import largest, merge, nothing
from fastcl.backends.triton.kernels.tile import LN_2, LOG2_E, LSE, MAX, SUM

SLOTS = tl.constexpr(32)


@triton.jit
def _combined(partials_ptr, scale_ptr, shift_ptr, index, count, slots, REDUCE: tl.constexpr, BLOCK: tl.constexpr):
    total = nothing(BLOCK, REDUCE)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        at = partials_ptr + slot.to(tl.int64)[:, None] * count + index[None, :]
        there = (slot < slots)[:, None] & (index < count)[None, :]
        if REDUCE == MAX:
            some = tl.reduce(tl.load(at, mask=there, other=float("-inf")), 0, largest)
        else:
            some = tl.sum(tl.load(at, mask=there, other=0.0), axis=0)
        total = merge(total, some, REDUCE)
    if REDUCE == LSE:
        total = (tl.log2(total) + tl.load(shift_ptr) * LOG2_E) * LN_2
    elif REDUCE == SUM:
        total = total * tl.load(scale_ptr)
    return total


@triton.jit
def combine_kernel(
    partials_ptr,
    scale_ptr,
    shift_ptr,
    statistics_ptr,
    count,
    slots,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of rows or columns,). [terms, slots, count] to [terms, count]."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for t in tl.static_range(len(TERMS)):
        first_slot = partials_ptr + tl.cast(t * slots, tl.int64) * count
        result = _combined(first_slot, scale_ptr, shift_ptr, index, count, slots, TERMS[t][0], BLOCK)
        tl.store(statistics_ptr + t * count + index, result, mask=index < count)
