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
from fastcl.backends.triton.kernels.tile import ABSENT, FORBIDDEN, LOG2_E, REQUIRED, self_columns, target_columns


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
def _positive_columns(target_ptr, rows, self_offset, n, m, SELF: tl.constexpr, TARGET: tl.constexpr):
    """The one pair that a mask which requires a test may admit, -1 where it admits none."""
    USES_TARGET: tl.constexpr = TARGET != 0
    targets = target_columns(target_ptr, rows, n, USES_TARGET)
    selves = self_columns(rows, self_offset, n, m)
    columns = targets
    if SELF == REQUIRED:
        columns = selves
    if (SELF == REQUIRED and TARGET == FORBIDDEN) or (SELF == FORBIDDEN and TARGET == REQUIRED):
        columns = tl.where(selves == targets, -1, columns)
    if SELF == REQUIRED and TARGET == REQUIRED:
        columns = tl.where(selves == targets, columns, -1)
    return columns


@triton.jit(do_not_specialize=["self_offset"])
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
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + rows, mask=there, other=0.0)
    ignored = weight == 0.0
    weight = weight * share

    difference = lse - positive
    smaller = tl.exp2(-tl.abs(difference) * LOG2_E)
    loss = weight * (tl.maximum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(smaller))
    tl.store(loss_ptr + rows, tl.where(ignored, 0.0, loss), mask=there)
    if positive_gradient_ptr is not None:
        gradient = weight * tl.where(difference < 0.0, smaller, 1.0) / (1.0 + smaller)
        tl.store(positive_gradient_ptr + rows, tl.where(ignored, 0.0, -gradient), mask=there)

    own_shift = tl.where(flagged_rows(lse, shift, threshold), lse, shift)
    larger = tl.maximum(lse, positive, propagate_nan=tl.PropagateNan.ALL)
    factor = weight * tl.exp2((own_shift - larger) * LOG2_E) / (1.0 + smaller)
    tl.store(factor_ptr + rows, tl.where(ignored | (lse == float("-inf")), 0.0, factor), mask=there)

    if SELF != ABSENT or TARGET != ABSENT:
        columns = _positive_columns(target_ptr, rows, self_offset, n, m, SELF, TARGET)
        at = panel_ptr + rows.to(tl.int64) * panel_stride + columns
        exists = there & (columns >= 0)
        entry = tl.load(at, mask=exists, other=0.0).to(tl.float32) - tl.exp2((lse - own_shift) * LOG2_E)
        tl.store(at, entry.to(panel_ptr.dtype.element_ty), mask=exists)
