"""Recomputes with a running maximum each log-sum-exp that the fixed shift may have hurt (see fastcl.backends.shift).

Nobody has to ask the device whether it is needed: a block with nothing flagged passes at once. A sum of 0 is flagged
too, because it does not tell an empty row from one that underflowed.
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
    above_test,
    inner_products,
    load_tags,
    pair_tests,
    tag_tests,
    target_columns,
    where_admitted,
)


@triton.jit
def _any(test):
    return tl.max(tl.max(test.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def redone(
    fixed,
    own_ptr,
    other_ptr,
    scale_ptr,
    shift,
    target_ptr,
    own_tags_ptrs,
    other_tags_ptrs,
    own,
    own_count,
    other_count,
    d,
    stride_own,
    stride_other,
    self_offset,
    first_column,
    threshold,
    OWN_IS_ROW: tl.constexpr,
    TERMS: tl.constexpr,
    T: tl.constexpr,
    LABEL_WIDTH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The log-sum-exps of the own side, rows of S or its columns, in place of those ``fixed`` that are flagged."""
    flagged = (fixed - shift < threshold) & (own < own_count)
    if tl.max(flagged.to(tl.int32), axis=0) > 0:
        scale = tl.load(scale_ptr)
        scale_log2 = scale * LOG2_E
        own_tags = load_tags(own_tags_ptrs, own, own_count)
        USES_TARGET: tl.constexpr = TERMS[T][2] != ABSENT
        targets = own
        if OWN_IS_ROW:
            targets = target_columns(target_ptr, own, own_count, other_count, first_column, USES_TARGET)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, other_count, BLOCK_N):
            other = start + tl.arange(0, BLOCK_N)
            inside = (own < own_count)[:, None] & (other < other_count)[None, :]
            if OWN_IS_ROW:
                of_pairs = pair_tests(own, other, self_offset, targets, ALONG_ROWS)
            else:
                targets_of_other = target_columns(target_ptr, other, other_count, own_count, first_column, USES_TARGET)
                of_pairs = pair_tests(own, other, -self_offset, targets_of_other, ALONG_COLUMNS)
            of_tags = tag_tests(own_tags, load_tags(other_tags_ptrs, other, other_count), LABEL_WIDTH)

            # a mask that requires a test leaves nearly every tile without a pair, and an empty row all of them
            needed = True
            for k in tl.static_range(len(of_pairs)):
                if TERMS[T][k + 1] == REQUIRED:
                    needed = needed & _any(of_pairs[k])
            for k in tl.static_range(len(of_tags)):
                if TERMS[T][len(of_pairs) + k + 1] == REQUIRED:
                    needed = needed & _any(of_tags[k] & flagged[:, None])
            if needed:
                products = inner_products(
                    own_ptr, other_ptr, own, other, own_count, other_count, d, stride_own, stride_other,
                    BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
                )  # fmt: skip
                tests = of_pairs + of_tags + above_test(products, scale, own_tags, ALONG_ROWS)
                logits = where_admitted(products * scale_log2, float("-inf"), inside, tests, TERMS, T)
                new_largest = tl.maximum(largest, tl.max(logits, axis=1))
                base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
                total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
                largest = new_largest
        fixed = tl.where(flagged, (tl.log2(total) + largest) * LN_2, fixed)
    return fixed
