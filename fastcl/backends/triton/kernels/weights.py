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
    ALONG_COLUMNS,
    ALONG_ROWS,
    LOG2_E,
    LSE,
    MAX,
    REQUIRED,
    SUM,
    admitted,
    any_between,
    inner_products,
    local_targets,
    spread,
)

# exp(c - L) would lose precision beyond; only statistics merged from other shards come near
_LARGEST_EXCESS = tl.constexpr(80.0)


@triton.jit
def _any_flagged(statistics_ptr, index, count, shift, threshold, TERMS: tl.constexpr):
    """Whether the fixed shift does not do for one of these rows or columns; L = -inf means W = 0 under any shift."""
    flagged = tl.zeros(index.shape, tl.int32)
    for t in tl.static_range(len(TERMS)):
        if TERMS[t][0] == LSE:
            lse = tl.load(statistics_ptr + t * count + index, mask=index < count, other=float("-inf"))
            excess = lse - shift
            flagged |= ((excess < threshold) & (lse > float("-inf")) | (excess > _LARGEST_EXCESS)).to(tl.int32)
    return tl.max(flagged, axis=0) > 0


@triton.jit
def _add_slopes(
    weights,
    logits_log2,
    exponentials,
    shift_log2,
    statistics_ptr,
    incoming_ptr,
    index,
    count,
    inside,
    is_self,
    is_target,
    TERMS: tl.constexpr,
    AXIS: tl.constexpr,
    APART: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what the terms along one axis contribute to a tile of W."""
    for t in tl.static_range(len(TERMS)):
        REDUCE: tl.constexpr = TERMS[t][0]
        SELF: tl.constexpr = TERMS[t][1]
        TARGET: tl.constexpr = TERMS[t][2]
        if REDUCE != MAX and (MASKED or (SELF != REQUIRED and TARGET != REQUIRED)):
            incoming = tl.load(incoming_ptr + t * count + index, mask=index < count, other=0.0)
            if REDUCE == LSE:
                lse = tl.load(statistics_ptr + t * count + index, mask=index < count, other=float("-inf"))
                lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
                if APART:
                    share = tl.exp2(logits_log2 - spread(lse, AXIS))
                else:
                    share = exponentials * spread(tl.exp2(shift_log2 - lse), AXIS)
                slopes = share * spread(incoming, AXIS)
            else:
                slopes = tl.broadcast_to(spread(incoming, AXIS), weights.shape)
            if MASKED:
                slopes = tl.where(admitted(inside, is_self, is_target, SELF, TARGET), slopes, 0.0)
            weights += slopes
    return weights


@triton.jit(do_not_specialize=["self_offset", "col0", "row_begin", "column_begin"])
def weights_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    shift_ptr,
    target_ptr,
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
    col0,
    threshold,
    row_begin,
    row_end,
    column_begin,
    column_end,
    ROW_TERMS: tl.constexpr,
    COLUMN_TERMS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MIRROR: tl.constexpr,
    USES_SELF: tl.constexpr,
    USES_TARGET: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (tiles of the panel,). The panel is [row_end - row_begin, column_end - column_begin], contiguous.

    Of a panel on a symmetric plan's diagonal (MIRROR) only the pairs i <= j are formed; each is written twice.
    """
    tiles_m = tl.cdiv(row_end - row_begin, BLOCK_M)
    tiles_n = tl.cdiv(column_end - column_begin, BLOCK_N)
    # bands of GROUP_M tiles: the programs in flight share rows of a and of b in L2
    band = tl.program_id(0) // (GROUP_M * tiles_n)
    band_height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = tl.program_id(0) - band * GROUP_M * tiles_n
    i0 = row_begin + (band * GROUP_M + within % band_height) * BLOCK_M
    j0 = column_begin + within // band_height * BLOCK_N
    if MIRROR:
        if j0 + BLOCK_N <= i0:
            return

    rows = i0 + tl.arange(0, BLOCK_M)
    columns = j0 + tl.arange(0, BLOCK_N)
    products = inner_products(
        a_ptr, b_ptr, rows, columns, n, m, d, stride_a, stride_b, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION
    )
    logits_log2 = products * (tl.load(scale_ptr) * LOG2_E)
    shift = tl.load(shift_ptr)
    shift_log2 = shift * LOG2_E

    i = rows[:, None]
    j = columns[None, :]
    inside = (i < n) & (j < m)
    is_self = j - i == self_offset
    row_targets = local_targets(target_ptr, rows, n, col0, m, USES_TARGET)
    row_is_target = j == row_targets[:, None]
    column_is_target = row_is_target
    special = False
    if USES_SELF:
        special = (self_offset > j0 - i0 - BLOCK_M) & (self_offset < j0 - i0 + BLOCK_N)
    if USES_TARGET:
        special = special | any_between(row_targets, j0, j0 + BLOCK_N)
        if SYMMETRIC:
            column_targets = local_targets(target_ptr, columns, m, col0, m, USES_TARGET)
            special = special | any_between(column_targets, i0, i0 + BLOCK_M)
            column_is_target = i == column_targets[None, :]

    apart = _any_flagged(row_statistics_ptr, rows, n, shift, threshold, ROW_TERMS)
    apart = apart | _any_flagged(column_statistics_ptr, columns, m, shift, threshold, COLUMN_TERMS)

    weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if apart:
        weights = _add_slopes(
            weights, logits_log2, None, shift_log2, row_statistics_ptr, row_incoming_ptr, rows, n,
            inside, is_self, row_is_target, ROW_TERMS, ALONG_ROWS, True, True,
        )  # fmt: skip
        weights = _add_slopes(
            weights, logits_log2, None, shift_log2, column_statistics_ptr, column_incoming_ptr, columns, m,
            inside, is_self, column_is_target, COLUMN_TERMS, ALONG_COLUMNS, True, True,
        )  # fmt: skip
    else:
        exponentials = tl.exp2(logits_log2 - shift_log2)
        if special:
            weights = _add_slopes(
                weights, None, exponentials, shift_log2, row_statistics_ptr, row_incoming_ptr, rows, n,
                inside, is_self, row_is_target, ROW_TERMS, ALONG_ROWS, False, True,
            )  # fmt: skip
            weights = _add_slopes(
                weights, None, exponentials, shift_log2, column_statistics_ptr, column_incoming_ptr, columns, m,
                inside, is_self, column_is_target, COLUMN_TERMS, ALONG_COLUMNS, False, True,
            )  # fmt: skip
        else:
            weights = _add_slopes(
                weights, None, exponentials, shift_log2, row_statistics_ptr, row_incoming_ptr, rows, n,
                None, None, None, ROW_TERMS, ALONG_ROWS, False, False,
            )  # fmt: skip
            weights = _add_slopes(
                weights, None, exponentials, shift_log2, column_statistics_ptr, column_incoming_ptr, columns, m,
                None, None, None, COLUMN_TERMS, ALONG_COLUMNS, False, False,
            )  # fmt: skip

    weights = (weights * tl.load(multiplier_ptr)).to(panel_ptr.dtype.element_ty)
    width = (column_end - column_begin).to(tl.int64)
    keep = (i < row_end) & (j < column_end)
    if MIRROR:
        keep = keep & (i <= j)
    tl.store(panel_ptr + (i - row_begin) * width + (j - column_begin), weights, mask=keep)
    if MIRROR:
        tl.store(panel_ptr + (j - column_begin) * width + (i - row_begin), weights, mask=keep & (i < j))
