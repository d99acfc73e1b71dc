"""The fixed shift c in exp(S - c): one number for a whole sweep, and the rule that says where it did not suffice.

May import :mod:`fastcl.terms` only. With |S| <= bound, c puts the largest possible summand at exp(80) / max(N, M), so
that no sum of N or M of them overflows. A logit far below the bound underflows instead. That can happen only where
2 * bound > 150, and a row (or column) it may have hurt shows a log-sum-exp close to the smallest normal number: it is
*flagged*, and recomputed with a running maximum. Waiting for a sum of exactly 0 is too late: summands are flushed
long before the sum is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcl.terms import Operands

_HEADROOM = 80.0
ROUNDING = 1.0 + 2.0**-7
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def fixed_shift(operands: Operands, scale: float | Tensor) -> float | Tensor:
    """c for the operands' scale, which is a number where reading it costs nothing, else a 0-d float32 tensor.

    For a tensor c stays on its device, and nothing waits for it; so it does where the norms have to be looked at.
    """
    return abs(scale) * norm_bound(operands) * ROUNDING - headroom(operands)


def headroom(operands: Operands) -> float:
    """How far the bound of the logits, a hair raised for their rounding, lies above the shift."""
    return _HEADROOM - math.log(max(operands.shape))


def flag_threshold(operands: Operands) -> float:
    """A log-sum-exp L > -inf with L - c below this is flagged."""
    n, m = operands.shape
    return math.log(1e6 * max(n, m) * _SMALLEST_NORMAL)


def lowest_exponent(operands: Operands, shift: float) -> float:
    """A lower bound of S - c for finite logits: above the smallest normal number's log, a sum of 0 has no summands."""
    return -2.0 * shift - headroom(operands)


def norm_bound(operands: Operands) -> Tensor | float:
    """An upper bound of |a[i]| * |b[j]|."""
    if operands.norm_bound is not None:
        return operands.norm_bound
    largest_a = _largest_norm(operands.a)
    return largest_a * (largest_a if operands.b is None else _largest_norm(operands.b))


def _largest_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax()
