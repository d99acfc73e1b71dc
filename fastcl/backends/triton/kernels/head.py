"""What a softmax loss makes of a panel's rows: their losses, the factors r of their rows of E, and the positive's E.

With a row's log-sum-exp L, its positive's logit p and the shift c of its E, the loss is w * softplus(L - p), the
derivative g = w * sigmoid(L - p), and the row of the gradient matrix W is r * E, where

    r = g * exp(c - L) = w / (exp(L - c) + exp(p - c))

stays in range though g need not: neither L nor p exceeds the bound that c was made from by much. The positive's own
share of W is -g, so exp(L - c) is taken from its entry of E.
"""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.exponentials import flagged_rows
from fastcl.backends.triton.kernels.tile import ABSENT, FORBIDDEN, LOG2_E, LSE, REQUIRED, self_columns, target_columns


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], as 2 * artanh(x / (2 + x)); precise for the smallest x, where log2(1 + x) is not."""
    s = x / (2.0 + x)
    square = s * s
    series = 1.0 / 17.0
    for k in tl.static_range(8):
        series = series * square + 1.0 / (15 - 2 * k)
    return 2.0 * s * series


@triton.jit
def _softplus(difference):
    """softplus(x), its derivative, and exp(-|x|)."""
    smaller = tl.exp2(-tl.abs(difference) * LOG2_E)
    value = tl.maximum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(smaller)
    return value, tl.where(difference < 0.0, smaller, 1.0) / (1.0 + smaller), smaller


@triton.jit
def _weights(weight_ptr, rows, n, share):
    """The rows' weights in the loss, and which of them are 0, for a row without weight has no say whatever is in it."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + rows, mask=rows < n, other=0.0)
    else:
        weight = tl.full(rows.shape, 1.0, tl.float32)
    return weight * share, weight == 0.0


@triton.jit
def loss_kernel(
    row_statistics_ptr,
    column_statistics_ptr,
    positive_ptr,
    weight_ptr,
    row_incoming_ptr,
    column_incoming_ptr,
    loss_ptr,
    positive_gradient_ptr,
    n,
    share,
    ROW_TERMS: tl.constexpr,
    COLUMN_TERMS: tl.constexpr,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of rows,). Losses from complete statistics, and the gradients that go into the backward.

    The positive's logit is row term POSITIVE, or positive_ptr where that is negative; positive_gradient_ptr and
    weight_ptr may be None.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < n
    weight, ignored = _weights(weight_ptr, rows, n, share)
    if POSITIVE >= 0:
        positive = tl.load(row_statistics_ptr + POSITIVE * n + rows, mask=there, other=0.0)
    else:
        positive = tl.load(positive_ptr + rows, mask=there, other=0.0)
    loss = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(len(ROW_TERMS)):
        if ROW_TERMS[t][0] == LSE:
            lse = tl.load(row_statistics_ptr + t * n + rows, mask=there, other=float("-inf"))
            value, slope, _ = _softplus(lse - positive)
            gradient = tl.where(ignored, 0.0, weight * slope)
            tl.store(row_incoming_ptr + t * n + rows, gradient, mask=there)
            loss += tl.where(ignored, 0.0, weight * value)
            total += gradient
        elif t != POSITIVE:
            tl.store(row_incoming_ptr + t * n + rows, tl.zeros((BLOCK,), tl.float32), mask=there)
    for t in tl.static_range(len(COLUMN_TERMS)):
        gradient = tl.zeros((BLOCK,), tl.float32)
        if COLUMN_TERMS[t][0] == LSE:
            lse = tl.load(column_statistics_ptr + t * n + rows, mask=there, other=float("-inf"))
            value, slope, _ = _softplus(lse - positive)
            gradient = tl.where(ignored, 0.0, weight * slope)
            loss += tl.where(ignored, 0.0, weight * value)
            total += gradient
        tl.store(column_incoming_ptr + t * n + rows, gradient, mask=there)
    if POSITIVE >= 0:
        tl.store(row_incoming_ptr + POSITIVE * n + rows, -total, mask=there)
    if positive_gradient_ptr is not None:
        tl.store(positive_gradient_ptr + rows, -total, mask=there)
    tl.store(loss_ptr + rows, loss, mask=there)


@triton.jit
def _positive_columns(target_ptr, rows, self_offset, first_column, n, m, SELF: tl.constexpr, TARGET: tl.constexpr):
    """The one pair that a mask which requires a test may admit, -1 where it admits none."""
    USES_TARGET: tl.constexpr = TARGET != 0
    targets = target_columns(target_ptr, rows, n, m, first_column, USES_TARGET)
    selves = self_columns(rows, self_offset, n, m)
    columns = targets
    if SELF == REQUIRED:
        columns = selves
    if (SELF == REQUIRED and TARGET == FORBIDDEN) or (SELF == FORBIDDEN and TARGET == REQUIRED):
        columns = tl.where(selves == targets, -1, columns)
    if SELF == REQUIRED and TARGET == REQUIRED:
        columns = tl.where(selves == targets, columns, -1)
    return columns


@triton.jit(do_not_specialize=["self_offset", "first_column"])
def head_kernel(
    lse_ptr,
    positive_ptr,
    weight_ptr,
    shift_ptr,
    target_ptr,
    panel_ptr,
    loss_ptr,
    factor_ptr,
    positive_gradient_ptr,
    n,
    m,
    self_offset,
    first_column,
    threshold,
    share,
    panel_stride,
    SELF: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of rows,). SELF and TARGET are the positive's mask, both ABSENT where it is no pair of S.

    ``share`` multiplies every row's weight; weight_ptr and positive_gradient_ptr may be None.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < n
    shift = tl.load(shift_ptr)
    lse = tl.load(lse_ptr + rows, mask=there, other=float("-inf"))
    positive = tl.load(positive_ptr + rows, mask=there, other=0.0)
    weight, ignored = _weights(weight_ptr, rows, n, share)
    value, slope, smaller = _softplus(lse - positive)
    tl.store(loss_ptr + rows, tl.where(ignored, 0.0, weight * value), mask=there)
    if positive_gradient_ptr is not None:
        tl.store(positive_gradient_ptr + rows, tl.where(ignored, 0.0, -weight * slope), mask=there)

    own_shift = tl.where(flagged_rows(lse, shift, threshold), lse, shift)
    larger = tl.maximum(lse, positive, propagate_nan=tl.PropagateNan.ALL)
    factor = weight * tl.exp2((own_shift - larger) * LOG2_E) / (1.0 + smaller)
    tl.store(factor_ptr + rows, tl.where(ignored | (lse == float("-inf")), 0.0, factor), mask=there)

    if SELF != ABSENT or TARGET != ABSENT:
        columns = _positive_columns(target_ptr, rows, self_offset, first_column, n, m, SELF, TARGET)
        at = panel_ptr + rows.to(tl.int64) * panel_stride + columns
        exists = there & (columns >= 0)
        entry = tl.load(at, mask=exists, other=0.0).to(tl.float32) - tl.exp2((lse - own_shift) * LOG2_E)
        tl.store(at, entry.to(panel_ptr.dtype.element_ty), mask=exists)
