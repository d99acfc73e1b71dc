"""A panel function: what each tile of S makes of its rows, and a panel of W, by a function of tiles that is given.

These are in ``pair_functions.py``. No row sum, gradient or parameter is known to the kernel itself.
"""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.tile import (
    banded_tile,
    inner_products,
    load_tags,
    self_columns,
    tag_tests,
)


@triton.jit
def _load_all(pointers, index, count, other):
    """A number for each row or column from each of the pointers."""
    return [tl.load(pointer + index, mask=index < count, other=other) for pointer in pointers]


@triton.jit
def _store_all(slots_ptr, vectors, slot, slots, index, begin, end):
    """The k-th vector into slot [k, slot] of [vectors, slots, end - begin]."""
    for k in tl.static_range(len(vectors)):
        start = (k * slots + slot).to(tl.int64) * (end - begin) - begin
        tl.store(slots_ptr + start + index, vectors[k], mask=index < end)


@triton.jit(do_not_specialize=["row_begin", "column_begin"])
def panel_function_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    guide_a_ptr,
    guide_b_ptr,
    guide_scale_ptr,
    row_vectors,
    column_vectors,
    found_vectors,
    incoming_vectors,
    numbers,
    row0_ptr,
    row_tags,
    column_tags,
    multiplier_ptr,
    values_ptr,
    row_sums_ptr,
    column_sums_ptr,
    panel_ptr,
    n,
    m,
    d,
    guide_d,
    stride_a,
    stride_b,
    guide_stride_a,
    guide_stride_b,
    row_begin,
    row_end,
    column_begin,
    column_end,
    panel_stride,
    FUNCTION: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_GUIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (tiles of the panel,). What isn't wanted is None, and what only that needs is not computed.

    ``FUNCTION`` makes vectors over the rows of a tile, W, and vectors over its rows and columns that are summed with
    those of W. The tiles of column c write slot c of those over rows, [vectors, tiles, rows of the panel], those of
    row r slot r of those over columns: every slot is written, and once. The panel has room for whole tiles.
    """
    tiles_m = tl.cdiv(row_end - row_begin, BLOCK_M)
    tiles_n = tl.cdiv(column_end - column_begin, BLOCK_N)
    tile_m, tile_n = banded_tile(tiles_m, tiles_n, GROUP_M)
    i0 = row_begin + tile_m * BLOCK_M
    j0 = column_begin + tile_n * BLOCK_N
    rows = i0 + tl.arange(0, BLOCK_M)
    columns = j0 + tl.arange(0, BLOCK_N)
    guide = None
    if guide_a_ptr is not None:
        guide = inner_products(
            guide_a_ptr, guide_b_ptr, rows, columns, n, m, guide_d, guide_stride_a, guide_stride_b,
            BLOCK_M, BLOCK_N, BLOCK_D, EVEN_GUIDE, GUIDE_PRECISION,
        )  # fmt: skip
        guide *= tl.load(guide_scale_ptr)
    products = inner_products(
        a_ptr, b_ptr, rows, columns, n, m, d, stride_a, stride_b, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION
    )
    s = products * tl.load(scale_ptr) + tl.load(bias_ptr)

    row0 = tl.zeros((), tl.int64)
    if row0_ptr is not None:
        row0 = tl.load(row0_ptr).to(tl.int64)
    own = self_columns(rows, row0, n, m).to(tl.int32)
    is_label, is_id = tag_tests(load_tags(row_tags, rows, n), load_tags(column_tags, columns, m), 0)
    pairs = (columns[None, :] == own[:, None], is_label, (columns < m)[None, :], columns)
    if row_tags[1] is not None:
        pairs = pairs + (is_id,)

    incoming = [tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)]
    if incoming_vectors is not None:
        incoming = _load_all(incoming_vectors, rows, n, 0.0)
    values, weights, more = FUNCTION(
        s,
        guide,
        pairs,
        _load_all(row_vectors, rows, n, 0.0),
        _load_all(column_vectors, columns, m, 0.0),
        # Beside an infinite log-sum-exp or count nothing counts: a row over the edge makes no weights.
        _load_all(found_vectors, rows, n, float("inf")),
        incoming,
        numbers,
    )

    if values_ptr is not None:
        _store_all(values_ptr, values, tile_n, tiles_n, rows, row_begin, row_end)
    if row_sums_ptr is not None:
        sums = (tl.sum(weights, axis=1),) + more[:1]
        _store_all(row_sums_ptr, sums, tile_n, tiles_n, rows, row_begin, row_end)
    if column_sums_ptr is not None:
        sums = (tl.sum(weights, axis=0),) + more[1:]
        _store_all(column_sums_ptr, sums, tile_m, tiles_m, columns, column_begin, column_end)
    if panel_ptr is not None:
        if multiplier_ptr is not None:
            weights *= tl.load(multiplier_ptr)
        corner = panel_ptr + (i0 - row_begin).to(tl.int64) * panel_stride + (j0 - column_begin)
        offsets = tl.arange(0, BLOCK_M)[:, None] * panel_stride + tl.arange(0, BLOCK_N)[None, :]
        tl.store(corner + offsets, weights.to(panel_ptr.dtype.element_ty))
