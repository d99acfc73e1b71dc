"""The end of a sweep: adds the slots of the partial results in their order and makes of them the plan's statistics.

Log-sum-exps that the fixed shift may have hurt are made again on the spot.
"""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.redo import redone
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


@triton.jit(do_not_specialize=["self_offset", "first_column"])
def combine_kernel(
    partials_ptr,
    statistics_ptr,
    own_ptr,
    other_ptr,
    scale_ptr,
    shift_ptr,
    target_ptr,
    own_tags,
    other_tags,
    own_count,
    other_count,
    d,
    stride_own,
    stride_other,
    self_offset,
    first_column,
    threshold,
    slots,
    OWN_IS_ROW: tl.constexpr,
    TERMS: tl.constexpr,
    LABEL_WIDTH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (blocks of the own side,), rows or columns. [terms, slots, count] to [terms, count]."""
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    for t in tl.static_range(len(TERMS)):
        first_slot = partials_ptr + tl.cast(t * slots, tl.int64) * own_count
        result = _combined(first_slot, scale_ptr, shift_ptr, index, own_count, slots, TERMS[t][0], BLOCK_M)
        if TERMS[t][0] == LSE:
            result = redone(
                result, own_ptr, other_ptr, scale_ptr, tl.load(shift_ptr), target_ptr, own_tags, other_tags,
                index, own_count, other_count, d, stride_own, stride_other, self_offset, first_column, threshold,
                OWN_IS_ROW, TERMS, t, LABEL_WIDTH, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        tl.store(statistics_ptr + t * own_count + index, result, mask=index < own_count)
