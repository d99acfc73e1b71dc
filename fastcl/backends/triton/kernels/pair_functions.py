"""The panel functions of :mod:`fastcl.losses` on one tile of S, for ``panel_function_kernel``.

Each is given

- ``s`` and ``guide``, tiles of S and of a second one (or None);
- ``pairs``: tests of each pair, whether it is the row's own, of one label, and inside of S; the columns' indices; and
  whether the pair is of one id, if that is tested;
- ``rows`` and ``columns``, the parameters of both, and ``found``, log-sum-exps or counts of the rows where an earlier
  sweep made them;
- ``incoming``, the gradients of the rows' values, of those that have one;
- ``numbers``, constants of the loss;

and makes a tuple of vectors over the rows, the tile of W, and two more vectors, over rows and over columns, where those
are the gradients of a parameter that W's own sums don't give. What nobody looks at, the compiler leaves out.
"""

import triton
import triton.language as tl

from fastcl.backends.triton.kernels.sigmoid import log1p
from fastcl.backends.triton.kernels.tile import LN_2, LOG2_E

_SMALLEST = tl.constexpr(2.0**-126)
"""a device takes smaller numbers for 0"""


@triton.jit
def _of_positives(pairs, values, nothing):
    """Values of the other pairs of one label. One selection for each test: see where_admitted of tile.py."""
    values = tl.where(pairs[1], values, nothing)
    values = tl.where(pairs[0], nothing, values)
    return tl.where(pairs[2], values, nothing)


@triton.jit
def _of_negatives(pairs, values, nothing):
    """Values of the pairs of different labels, and ids."""
    values = tl.where(pairs[1], nothing, values)
    if len(pairs) > 4:
        values = tl.where(pairs[4], nothing, values)
    return tl.where(pairs[2], values, nothing)


@triton.jit
def _of_candidates(pairs, values, nothing):
    """Values of all pairs but those of one id that are not the row's own."""
    candidates = values
    if len(pairs) > 4:
        candidates = tl.where(pairs[4], nothing, values)
        candidates = tl.where(pairs[0], values, candidates)
    return tl.where(pairs[2], candidates, nothing)


@triton.jit
def _marked(values):
    """Values of some pairs, which are infinite for all others, with 0 in the place of that; and 1 where they count.

    The tests of pairs themselves, without a number that they choose, are kept as bits, and the kernels spill.
    """
    is_there = values != float("inf")
    return tl.where(is_there, values, 0.0), tl.where(is_there, 1.0, 0.0)


@triton.jit
def _positive_part(x):
    """max(x, 0) that keeps NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def _above(x, lse):
    """exp(x - lse), and 0 where lse is that of nothing."""
    return _exp(x - tl.where(lse == float("-inf"), 0.0, lse)[:, None])


@triton.jit
def _log_sum_exp(x):
    """Of each row of a tile."""
    top = tl.max(x, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log2(tl.sum(_exp(x - top[:, None]), axis=1)) * LN_2


@triton.jit
def _logaddexp(x, y):
    """log(exp(x) + exp(y)), and x's share of that sum."""
    distance = tl.where(x == y, 0.0, tl.abs(x - y))
    e = _exp(-distance)
    return tl.maximum(x, y) + log1p(e), tl.where(x >= y, 1.0, e) / (1.0 + e)


@triton.jit
def _count(x):
    """How many of each row are positive."""
    return tl.sum(tl.where(x > 0.0, 1.0, 0.0), axis=1)


@triton.jit
def _squared(s, rows, columns):
    """Squared distances, from squared norms that are the last parameters."""
    norms = rows[len(rows) - 1][:, None] + columns[len(columns) - 1][None, :]
    return _positive_part(norms - 2.0 * s)


@triton.jit
def _distances(s, rows, columns, FIRST: tl.constexpr):
    """Distances, and their slope over S; Euclidean where there is a parameter after the ``FIRST``, else 1 - S."""
    if len(rows) > FIRST:
        squared = _squared(s, rows, columns)
        inverse = tl.where(squared < _SMALLEST, 0.0, tl.rsqrt(squared))
        return squared * inverse, -inverse
    else:
        return 1.0 - s, tl.full(s.shape, -1.0, tl.float32)


@triton.jit
def contrastive(s, guide, pairs, rows, columns, found, incoming, numbers):
    d, slope = _distances(s, rows, columns, 0)
    too_far = _positive_part(_of_positives(pairs, d - numbers[0], 0.0))
    too_close = _positive_part(_of_negatives(pairs, numbers[1] - d, 0.0))
    pull = tl.where(too_far > 0.0, incoming[0][:, None], 0.0)
    push = tl.where(too_close > 0.0, incoming[1][:, None], 0.0)
    values = tl.sum(too_far, axis=1), _count(too_far), tl.sum(too_close, axis=1), _count(too_close)
    return values, (pull - push) * slope, ()


@triton.jit
def negatives_lse(s, guide, pairs, rows, columns, found, incoming, numbers):
    d, _ = _distances(s, rows, columns, 0)
    return (_log_sum_exp(_of_negatives(pairs, numbers[0] - d, float("-inf"))),), (), ()


@triton.jit
def negatives(s, guide, pairs, rows, columns, found, incoming, numbers):
    d, slope = _distances(s, rows, columns, 0)
    shares = _above(_of_negatives(pairs, numbers[0] - d, float("-inf")), found[0])
    return (), -shares * incoming[0][:, None] * slope, ()


@triton.jit
def lifted(s, guide, pairs, rows, columns, found, incoming, numbers):
    d, slope = _distances(s, rows, columns, 1)
    both, own_share = _logaddexp(rows[0][:, None], columns[0][None, :])
    excess, is_positive = _marked(_of_positives(pairs, both + (d - numbers[0]), float("inf")))
    hinge = _positive_part(excess)
    gradient = hinge * incoming[0][:, None]
    of_own = gradient * own_share
    values = 0.5 * tl.sum(hinge * hinge, axis=1), tl.sum(is_positive, axis=1)
    return values, gradient * slope, (tl.sum(of_own, axis=1), tl.sum(gradient - of_own, axis=0))


@triton.jit
def hardest(s, guide, pairs, rows, columns, found, incoming, numbers):
    """The farthest positive's distance, or what grows with it, and its column; the nearest negative's."""
    d = -s
    if len(rows) > 0:
        d = _squared(s, rows, columns)
    farthest, of_farthest = tl.max(_of_positives(pairs, d, float("-inf")), axis=1, return_indices=True)
    nearest, of_nearest = tl.min(_of_negatives(pairs, d, float("inf")), axis=1, return_indices=True)
    first = tl.min(pairs[3], axis=0)
    return (farthest, (first + of_farthest).to(tl.float32), nearest, (first + of_nearest).to(tl.float32)), (), ()


@triton.jit
def similarities(s, guide, pairs, rows, columns, found, incoming, numbers):
    similarity = s
    if len(rows) > 0:
        similarity = 1.0 - 0.5 * _squared(s, rows, columns)
    unlike, is_positive = _marked(_of_positives(pairs, -similarity, float("inf")))
    best = -tl.min(_of_positives(pairs, -similarity, float("inf")), axis=1)
    worst = tl.max(_of_negatives(pairs, similarity, float("-inf")), axis=1)
    return (best, worst, -tl.sum(unlike, axis=1), tl.sum(is_positive, axis=1)), (), ()


@triton.jit
def _halved(s, rows, columns):
    """Squared distances, halved, where squared norms are the first parameters."""
    return _positive_part(0.5 * (rows[0][:, None] + columns[0][None, :]) - s)


@triton.jit
def nearest(s, guide, pairs, rows, columns, found, incoming, numbers):
    squared = _halved(s, rows, columns)
    positive = tl.sum(_of_positives(pairs, squared, 0.0), axis=1)
    return (positive, tl.min(_of_negatives(pairs, squared, float("inf")), axis=1)), (), ()


@triton.jit
def _softmax_logits(pairs, squared, numbers):
    return _of_negatives(pairs, squared * (-1.0 / numbers[0]), float("-inf"))


@triton.jit
def _power_logits(pairs, squared, numbers):
    """-squared ** (power / 2) / tau"""
    raised = tl.exp2(tl.log2(squared) * (0.5 * numbers[1]))
    return _of_negatives(pairs, raised * (-1.0 / numbers[0]), float("-inf"))


@triton.jit
def _energy(squared, logits, lse, rows, incoming):
    """The energy under an importance of exp(logits - lse), held constant."""
    alpha = _above(logits, lse)
    return (tl.sum(alpha * (rows[1][:, None] - squared), axis=1),), alpha * incoming[0][:, None], ()


@triton.jit
def softmax_lse(s, guide, pairs, rows, columns, found, incoming, numbers):
    return (_log_sum_exp(_softmax_logits(pairs, _halved(s, rows, columns), numbers)),), (), ()


@triton.jit
def softmax(s, guide, pairs, rows, columns, found, incoming, numbers):
    squared = _halved(s, rows, columns)
    lse, _ = _logaddexp(found[0], rows[1] * (-1.0 / numbers[0]))
    return _energy(squared, _softmax_logits(pairs, squared, numbers), lse, rows, incoming)


@triton.jit
def power_lse(s, guide, pairs, rows, columns, found, incoming, numbers):
    return (_log_sum_exp(_power_logits(pairs, _halved(s, rows, columns), numbers)),), (), ()


@triton.jit
def power(s, guide, pairs, rows, columns, found, incoming, numbers):
    squared = _halved(s, rows, columns)
    return _energy(squared, _power_logits(pairs, squared, numbers), found[0], rows, incoming)


@triton.jit
def count(s, guide, pairs, rows, columns, found, incoming, numbers):
    """Of negatives, for which nobody multiplies."""
    return (tl.sum(_of_negatives(pairs, tl.full(s.shape, 1.0, tl.float32), 0.0), axis=1),), (), ()


@triton.jit
def uniform(s, guide, pairs, rows, columns, found, incoming, numbers):
    squared, is_negative = _marked(_of_negatives(pairs, _halved(s, rows, columns), float("inf")))
    alpha = is_negative / tl.maximum(found[0], 1.0)[:, None]
    return (tl.sum(alpha * (rows[1][:, None] - squared), axis=1),), alpha * incoming[0][:, None], ()


@triton.jit
def soft_targets_lse(s, guide, pairs, rows, columns, found, incoming, numbers):
    of_s = _log_sum_exp(_of_candidates(pairs, s, float("-inf")))
    return (of_s, _log_sum_exp(_of_candidates(pairs, guide, float("-inf")))), (), ()


@triton.jit
def soft_targets(s, guide, pairs, rows, columns, found, incoming, numbers):
    probability = _above(_of_candidates(pairs, s, float("-inf")), found[0])
    target = _above(_of_candidates(pairs, guide, float("-inf")), found[1])
    values = (tl.sum(target * (found[0][:, None] - s), axis=1),)
    return values, (probability - target) * incoming[0][:, None], ()
