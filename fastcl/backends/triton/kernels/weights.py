"""The backward's only kernel: one panel of the gradient matrix W, from a recomputed tile of S at a time.

W[i, j] is the sum over terms of (incoming gradient) * (slope of the term at S[i, j]). Library GEMMs multiply the panel
afterwards. With L a row's or column's log-sum-exp, the slope is exp(S - L); as exp(S - c) * exp(c - L) it costs one
exponential a pair for all terms together, which is right unless the row or column is flagged (fastcl.backends.shift): a
tile with a flagged one takes each exponential apart. The incoming gradient is multiplied last, for the two factors may
lie at opposite ends of float32.
"""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.tile import (
    ABSENT,
    ALONG_COLUMNS,
    ALONG_ROWS,
    LOG2_E,
    LSE,
    MAX,
    above_test,
    holds_exceptional,
    inner_products,
    load_tags,
    numbered_tile,
    own_numbers,
    pair_tests,
    requires_a_pair,
    spread,
    tag_tests,
    target_columns,
    tile_products,
    where_admitted,
)

# exp(c - L) would lose precision beyond; only statistics merged from other shards come near
_LARGEST_EXCESS = tl.constexpr(80.0)


@triton.jit
def flagged(statistics_ptr, index, count, shift, threshold, TERMS: tl.constexpr):
    """For which of these rows or columns the fixed shift does not do; L = -inf means W = 0 under any shift."""
    found = index < 0
    for t in tl.static_range(len(TERMS)):
        if TERMS[t][0] == LSE:
            lse = tl.load(statistics_ptr + t * count + index, mask=index < count, other=float("-inf"))
            excess = lse - shift
            found = found | ((excess < threshold) & (lse > float("-inf"))) | (excess > _LARGEST_EXCESS)
    return found


@triton.jit
def _any_flagged(statistics_ptr, index, count, shift, threshold, TERMS: tl.constexpr):
    return tl.max(flagged(statistics_ptr, index, count, shift, threshold, TERMS).to(tl.int32), axis=0) > 0


@triton.jit
def _lse_log2(statistics_ptr, index, count):
    """Log-sum-exps in base 2, with +inf in place of an empty row's -inf so that its slopes come out as 0."""
    lse = tl.load(statistics_ptr + index, mask=index < count, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def _at_most_one(slopes, TERMS: tl.constexpr, T: tl.constexpr):
    """A slope is a probability, unless rounding moved a pair over a threshold since the forward: it isn't in L then."""
    if TERMS[T][5] != ABSENT:
        slopes = tl.minimum(slopes, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return slopes


@triton.jit
def add_masked(
    weights,
    logits_log2,
    statistics_ptr,
    incoming_ptr,
    index,
    count,
    tests,
    TERMS: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Adds what the terms along one axis contribute to a tile, whatever is in it."""
    for t in tl.static_range(len(TERMS)):
        if TERMS[t][0] != MAX:
            slopes = spread(tl.load(incoming_ptr + t * count + index, mask=index < count, other=0.0), AXIS)
            if TERMS[t][0] == LSE:
                lse_log2 = spread(_lse_log2(statistics_ptr + t * count, index, count), AXIS)
                slopes = _at_most_one(tl.exp2(logits_log2 - lse_log2), TERMS, t) * slopes
            weights += where_admitted(slopes, 0.0, None, tests, TERMS, t)
    return weights


@triton.jit
def add_plain(
    weights,
    exponentials,
    shift_log2,
    statistics_ptr,
    incoming_ptr,
    index,
    count,
    tests,
    TERMS: tl.constexpr,
    AXIS: tl.constexpr,
):
    """The same for a tile with no exceptional pair and nothing flagged, where all terms share one exponential."""
    for t in tl.static_range(len(TERMS)):
        if TERMS[t][0] != MAX and not requires_a_pair(TERMS, t):
            incoming = spread(tl.load(incoming_ptr + t * count + index, mask=index < count, other=0.0), AXIS)
            if TERMS[t][0] == LSE:
                lse_log2 = _lse_log2(statistics_ptr + t * count, index, count)
                slopes = _at_most_one(exponentials * spread(tl.exp2(shift_log2 - lse_log2), AXIS), TERMS, t)
                weights += where_admitted(slopes * incoming, 0.0, None, tests, TERMS, t)
            else:
                weights += where_admitted(incoming, 0.0, None, tests, TERMS, t)
    return weights


@triton.jit
def _masked_weights(
    a_ptr,
    b_ptr,
    scale,
    scale_log2,
    target_ptr,
    row_tags_ptrs,
    column_tags_ptrs,
    row_statistics_ptr,
    column_statistics_ptr,
    row_incoming_ptr,
    column_incoming_ptr,
    i0,
    j0,
    n,
    m,
    d,
    stride_a,
    stride_b,
    self_offset,
    first_column,
    ROW_TERMS: tl.constexpr,
    COLUMN_TERMS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    USES_TARGET: tl.constexpr,
    LABEL_WIDTH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A small square of W, whatever is in it."""
    rows = i0 + tl.arange(0, PIECE)
    columns = j0 + tl.arange(0, PIECE)
    products = inner_products(
        a_ptr, b_ptr, rows, columns, n, m, d, stride_a, stride_b, PIECE, PIECE, BLOCK_D, EVEN_D, PRECISION
    )
    row_tags = load_tags(row_tags_ptrs, rows, n)
    column_tags = load_tags(column_tags_ptrs, columns, m)
    of_tags = tag_tests(row_tags, column_tags, LABEL_WIDTH)
    row_targets = target_columns(target_ptr, rows, n, m, first_column, USES_TARGET)
    of_pairs = pair_tests(rows, columns, self_offset, row_targets, ALONG_ROWS)
    logits_log2 = products * scale_log2
    weights = tl.zeros((PIECE, PIECE), tl.float32)
    weights = add_masked(
        weights, logits_log2, row_statistics_ptr, row_incoming_ptr, rows, n,
        of_pairs + of_tags + above_test(products, scale, row_tags, ALONG_ROWS), ROW_TERMS, ALONG_ROWS,
    )  # fmt: skip
    if SYMMETRIC:
        column_targets = target_columns(target_ptr, columns, m, n, first_column, USES_TARGET)
        of_pairs = pair_tests(rows, columns, self_offset, column_targets, ALONG_COLUMNS)
    weights = add_masked(
        weights, logits_log2, column_statistics_ptr, column_incoming_ptr, columns, m,
        of_pairs + of_tags + above_test(products, scale, column_tags, ALONG_COLUMNS), COLUMN_TERMS, ALONG_COLUMNS,
    )  # fmt: skip
    return weights


@triton.jit
def _store(
    panel_ptr, panel_stride, weights, i, j, mirrored, multiplier_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Writes a tile to row i and column j of the panel, and if ``mirrored`` transposed to row j and column i."""
    if multiplier_ptr is not None:
        weights *= tl.load(multiplier_ptr)
    weights = weights.to(panel_ptr.dtype.element_ty)
    in_tile_m = tl.arange(0, BLOCK_M)
    in_tile_n = tl.arange(0, BLOCK_N)
    corner = panel_ptr + i.to(tl.int64) * panel_stride + j
    tl.store(corner + in_tile_m[:, None] * panel_stride + in_tile_n[None, :], weights)
    if mirrored:
        corner = panel_ptr + j.to(tl.int64) * panel_stride + i
        tl.store(corner + in_tile_n[None, :] * panel_stride + in_tile_m[:, None], weights)


@triton.jit(do_not_specialize=["self_offset", "first_column", "row_begin", "column_begin"])
def weights_kernel(
    a_ptr,
    b_ptr,
    a_tiles,
    b_tiles,
    scale_ptr,
    shift_ptr,
    target_ptr,
    row_tags,
    column_tags,
    row_statistics_ptr,
    column_statistics_ptr,
    row_incoming_ptr,
    column_incoming_ptr,
    multiplier_ptr,
    panel_ptr,
    n,
    m,
    d,
    stride_a,
    stride_b,
    self_offset,
    first_column,
    threshold,
    row_begin,
    row_end,
    column_begin,
    column_end,
    panel_stride,
    ROW_TERMS: tl.constexpr,
    COLUMN_TERMS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MIRROR: tl.constexpr,
    USES_SELF: tl.constexpr,
    USES_TARGET: tl.constexpr,
    LABEL_WIDTH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Grid: (tiles of the panel,), or fewer programs where they persist.

    The panel has room for whole tiles, so that no store needs a mask.
    Of a panel on a symmetric plan's diagonal (MIRROR) only tiles on and above the diagonal are formed, which must be
    square; those above are written a second time, transposed.
    """
    tiles_m = tl.cdiv(row_end - row_begin, BLOCK_M)
    tiles_n = tl.cdiv(column_end - column_begin, BLOCK_N)
    first, end, step = own_numbers(tiles_m * tiles_n, PERSISTENT)
    # what a tile needs and the next one needs again must not stay in registers
    for number in tl.range(first, end, step, disable_licm=True):
        tile_m, tile_n = numbered_tile(number, tiles_m, tiles_n, GROUP_M)
        i0 = row_begin + tile_m * BLOCK_M
        j0 = column_begin + tile_n * BLOCK_N
        if not MIRROR or j0 >= i0:
            rows = i0 + tl.arange(0, BLOCK_M)
            columns = j0 + tl.arange(0, BLOCK_N)
            scale = tl.load(scale_ptr)
            scale_log2 = scale * LOG2_E
            shift = tl.load(shift_ptr)
            row_targets = target_columns(target_ptr, rows, n, m, first_column, USES_TARGET)
            column_targets = columns
            if SYMMETRIC:
                column_targets = target_columns(target_ptr, columns, m, n, first_column, USES_TARGET)
            rare = holds_exceptional(
                i0, j0, n, m, self_offset, row_targets, column_targets,
                SYMMETRIC, USES_SELF, USES_TARGET, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            rare = rare | _any_flagged(row_statistics_ptr, rows, n, shift, threshold, ROW_TERMS)
            rare = rare | _any_flagged(column_statistics_ptr, columns, m, shift, threshold, COLUMN_TERMS)
            if rare:
                for i in range(i0, tl.minimum(i0 + BLOCK_M, row_end), PIECE):
                    first_piece = j0
                    if MIRROR:
                        first_piece = tl.maximum(j0, i)
                    for j in range(first_piece, tl.minimum(j0 + BLOCK_N, column_end), PIECE):
                        weights = _masked_weights(
                            a_ptr, b_ptr, scale, scale_log2, target_ptr, row_tags, column_tags,
                            row_statistics_ptr, column_statistics_ptr, row_incoming_ptr, column_incoming_ptr,
                            i, j, n, m, d, stride_a, stride_b, self_offset, first_column,
                            ROW_TERMS, COLUMN_TERMS, SYMMETRIC, USES_TARGET, LABEL_WIDTH,
                            EVEN_D, PRECISION, PIECE, BLOCK_D,
                        )  # fmt: skip
                        _store(
                            panel_ptr, panel_stride, weights, i - row_begin, j - column_begin, MIRROR and i < j,
                            multiplier_ptr, PIECE, PIECE,
                        )  # fmt: skip
            else:
                products = tile_products(
                    a_ptr, b_ptr, a_tiles, b_tiles, i0, j0, n, m, d, stride_a, stride_b,
                    BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
                )  # fmt: skip
                shift_log2 = shift * LOG2_E
                exponentials = tl.exp2(products * scale_log2 - shift_log2)
                of_rows = load_tags(row_tags, rows, n)
                of_columns = load_tags(column_tags, columns, m)
                of_tags = tag_tests(of_rows, of_columns, LABEL_WIDTH)
                weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                weights = add_plain(
                    weights, exponentials, shift_log2, row_statistics_ptr, row_incoming_ptr, rows, n,
                    of_tags + above_test(products, scale, of_rows, ALONG_ROWS), ROW_TERMS, ALONG_ROWS,
                )  # fmt: skip
                weights = add_plain(
                    weights, exponentials, shift_log2, column_statistics_ptr, column_incoming_ptr, columns, m,
                    of_tags + above_test(products, scale, of_columns, ALONG_COLUMNS), COLUMN_TERMS, ALONG_COLUMNS,
                )  # fmt: skip
                _store(
                    panel_ptr,
                    panel_stride,
                    weights,
                    i0 - row_begin,
                    j0 - column_begin,
                    MIRROR,
                    multiplier_ptr,
                    BLOCK_M,
                    BLOCK_N,
                )
