"""The forward sweep: every term's partial results for one super-tile of S.

S is cut into super-tiles, at most 32 in a row or column and chosen from its shape alone. One program walks super-tile
(r, c) in a fixed order and is the only writer of slot c for the rows of r and of slot r for the columns of c, so no
atomics are needed and the bits do not depend on scheduling. A symmetric plan walks only r <= c and, in there, only
tiles on and above the diagonal, which must be square: pair (i, j) of one above serves row i as it stands and row j as
(j, i), whose mask is evaluated by itself because a target need not be an involution; one on the diagonal serves its
rows only.
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
    any_between,
    inner_products,
    self_columns,
    target_columns,
    where_admitted,
)


@triton.jit
def merge(x, y, REDUCE: tl.constexpr):
    """Two partial results of one term."""
    if REDUCE == MAX:
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    else:
        return x + y


@triton.jit
def largest(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _merge_all(xs, ys, TERMS: tl.constexpr):
    merged = ()
    for t in tl.static_range(len(TERMS)):
        merged = merged + (merge(xs[t], ys[t], TERMS[t][0]),)
    return merged


@triton.jit
def nothing(BLOCK: tl.constexpr, REDUCE: tl.constexpr):
    """The partial result of no pairs."""
    if REDUCE == MAX:
        return tl.full((BLOCK,), float("-inf"), tl.float32)
    else:
        return tl.zeros((BLOCK,), tl.float32)


@triton.jit
def _all_nothing(BLOCK: tl.constexpr, TERMS: tl.constexpr):
    partials = ()
    for t in tl.static_range(len(TERMS)):
        partials = partials + (nothing(BLOCK, TERMS[t][0]),)
    return partials


@triton.jit
def _reduce_term(
    products,
    scale,
    shift_log2,
    inside,
    is_self,
    is_target,
    REDUCE: tl.constexpr,
    SELF: tl.constexpr,
    TARGET: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One term's partial result over a tile; a sum is left unscaled."""
    if (SELF == REQUIRED or TARGET == REQUIRED) and not MASKED:
        return nothing(BLOCK, REDUCE)
    else:
        if REDUCE == LSE:
            # terms with the same logits share this, too: the compiler sees equal expressions
            values = tl.exp2(products * (scale * LOG2_E) - shift_log2)
        elif REDUCE == SUM:
            values = products
        else:
            values = products * scale
        if MASKED:
            if REDUCE == MAX:
                values = where_admitted(values, float("-inf"), inside, is_self, is_target, SELF, TARGET)
            else:
                values = where_admitted(values, 0.0, inside, is_self, is_target, SELF, TARGET)
        if REDUCE == MAX:
            return tl.reduce(values, AXIS, largest)
        else:
            return tl.sum(values, axis=AXIS)


@triton.jit
def reduce_tile(
    products,
    scale,
    shift_log2,
    inside,
    is_self,
    is_target,
    TERMS: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Every term's partial result over a tile; only an exceptional tile needs to be MASKED."""
    partials = ()
    for t in tl.static_range(len(TERMS)):
        partial = _reduce_term(
            products, scale, shift_log2, inside, is_self, is_target,
            TERMS[t][0], TERMS[t][1], TERMS[t][2], AXIS, BLOCK, MASKED,
        )  # fmt: skip
        partials = partials + (partial,)
    return partials


@triton.jit
def _accumulate(partials_ptr, partials, index, count, slots, slot, TERMS: tl.constexpr):
    """Adds to this program's own slot; the barrier orders it before the next read of the same numbers."""
    for t in tl.static_range(len(TERMS)):
        at = partials_ptr + tl.cast(t * slots + slot, tl.int64) * count + index
        so_far = tl.load(at, mask=index < count, other=0.0)
        tl.store(at, merge(so_far, partials[t], TERMS[t][0]), mask=index < count)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["self_offset"])
def sweep_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    shift_ptr,
    target_ptr,
    row_partials_ptr,
    column_partials_ptr,
    n,
    m,
    d,
    stride_a,
    stride_b,
    self_offset,
    super_rows,
    super_columns,
    ROW_TERMS: tl.constexpr,
    COLUMN_TERMS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    USES_SELF: tl.constexpr,
    USES_TARGET: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (super-tiles in a column, super-tiles in a row). Partials [terms, slots, count] start at zero or -inf."""
    r = tl.program_id(0)
    c = tl.program_id(1)
    if SYMMETRIC:
        if c < r:
            return
    scale = tl.load(scale_ptr)
    shift_log2 = tl.load(shift_ptr) * LOG2_E
    row_end = tl.minimum((r + 1) * super_rows, n)
    column_begin = c * super_columns
    column_end = tl.minimum(column_begin + super_columns, m)

    for i0 in range(r * super_rows, row_end, BLOCK_M):
        rows = i0 + tl.arange(0, BLOCK_M)
        row_targets = target_columns(target_ptr, rows, n, USES_TARGET)
        row_partials = _all_nothing(BLOCK_M, ROW_TERMS)
        first_column = column_begin
        if SYMMETRIC:
            first_column = tl.maximum(column_begin, i0)

        for j0 in range(first_column, column_end, BLOCK_N):
            columns = j0 + tl.arange(0, BLOCK_N)
            products = inner_products(
                a_ptr, b_ptr, rows, columns, n, m, d, stride_a, stride_b,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip

            special = (i0 + BLOCK_M > n) | (j0 + BLOCK_N > m)
            if SYMMETRIC:
                special = special | (i0 == j0)
            if USES_SELF:
                special = special | ((self_offset > j0 - i0 - BLOCK_M) & (self_offset < j0 - i0 + BLOCK_N))
            column_targets = columns
            if USES_TARGET:
                special = special | any_between(row_targets, j0, j0 + BLOCK_N)
                if SYMMETRIC:
                    column_targets = target_columns(target_ptr, columns, m, USES_TARGET)
                    special = special | any_between(column_targets, i0, i0 + BLOCK_M)

            if special:
                i = rows[:, None]
                j = columns[None, :]
                # one comparison a pair: rows and columns over the edge get an empty range
                row_pairs = j < tl.where(rows < n, m, 0)[:, None]
                column_pairs = i < tl.where(columns < m, n, 0)[None, :]
                is_self = j == self_columns(rows, self_offset, n, m)[:, None]
                is_target = j == row_targets[:, None]
                column_is_self = is_self
                column_is_target = is_target
                if SYMMETRIC:
                    # nothing on the diagonal is mirrored, so no self pair is
                    above = i0 < j0
                    column_pairs = i < tl.where((columns < m) & above, n, 0)[None, :]
                    column_is_self = tl.zeros((1, 1), tl.int1)
                    column_is_target = i == tl.where(above, column_targets, -1)[None, :]
                of_rows = reduce_tile(
                    products, scale, shift_log2, row_pairs, is_self, is_target,
                    ROW_TERMS, ALONG_ROWS, BLOCK_M, True,
                )  # fmt: skip
                of_columns = reduce_tile(
                    products, scale, shift_log2, column_pairs, column_is_self, column_is_target,
                    COLUMN_TERMS, ALONG_COLUMNS, BLOCK_N, True,
                )  # fmt: skip
            else:
                of_rows = reduce_tile(
                    products, scale, shift_log2, None, None, None, ROW_TERMS, ALONG_ROWS, BLOCK_M, False
                )
                of_columns = reduce_tile(
                    products, scale, shift_log2, None, None, None, COLUMN_TERMS, ALONG_COLUMNS, BLOCK_N, False
                )

            row_partials = _merge_all(row_partials, of_rows, ROW_TERMS)
            if len(COLUMN_TERMS) > 0:
                _accumulate(column_partials_ptr, of_columns, columns, m, tl.num_programs(0), r, COLUMN_TERMS)
        if len(ROW_TERMS) > 0:
            _accumulate(row_partials_ptr, row_partials, rows, n, tl.num_programs(1), c, ROW_TERMS)
