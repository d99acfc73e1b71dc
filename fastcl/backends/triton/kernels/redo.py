"""Recomputes with a running maximum each log-sum-exp that the fixed shift may have hurt (see fastcl.backends.shift).

Always launched, so that nobody has to ask the device whether it is needed; a block with nothing flagged returns at
once. A sum of 0 is flagged too, because it does not tell an empty row from one that underflowed.
"""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.tile import (
    ABSENT,
    ALONG_COLUMNS,
    ALONG_ROWS,
    LN_2,
    LOG2_E,
    REQUIRED,
    inner_products,
    pair_tests,
    target_columns,
    where_admitted,
)


@triton.jit(do_not_specialize=["self_offset"])
def redo_kernel(
    own_ptr,
    other_ptr,
    scale_ptr,
    shift_ptr,
    target_ptr,
    lse_ptr,
    own_count,
    other_count,
    d,
    stride_own,
    stride_other,
    self_offset,
    threshold,
    OWN_IS_ROW: tl.constexpr,
    TERMS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (blocks of the own side,), the side whose log-sum-exp this is: rows of S, or its columns."""
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    shift = tl.load(shift_ptr)
    fixed = tl.load(lse_ptr + own, mask=own < own_count, other=float("inf"))
    flagged = fixed - shift < threshold
    if tl.max(flagged.to(tl.int32), axis=0) == 0:
        return

    scale_log2 = tl.load(scale_ptr) * LOG2_E
    USES_TARGET: tl.constexpr = TERMS[0][2] != ABSENT
    targets = own
    if OWN_IS_ROW:
        targets = target_columns(target_ptr, own, own_count, USES_TARGET)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, other_count, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        inside = (own < own_count)[:, None] & (other < other_count)[None, :]
        if OWN_IS_ROW:
            tests = pair_tests(own, other, self_offset, targets, ALONG_ROWS)
        else:
            targets_of_other = target_columns(target_ptr, other, other_count, USES_TARGET)
            tests = pair_tests(own, other, -self_offset, targets_of_other, ALONG_COLUMNS)

        # a mask that requires a test leaves nearly every tile without a pair
        needed = True
        for k in tl.static_range(len(tests)):
            if TERMS[0][k + 1] == REQUIRED:
                needed = needed & (tl.max(tl.max(tests[k].to(tl.int32), axis=1), axis=0) > 0)
        if needed:
            products = inner_products(
                own_ptr, other_ptr, own, other, own_count, other_count, d, stride_own, stride_other,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip
            logits = where_admitted(products * scale_log2, float("-inf"), inside, tests, TERMS, 0)
            new_largest = tl.maximum(largest, tl.max(logits, axis=1))
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
            largest = new_largest
    tl.store(lse_ptr + own, (tl.log2(total) + largest) * LN_2, mask=flagged & (own < own_count))
