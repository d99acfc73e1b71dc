"""What every kernel does with one tile of S: form it, and find the pairs in it that a mask treats apart.

A mask names at most two pairs of a row i: the self pair and the target. A tile that holds none of them, and neither
crosses the diagonal of a symmetric plan nor hangs over an edge, needs none of these tests; most tiles are of that kind.
What rows and columns are tagged with (fastcl.terms.Tags) is tested wherever a plan's masks ask for it.
"""

import triton
import triton.language as tl

LSE = tl.constexpr(0)
SUM = tl.constexpr(1)
MAX = tl.constexpr(2)

ABSENT = tl.constexpr(0)
REQUIRED = tl.constexpr(1)
FORBIDDEN = tl.constexpr(2)

ALONG_ROWS = tl.constexpr(1)
ALONG_COLUMNS = tl.constexpr(0)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def inner_products(
    a_ptr,
    b_ptr,
    rows,
    columns,
    n,
    m,
    d,
    stride_a,
    stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<a_i, b_j> of a tile in float32; an index over the edge repeats the last vector instead of needing a mask."""
    a_rows = a_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_a
    b_rows = b_ptr + tl.minimum(columns, m - 1).to(tl.int64)[None, :] * stride_b
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        if EVEN_D:
            a = tl.load(a_rows + k[None, :])
            b = tl.load(b_rows + k[:, None])
        else:
            a = tl.load(a_rows + k[None, :], mask=(k < d)[None, :], other=0.0)
            b = tl.load(b_rows + k[:, None], mask=(k < d)[:, None], other=0.0)
        products = tl.dot(a, b, products, input_precision=PRECISION)
    return products


@triton.jit
def tile_products(
    a_ptr,
    b_ptr,
    a_tiles,
    b_tiles,
    i0,
    j0,
    n,
    m,
    d,
    stride_a,
    stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``inner_products`` of the tile at (i0, j0), read through descriptors where there are any: zeros over the edge."""
    if a_tiles is None:
        rows = i0 + tl.arange(0, BLOCK_M)
        columns = j0 + tl.arange(0, BLOCK_N)
        return inner_products(
            a_ptr, b_ptr, rows, columns, n, m, d, stride_a, stride_b, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION
        )
    else:
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, d, BLOCK_D):
            a = a_tiles.load([i0, start])
            b = b_tiles.load([j0, start])
            products = tl.dot(a, b.T, products, input_precision=PRECISION)
        return products


@triton.jit
def self_columns(rows, self_offset, n, m):
    """The column of each row's self pair, -1 where that lies outside of S."""
    columns = rows + self_offset
    return tl.where((rows < n) & (columns >= 0) & (columns < m), columns, -1)


@triton.jit
def target_columns(target_ptr, rows, n, m, first_column, USES_TARGET: tl.constexpr):
    """The column of each row's target, -1 where that lies outside of S or is not looked at.

    Targets are global indices, and ``first_column`` is that of the first column of S.
    """
    if USES_TARGET:
        columns = tl.load(target_ptr + rows, mask=rows < n, other=-1) - first_column
        return tl.where((rows < n) & (columns >= 0) & (columns < m), columns, -1).to(tl.int32)
    else:
        return tl.full(rows.shape, -1, tl.int32)


@triton.jit
def holds_exceptional(
    i0,
    j0,
    n,
    m,
    self_offset,
    row_targets,
    column_targets,
    SYMMETRIC: tl.constexpr,
    USES_SELF: tl.constexpr,
    USES_TARGET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether a mask may treat pairs of a tile apart, as a scalar that the whole program branches on."""
    exceptional = (i0 + BLOCK_M > n) | (j0 + BLOCK_N > m)
    if SYMMETRIC:
        exceptional = exceptional | (i0 == j0)
    if USES_SELF:
        exceptional = exceptional | ((self_offset > j0 - i0 - BLOCK_M) & (self_offset < j0 - i0 + BLOCK_N))
    if USES_TARGET:
        hits = (row_targets >= j0) & (row_targets < j0 + BLOCK_N)
        if SYMMETRIC:
            hits = hits | ((column_targets >= i0) & (column_targets < i0 + BLOCK_M))
        exceptional = exceptional | (tl.max(hits.to(tl.int32), axis=0) > 0)
    return exceptional


@triton.jit
def pair_tests(rows, columns, self_offset, targets, TARGETS_OF: tl.constexpr):
    """The tests for the self pair and the target on each pair of a tile.

    A tuple of tests is this, then tag_tests, then above_test: the order in which a term's code names them.

    ``targets`` are those of the rows, or in a symmetric plan's mirror image (j, i) those of the columns.
    """
    is_self = columns[None, :] - rows[:, None] == self_offset
    if TARGETS_OF == ALONG_ROWS:
        is_target = columns[None, :] == targets[:, None]
    else:
        is_target = rows[:, None] == targets[None, :]
    return is_self, is_target


@triton.jit
def load_tags(tags, index, count):
    """Labels, ids and thresholds of some rows or columns.

    The index stands for one that is None because no mask looks at it; the compiler drops what is made of that.
    """
    labels, ids, threshold = index, index, index
    if tags[0] is not None:
        labels = tl.load(tags[0] + index, mask=index < count, other=0)
    if tags[1] is not None:
        ids = tl.load(tags[1] + index, mask=index < count, other=0)
    if tags[2] is not None:
        threshold = tl.load(tags[2] + index, mask=index < count, other=0.0)
    return labels, ids, threshold


@triton.jit
def tag_tests(row_tags, column_tags, LABEL_WIDTH: tl.constexpr):
    """The tests of labels and of ids on each pair of a tile."""
    if LABEL_WIDTH == 0:
        is_label = row_tags[0][:, None] == column_tags[0][None, :]
    else:
        # |x - y| <= w in one comparison: x - y + w, which wraps to a huge number where it is negative
        lowest = column_tags[0] - LABEL_WIDTH
        is_label = (row_tags[0][:, None] - lowest[None, :]).to(tl.uint64) <= 2 * LABEL_WIDTH
    return is_label, row_tags[1][:, None] == column_tags[1][None, :]


@triton.jit
def above_test(products, scale, tags, AXIS: tl.constexpr):
    """The test against the thresholds of the side that a term is along."""
    return (products * scale > spread(tags[2], AXIS),)


@triton.constexpr_function
def requires_a_pair(terms, t):
    """Whether the mask of term t admits only the self pair or the target."""
    return REQUIRED.value in terms[t][1:3]


@triton.jit
def where_admitted(values, nothing, inside, tests, TERMS: tl.constexpr, T: tl.constexpr):
    """The values of pairs that a term's mask admits, ``nothing`` for the others.

    One selection for each test and not one by their conjunction: LLVM packs a tile of conjunctions into registers of
    bits, and the kernels spill. ``inside`` may be None; a target is inside by construction. A tile without a self pair
    and a target may leave out their tests, which come first.
    """
    if inside is not None and TERMS[T][2] != REQUIRED:
        values = tl.where(inside, values, nothing)
    OMITTED: tl.constexpr = len(TERMS[T]) - len(tests)
    for k in tl.static_range(len(tests)):
        if TERMS[T][OMITTED + k] == REQUIRED:
            values = tl.where(tests[k], values, nothing)
        elif TERMS[T][OMITTED + k] == FORBIDDEN:
            values = tl.where(tests[k], nothing, values)
    return values


@triton.jit
def spread(vector, AXIS: tl.constexpr):
    """A number for each row (ALONG_ROWS) or each column, against a tile."""
    if AXIS == ALONG_ROWS:
        return vector[:, None]
    else:
        return vector[None, :]


@triton.jit
def own_numbers(count, PERSISTENT: tl.constexpr):
    """This program's share of ``count`` pieces of work, as a range: one, or every so manieth where programs persist.

    If it is one the compiler sees that, and keeps no loop.
    """
    first = tl.program_id(0)
    if PERSISTENT:
        return first, count, tl.num_programs(0)
    else:
        return first, first + 1, 1


@triton.jit
def banded_tile(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """This program's tile, see ``numbered_tile``."""
    return numbered_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)


@triton.jit
def numbered_tile(number, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """A tile by its number, in bands of GROUP_M tiles: the programs in flight share rows of a and of b in L2."""
    band = number // (GROUP_M * tiles_n)
    band_height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = number - band * GROUP_M * tiles_n
    return band * GROUP_M + within % band_height, within // band_height
