"""A symmetric plan's backward without W in memory: each program owns rows of (W + W.T) @ A and keeps their sums.

A tile of W is made as in the weights kernel, from the same functions, and multiplied at once by the block of A that
made it, which is loaded once for both products. Nothing is shared between programs, and the order of the sums is fixed.
Masks take more registers than the sums leave: exceptional tiles are left out, remembered, and made up for at the end.
"""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.tile import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    LOG2_E,
    above_test,
    holds_exceptional,
    load_tags,
    pair_tests,
    tag_tests,
    target_columns,
)
from fastcl.backends.triton.kernels.weights import add_masked, add_plain, flagged

_GROUPS = tl.constexpr(63)


@triton.jit
def _load(a_ptr, rows, n, d, stride, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """Whole rows; an index over the edge repeats the last one."""
    k = tl.arange(0, BLOCK_D)
    at = a_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride + k[None, :]
    if EVEN_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(k < d)[None, :], other=0.0)


@triton.jit
def _is_rare(
    i0,
    j0,
    n,
    self_offset,
    target_ptr,
    first_column,
    row_targets,
    rows_flagged,
    statistics_ptr,
    shift,
    threshold,
    TERMS: tl.constexpr,
    USES_SELF: tl.constexpr,
    USES_TARGET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether a tile holds a pair that a mask treats apart, hangs over the edge, or has a flagged row or column."""
    columns = j0 + tl.arange(0, BLOCK_N)
    targets = target_columns(target_ptr, columns, n, n, first_column, USES_TARGET)
    rare_columns = flagged(statistics_ptr, columns, n, shift, threshold, TERMS)
    rare_columns = rare_columns | ((targets >= i0) & (targets < i0 + BLOCK_M))
    exceptional = holds_exceptional(
        i0, j0, n, n, self_offset, row_targets, row_targets, False, USES_SELF, USES_TARGET, BLOCK_M, BLOCK_N
    )
    return exceptional | rows_flagged | (tl.max(rare_columns.to(tl.int32), axis=0) > 0)


@triton.jit(do_not_specialize=["self_offset", "first_column"])
def registers_kernel(
    a_ptr,
    scale_ptr,
    shift_ptr,
    target_ptr,
    row_tags,
    statistics_ptr,
    incoming_ptr,
    multiplier_ptr,
    product_ptr,
    n,
    d,
    stride_a,
    self_offset,
    first_column,
    threshold,
    TERMS: tl.constexpr,
    USES_SELF: tl.constexpr,
    USES_TARGET: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (blocks of rows,). ``product`` is float32 and contiguous; BLOCK_D is at least d; tags are all None."""
    i0 = tl.program_id(0) * BLOCK_M
    rows = i0 + tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr)
    scale_log2 = scale * LOG2_E
    shift = tl.load(shift_ptr)
    shift_log2 = shift * LOG2_E
    multiplier = 1.0
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr)
    row_targets = target_columns(target_ptr, rows, n, n, first_column, USES_TARGET)
    rows_flagged = tl.max(flagged(statistics_ptr, rows, n, shift, threshold, TERMS).to(tl.int32), axis=0) > 0
    own = _load(a_ptr, rows, n, d, stride_a, BLOCK_D, EVEN_D)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # a bit for each group of tiles
    group_columns = tl.cdiv(tl.cdiv(n, BLOCK_N), _GROUPS) * BLOCK_N
    rare_groups = tl.full((), 0, tl.int64)
    for j0 in range(0, n, BLOCK_N):
        columns = j0 + tl.arange(0, BLOCK_N)
        others = _load(a_ptr, columns, n, d, stride_a, BLOCK_D, EVEN_D)
        products = tl.dot(own, tl.trans(others), input_precision=PRECISION)
        exponentials = tl.exp2(products * scale_log2 - shift_log2)
        weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        weights = add_plain(
            weights, exponentials, shift_log2, statistics_ptr, incoming_ptr, rows, n, (), TERMS, ALONG_ROWS
        )
        weights = add_plain(
            weights, exponentials, shift_log2, statistics_ptr, incoming_ptr, columns, n, (), TERMS, ALONG_COLUMNS
        )
        rare = _is_rare(
            i0, j0, n, self_offset, target_ptr, first_column, row_targets, rows_flagged, statistics_ptr, shift,
            threshold, TERMS, USES_SELF, USES_TARGET, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        weights = tl.where(rare, 0.0, weights * multiplier)
        rare_groups |= rare.to(tl.int64) << (j0 // group_columns)
        sums = tl.dot(weights.to(others.dtype), others, sums, input_precision=PRECISION)

    of_rows = load_tags(row_tags, rows, n)
    for group in range(0, _GROUPS):
        if (rare_groups >> group) & 1 != 0:
            for j0 in range(group * group_columns, tl.minimum((group + 1) * group_columns, n), BLOCK_N):
                if _is_rare(
                    i0, j0, n, self_offset, target_ptr, first_column, row_targets, rows_flagged, statistics_ptr, shift,
                    threshold, TERMS, USES_SELF, USES_TARGET, BLOCK_M, BLOCK_N,
                ):  # fmt: skip
                    for j in range(j0, tl.minimum(j0 + BLOCK_N, n), PIECE):
                        columns = j + tl.arange(0, PIECE)
                        others = _load(a_ptr, columns, n, d, stride_a, BLOCK_D, EVEN_D)
                        products = tl.dot(own, tl.trans(others), input_precision=PRECISION)
                        targets = target_columns(target_ptr, columns, n, n, first_column, USES_TARGET)
                        of_columns = load_tags(row_tags, columns, n)
                        of_tags = tag_tests(of_rows, of_columns, 0)
                        weights = tl.zeros((BLOCK_M, PIECE), tl.float32)
                        tests = pair_tests(rows, columns, self_offset, row_targets, ALONG_ROWS)
                        tests = tests + of_tags + above_test(products, scale, of_rows, ALONG_ROWS)
                        weights = add_masked(
                            weights, products * scale_log2, statistics_ptr, incoming_ptr, rows, n, tests, TERMS,
                            ALONG_ROWS,
                        )  # fmt: skip
                        tests = pair_tests(rows, columns, self_offset, targets, ALONG_COLUMNS)
                        tests = tests + of_tags + above_test(products, scale, of_columns, ALONG_COLUMNS)
                        weights = add_masked(
                            weights, products * scale_log2, statistics_ptr, incoming_ptr, columns, n, tests, TERMS,
                            ALONG_COLUMNS,
                        )  # fmt: skip
                        weights = tl.where((columns < n)[None, :], weights * multiplier, 0.0)
                        sums = tl.dot(weights.to(others.dtype), others, sums, input_precision=PRECISION)

    k = tl.arange(0, BLOCK_D)
    there = (rows < n)[:, None] & (k < d)[None, :]
    tl.store(product_ptr + rows.to(tl.int64)[:, None] * d + k[None, :], sums / multiplier, mask=there)
