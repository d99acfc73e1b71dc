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
    SUM,
    above_test,
    holds_exceptional,
    inner_products,
    load_tags,
    own_numbers,
    pair_tests,
    requires_a_pair,
    tag_tests,
    target_columns,
    tile_products,
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
def nothing(BLOCK: tl.constexpr, REDUCE: tl.constexpr):
    """The partial result of no pairs."""
    if REDUCE == MAX:
        return tl.full((BLOCK,), float("-inf"), tl.float32)
    else:
        return tl.zeros((BLOCK,), tl.float32)


@triton.jit
def all_nothing(BLOCK: tl.constexpr, TERMS: tl.constexpr):
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
    tests,
    TERMS: tl.constexpr,
    T: tl.constexpr,
    AXIS: tl.constexpr,
):
    """One term's partial result over a tile; a sum is left unscaled."""
    REDUCE: tl.constexpr = TERMS[T][0]
    if REDUCE == LSE:
        # terms with the same logits share this, too: the compiler sees equal expressions
        values = tl.exp2(products * (scale * LOG2_E) - shift_log2)
    elif REDUCE == SUM:
        values = products
    else:
        values = products * scale
    if REDUCE == MAX:
        return tl.reduce(where_admitted(values, float("-inf"), inside, tests, TERMS, T), AXIS, largest)
    else:
        return tl.sum(where_admitted(values, 0.0, inside, tests, TERMS, T), axis=AXIS)


@triton.constexpr_function
def has_part(terms, t, masked):
    """Whether a tile can add to term t: one that is not exceptional has no self pair and no target."""
    return masked or not requires_a_pair(terms, t)


@triton.jit
def merge_tile(
    partials,
    products,
    scale,
    shift_log2,
    inside,
    tests,
    TERMS: tl.constexpr,
    AXIS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Every term's partial results so far, with a tile's; only an exceptional tile needs to be MASKED."""
    merged = ()
    for t in tl.static_range(len(TERMS)):
        if has_part(TERMS, t, MASKED):
            partial = _reduce_term(products, scale, shift_log2, inside, tests, TERMS, t, AXIS)
            merged = merged + (merge(partials[t], partial, TERMS[t][0]),)
        else:
            merged = merged + (partials[t],)
    return merged


@triton.jit
def _start(partials_ptr, begin, end, count, slots, slot, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """Fills this program's own slot with the partial result of no pairs."""
    for first in range(begin, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        for t in tl.static_range(len(TERMS)):
            at = partials_ptr + tl.cast(t * slots + slot, tl.int64) * count + index
            tl.store(at, nothing(BLOCK, TERMS[t][0]), mask=index < end)


@triton.jit
def _load(partials_ptr, index, count, slots, slot, TERMS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """What this program's own slot holds for the terms that a tile can add to."""
    partials = ()
    for t in tl.static_range(len(TERMS)):
        if has_part(TERMS, t, MASKED):
            at = partials_ptr + tl.cast(t * slots + slot, tl.int64) * count + index
            partials = partials + (tl.load(at, mask=index < count, other=0.0),)
        else:
            partials = partials + (nothing(BLOCK, TERMS[t][0]),)
    return partials


@triton.jit
def _store(partials_ptr, partials, index, count, slots, slot, TERMS: tl.constexpr, MASKED: tl.constexpr):
    """Back to this program's own slot; the barrier orders it before the next load of the same numbers."""
    for t in tl.static_range(len(TERMS)):
        if has_part(TERMS, t, MASKED):
            at = partials_ptr + tl.cast(t * slots + slot, tl.int64) * count + index
            tl.store(at, partials[t], mask=index < count)
    tl.debug_barrier()


@triton.jit
def _sweep_piece(
    a_ptr,
    b_ptr,
    scale,
    shift_log2,
    target_ptr,
    row_tags_ptrs,
    column_tags_ptrs,
    row_partials_ptr,
    column_partials_ptr,
    r,
    c,
    row_slots,
    column_slots,
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
    """Adds a small square of S, whatever is in it, to this program's slots."""
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
    tests = of_pairs + of_tags + above_test(products, scale, row_tags, ALONG_ROWS)
    # one comparison a pair: rows and columns over the edge get an empty range
    inside = columns[None, :] < tl.where(rows < n, m, 0)[:, None]
    partials = _load(row_partials_ptr, rows, n, column_slots, c, ROW_TERMS, PIECE, True)
    partials = merge_tile(partials, products, scale, shift_log2, inside, tests, ROW_TERMS, ALONG_ROWS, True)
    _store(row_partials_ptr, partials, rows, n, column_slots, c, ROW_TERMS, True)

    # nothing on a symmetric plan's diagonal is mirrored
    if not SYMMETRIC or i0 < j0:
        inside = rows[:, None] < tl.where(columns < m, n, 0)[None, :]
        if SYMMETRIC:
            column_targets = target_columns(target_ptr, columns, m, n, first_column, USES_TARGET)
            of_pairs = pair_tests(rows, columns, self_offset, column_targets, ALONG_COLUMNS)
        tests = of_pairs + of_tags + above_test(products, scale, column_tags, ALONG_COLUMNS)
        partials = _load(column_partials_ptr, columns, m, row_slots, r, COLUMN_TERMS, PIECE, True)
        partials = merge_tile(partials, products, scale, shift_log2, inside, tests, COLUMN_TERMS, ALONG_COLUMNS, True)
        _store(column_partials_ptr, partials, columns, m, row_slots, r, COLUMN_TERMS, True)


@triton.jit
def super_tile(number, row_slots, SYMMETRIC: tl.constexpr):
    """Numbered down the columns; in a triangle c (c + 1) / 2 come before column c, and a root of them tells c."""
    if SYMMETRIC:
        c = ((tl.sqrt(8.0 * number + 2.0) - 1.0) * 0.5).to(tl.int32)
        return number - c * (c + 1) // 2, c
    else:
        return number % row_slots, number // row_slots


@triton.jit(do_not_specialize=["self_offset", "first_column"])
def sweep_kernel(
    a_ptr,
    b_ptr,
    a_tiles,
    b_tiles,
    scale_ptr,
    shift_ptr,
    target_ptr,
    row_tags,
    column_tags,
    row_partials_ptr,
    column_partials_ptr,
    n,
    m,
    d,
    stride_a,
    stride_b,
    self_offset,
    first_column,
    super_rows,
    super_columns,
    ROW_TERMS: tl.constexpr,
    COLUMN_TERMS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    USES_SELF: tl.constexpr,
    USES_TARGET: tl.constexpr,
    LABEL_WIDTH: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Grid: (super-tiles,), or fewer programs where they persist. Partials are [terms, slots, count].

    Tags are labels, ids and thresholds, each None where no mask looks at it.
    """
    scale = tl.load(scale_ptr)
    shift_log2 = tl.load(shift_ptr) * LOG2_E
    row_slots = tl.cdiv(n, super_rows)
    column_slots = tl.cdiv(m, super_columns)
    count = row_slots * column_slots
    if SYMMETRIC:
        count = row_slots * (row_slots + 1) // 2
    first, end, step = own_numbers(count, PERSISTENT)
    # what one super-tile needs and the next one needs again must not stay in registers
    for number in tl.range(first, end, step, disable_licm=True):
        r, c = super_tile(number, row_slots, SYMMETRIC)
        row_begin = r * super_rows
        row_end = tl.minimum(row_begin + super_rows, n)
        column_begin = c * super_columns
        column_end = tl.minimum(column_begin + super_columns, m)
        _start(row_partials_ptr, row_begin, row_end, n, column_slots, c, ROW_TERMS, BLOCK_M)
        _start(column_partials_ptr, column_begin, column_end, m, row_slots, r, COLUMN_TERMS, BLOCK_N)
        tl.debug_barrier()

        for i0 in range(row_begin, row_end, BLOCK_M):
            rows = i0 + tl.arange(0, BLOCK_M)
            row_targets = target_columns(target_ptr, rows, n, m, first_column, USES_TARGET)
            row_partials = all_nothing(BLOCK_M, ROW_TERMS)
            begin = column_begin
            if SYMMETRIC:
                begin = tl.maximum(column_begin, i0)

            for j0 in range(begin, column_end, BLOCK_N):
                columns = j0 + tl.arange(0, BLOCK_N)
                column_targets = columns
                if SYMMETRIC:
                    column_targets = target_columns(target_ptr, columns, m, n, first_column, USES_TARGET)
                if holds_exceptional(
                    i0, j0, n, m, self_offset, row_targets, column_targets,
                    SYMMETRIC, USES_SELF, USES_TARGET, BLOCK_M, BLOCK_N,
                ):  # fmt: skip
                    for i in range(i0, tl.minimum(i0 + BLOCK_M, n), PIECE):
                        first_piece = j0
                        if SYMMETRIC:
                            first_piece = tl.maximum(j0, i)
                        for j in range(first_piece, tl.minimum(j0 + BLOCK_N, m), PIECE):
                            _sweep_piece(
                                a_ptr, b_ptr, scale, shift_log2, target_ptr, row_tags, column_tags,
                                row_partials_ptr, column_partials_ptr, r, c, row_slots, column_slots,
                                i, j, n, m, d, stride_a, stride_b, self_offset, first_column,
                                ROW_TERMS, COLUMN_TERMS, SYMMETRIC, USES_TARGET, LABEL_WIDTH,
                                EVEN_D, PRECISION, PIECE, BLOCK_D,
                            )  # fmt: skip
                else:
                    # asked for before the products, so that nobody waits for it after them
                    column_partials = _load(column_partials_ptr, columns, m, row_slots, r, COLUMN_TERMS, BLOCK_N, False)
                    products = tile_products(
                        a_ptr, b_ptr, a_tiles, b_tiles, i0, j0, n, m, d, stride_a, stride_b,
                        BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
                    )  # fmt: skip
                    of_rows = load_tags(row_tags, rows, n)
                    of_columns = load_tags(column_tags, columns, m)
                    of_tags = tag_tests(of_rows, of_columns, LABEL_WIDTH)
                    tests = of_tags + above_test(products, scale, of_rows, ALONG_ROWS)
                    row_partials = merge_tile(
                        row_partials, products, scale, shift_log2, None, tests, ROW_TERMS, ALONG_ROWS, False
                    )
                    tests = of_tags + above_test(products, scale, of_columns, ALONG_COLUMNS)
                    column_partials = merge_tile(
                        column_partials, products, scale, shift_log2, None, tests, COLUMN_TERMS, ALONG_COLUMNS, False
                    )
                    _store(column_partials_ptr, column_partials, columns, m, row_slots, r, COLUMN_TERMS, False)
            so_far = _load(row_partials_ptr, rows, n, column_slots, c, ROW_TERMS, BLOCK_M, False)
            merged = ()
            for t in tl.static_range(len(ROW_TERMS)):
                merged = merged + (merge(so_far[t], row_partials[t], ROW_TERMS[t][0]),)
            _store(row_partials_ptr, merged, rows, n, column_slots, c, ROW_TERMS, False)
