"""The one sweep of a softmax loss along rows: E = exp(S - shift) of a panel of whole rows, and what its rows come to.

E is 0 where the log-sum-exp's mask admits nothing. Once a row's log-sum-exp L is known, its gradient is a factor r of
the row of E and needs no second look at S. A row that the fixed shift may have hurt is flagged by its L, as in the
backward, and made again with L in the shift's place.
"""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.sweep import all_nothing, merge_tile
from fastcl.backends.triton.kernels.tile import (
    ABSENT,
    ALONG_ROWS,
    LOG2_E,
    LSE,
    above_test,
    banded_tile,
    holds_exceptional,
    inner_products,
    load_tags,
    pair_tests,
    tag_tests,
    target_columns,
    tile_products,
    where_admitted,
)


@triton.jit
def flagged_rows(lse, shift, threshold):
    """Rows of a final L that need a shift of their own; an empty row (L = -inf) has no E under any shift."""
    return (lse - shift < threshold) & (lse > float("-inf"))


@triton.jit
def _exponentials(products, scale, shift_log2, inside, tests, TERMS: tl.constexpr):
    """E of the plan's one log-sum-exp; the compiler sees that its sum needs the same numbers."""
    values = tl.exp2(products * (scale * LOG2_E) - shift_log2)
    for t in tl.static_range(len(TERMS)):
        if TERMS[t][0] == LSE:
            values = where_admitted(values, 0.0, inside, tests, TERMS, t)
    return values


@triton.jit(do_not_specialize=["self_offset", "first_column"])
def exponentials_kernel(
    a_ptr,
    b_ptr,
    a_tiles,
    b_tiles,
    scale_ptr,
    shift_ptr,
    target_ptr,
    row_tags,
    column_tags,
    partials_ptr,
    panel_ptr,
    n,
    m,
    d,
    stride_a,
    stride_b,
    self_offset,
    first_column,
    panel_stride,
    TERMS: tl.constexpr,
    USES_SELF: tl.constexpr,
    USES_TARGET: tl.constexpr,
    LABEL_WIDTH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (tiles of the panel,), whose rows are all of a. The tiles of column c write slot c of the partial results.

    The panel has room for whole tiles, so that no store into it needs a mask. Every slot is written, and once.
    """
    tiles_n = tl.cdiv(m, BLOCK_N)
    tile_m, tile_n = banded_tile(tl.cdiv(n, BLOCK_M), tiles_n, GROUP_M)
    i0 = tile_m * BLOCK_M
    j0 = tile_n * BLOCK_N
    rows = i0 + tl.arange(0, BLOCK_M)
    columns = j0 + tl.arange(0, BLOCK_N)
    products = tile_products(
        a_ptr, b_ptr, a_tiles, b_tiles, i0, j0, n, m, d, stride_a, stride_b,
        BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    shift_log2 = tl.load(shift_ptr) * LOG2_E

    row_targets = target_columns(target_ptr, rows, n, m, first_column, USES_TARGET)
    of_rows = load_tags(row_tags, rows, n)
    of_tags = tag_tests(of_rows, load_tags(column_tags, columns, m), LABEL_WIDTH)
    of_tags = of_tags + above_test(products, scale, of_rows, ALONG_ROWS)
    partials = all_nothing(BLOCK_M, TERMS)
    if holds_exceptional(
        i0, j0, n, m, self_offset, row_targets, row_targets, False, USES_SELF, USES_TARGET, BLOCK_M, BLOCK_N
    ):
        inside = columns[None, :] < tl.where(rows < n, m, 0)[:, None]
        tests = pair_tests(rows, columns, self_offset, row_targets, ALONG_ROWS) + of_tags
        exponentials = _exponentials(products, scale, shift_log2, inside, tests, TERMS)
        partials = merge_tile(partials, products, scale, shift_log2, inside, tests, TERMS, ALONG_ROWS, True)
    else:
        exponentials = _exponentials(products, scale, shift_log2, None, of_tags, TERMS)
        partials = merge_tile(partials, products, scale, shift_log2, None, of_tags, TERMS, ALONG_ROWS, False)

    for t in tl.static_range(len(TERMS)):
        tl.store(partials_ptr + tl.cast(t * tiles_n + tile_n, tl.int64) * n + rows, partials[t], mask=rows < n)
    corner = panel_ptr + i0.to(tl.int64) * panel_stride + j0
    offsets = tl.arange(0, BLOCK_M)[:, None] * panel_stride + tl.arange(0, BLOCK_N)[None, :]
    tl.store(corner + offsets, exponentials.to(panel_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["self_offset", "first_column"])
def repair_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    shift_ptr,
    target_ptr,
    row_tags,
    column_tags,
    lse_ptr,
    panel_ptr,
    n,
    m,
    d,
    stride_a,
    stride_b,
    self_offset,
    first_column,
    threshold,
    panel_stride,
    TERMS: tl.constexpr,
    LABEL_WIDTH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (blocks of rows, programs that share a block). Always launched; with nothing flagged it returns at once."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + rows, mask=rows < n, other=float("-inf"))
    flagged = flagged_rows(lse, tl.load(shift_ptr), threshold)
    if tl.max(flagged.to(tl.int32), axis=0) == 0:
        return

    scale = tl.load(scale_ptr)
    scale_log2 = scale * LOG2_E
    lse_log2 = tl.where(flagged, lse * LOG2_E, float("inf"))
    USES_TARGET: tl.constexpr = TERMS[0][2] != ABSENT
    targets = target_columns(target_ptr, rows, n, m, first_column, USES_TARGET)
    of_rows = load_tags(row_tags, rows, n)
    panel_rows = panel_ptr + rows.to(tl.int64)[:, None] * panel_stride
    for j0 in range(tl.program_id(1) * BLOCK_N, m, tl.num_programs(1) * BLOCK_N):
        columns = j0 + tl.arange(0, BLOCK_N)
        products = inner_products(
            a_ptr, b_ptr, rows, columns, n, m, d, stride_a, stride_b, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION
        )
        tests = pair_tests(rows, columns, self_offset, targets, ALONG_ROWS)
        tests = tests + tag_tests(of_rows, load_tags(column_tags, columns, m), LABEL_WIDTH)
        tests = tests + above_test(products, scale, of_rows, ALONG_ROWS)
        values = tl.exp2(products * scale_log2 - lse_log2[:, None])
        values = where_admitted(values, 0.0, None, tests, TERMS, 0)
        there = flagged[:, None] & (columns < m)[None, :]
        tl.store(panel_rows + columns[None, :], values.to(panel_ptr.dtype.element_ty), mask=there)
