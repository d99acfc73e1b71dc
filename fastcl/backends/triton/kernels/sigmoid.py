"""Every pair a yes-or-no question (fastcl/losses/sigmoid.py): a panel of W, and what its tiles come to, from one S.

No row has to be complete before its gradient is known, so that costs and W share the logits and one exponential each.
"""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.tile import (
    LOG2_E,
    banded_tile,
    holds_exceptional,
    inner_products,
    load_tags,
    tag_tests,
)


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1], by the polynomial of csrc/cpu/sigmoid_task.h: log2(1 + e) would lose a small e."""
    p = e * 5.232694093e-3 - 2.950523980e-2
    p = p * e + 7.822595537e-2
    p = p * e - 1.366324574e-1
    p = p * e + 1.910600662e-1
    p = p * e - 2.484298199e-1
    p = p * e + 3.331909776e-1
    p = p * e - 4.999949336e-1
    p = p * e + 9.999999404e-1
    return p * e


@triton.jit
def _ask(logits, yes, left_out, incoming, factors):
    """What a tile's pairs cost, and W. Each of the masks, and ``factors``, may be None: nothing, and all 1."""
    if yes is not None:
        logits = tl.where(yes, -logits, logits)
    if left_out is not None:
        logits = tl.where(left_out, float("-inf"), logits)
    e = tl.exp2(-tl.abs(logits) * LOG2_E)
    costs = tl.maximum(logits, 0.0) + log1p(e)
    slopes = tl.where(logits > 0.0, 1.0, e) / (1.0 + e)
    if factors is not None:
        shares = factors[:, None]
        if yes is not None:
            shares = tl.where(yes, 1.0, shares)
        costs *= shares
        slopes *= shares
    if yes is not None:
        slopes = tl.where(yes, -slopes, slopes)
    return costs, slopes * incoming[:, None]


@triton.jit(do_not_specialize=["row_begin", "column_begin"])
def sigmoid_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    offsets_ptr,
    factors_ptr,
    incoming_ptr,
    row0_ptr,
    row_tags,
    column_tags,
    multiplier_ptr,
    costs_ptr,
    row_sums_ptr,
    column_sums_ptr,
    panel_ptr,
    n,
    m,
    d,
    stride_a,
    stride_b,
    row_begin,
    row_end,
    column_begin,
    column_end,
    panel_stride,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (tiles of the panel,). What isn't wanted is None.

    The tiles of column c write slot c of the rows' costs and of their sums of W, [tiles, rows of the panel], those of
    row r slot r of the columns' sums of W: every slot is written, and once. The panel has room for whole tiles.
    """
    tiles_m = tl.cdiv(row_end - row_begin, BLOCK_M)
    tiles_n = tl.cdiv(column_end - column_begin, BLOCK_N)
    tile_m, tile_n = banded_tile(tiles_m, tiles_n, GROUP_M)
    i0 = row_begin + tile_m * BLOCK_M
    j0 = column_begin + tile_n * BLOCK_N
    rows = i0 + tl.arange(0, BLOCK_M)
    columns = j0 + tl.arange(0, BLOCK_N)
    products = inner_products(
        a_ptr, b_ptr, rows, columns, n, m, d, stride_a, stride_b, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION
    )
    shifts = tl.zeros((BLOCK_N,), tl.float32) + tl.load(bias_ptr)
    if offsets_ptr is not None:
        shifts -= tl.load(offsets_ptr + columns, mask=columns < m, other=0.0)
    logits = products * tl.load(scale_ptr) + shifts[None, :]
    incoming = tl.full((BLOCK_M,), 1.0, tl.float32)
    if incoming_ptr is not None:
        incoming = tl.load(incoming_ptr + rows, mask=rows < n, other=0.0)
    factors = None
    if factors_ptr is not None:
        factors = tl.load(factors_ptr + rows, mask=rows < n, other=0.0)
    own = 0
    if row0_ptr is not None:
        own = tl.load(row0_ptr).to(tl.int32)
    is_label, is_id = tag_tests(load_tags(row_tags, rows, n), load_tags(column_tags, columns, m), 0)

    yes, left_out = None, None
    if row_tags[0] is not None:
        yes = is_label
    if row_tags[1] is not None:
        left_out = is_id
        if row_tags[0] is not None:
            left_out = is_id & ~is_label
    if holds_exceptional(i0, j0, n, m, own, rows, rows, False, True, False, BLOCK_M, BLOCK_N):
        is_own = columns[None, :] - rows[:, None] == own
        matches = is_own
        if yes is not None:
            matches = is_own | yes
        outside = columns[None, :] >= tl.where(rows < n, m, 0)[:, None]
        nothing = outside
        if left_out is not None:
            nothing = outside | (left_out & ~is_own)
        costs, weights = _ask(logits, matches, nothing, incoming, factors)
    else:
        costs, weights = _ask(logits, yes, left_out, incoming, factors)

    in_rows = tile_n.to(tl.int64) * (row_end - row_begin) + rows - row_begin
    if costs_ptr is not None:
        tl.store(costs_ptr + in_rows, tl.sum(costs, axis=1), mask=rows < row_end)
    if row_sums_ptr is not None:
        tl.store(row_sums_ptr + in_rows, tl.sum(weights, axis=1), mask=rows < row_end)
    if column_sums_ptr is not None:
        in_columns = tile_m.to(tl.int64) * (column_end - column_begin) + columns - column_begin
        tl.store(column_sums_ptr + in_columns, tl.sum(weights, axis=0), mask=columns < column_end)
    if panel_ptr is not None:
        if multiplier_ptr is not None:
            weights *= tl.load(multiplier_ptr)
        corner = panel_ptr + (i0 - row_begin).to(tl.int64) * panel_stride + (j0 - column_begin)
        offsets = tl.arange(0, BLOCK_M)[:, None] * panel_stride + tl.arange(0, BLOCK_N)[None, :]
        tl.store(corner + offsets, weights.to(panel_ptr.dtype.element_ty))
