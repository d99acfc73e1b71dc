"""The vocabulary's meaning in torch: which pairs a mask admits, how a term reduces them, and its slope.

May import :mod:`fastcl.terms` only. Everything here works on one tile of S, given the global indices of its rows and
columns, so that `dense` (one tile) and `tiled` (many) share it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcl.terms import Axis, Operands, Plan, Reduce, Term


def logits(operands: Operands, rows: slice, columns: slice) -> Tensor:
    """The tile ``S[rows, columns]`` in the accumulation dtype."""
    dtype = operands.accumulation_dtype
    a, b = operands.a[rows].to(dtype), operands.keys[columns].to(dtype)
    return (a @ b.mT).mul_(operands.scale)


def admitted(term: Term, plan: Plan, operands: Operands, s: Tensor, rows: slice, columns: slice) -> Tensor:
    """A bool tile of the pairs that the term's mask admits, or a 0-d True where it has no test; ``s`` is the tile."""
    mask, device = term.mask, operands.a.device
    of_rows, of_columns = operands.row_tags.part(rows), operands.key_tags.part(columns)
    j = torch.arange(columns.start, columns.stop, device=device) + operands.col0
    result = torch.ones((), dtype=torch.bool, device=device)
    if mask.self_pair is not None:
        i = torch.arange(rows.start, rows.stop, device=device) + operands.row0
        result = (i[:, None] == j) == mask.self_pair
    if mask.target is not None:
        result = result & ((operands.target[rows, None] == j) == mask.target)
    if mask.label is not None:
        x, y = of_rows.labels[:, None], of_columns.labels
        near = (x - y).abs_() <= plan.label_width if plan.label_width else x == y
        result = result & (near == mask.label)
    if mask.id is not None:
        result = result & ((of_rows.ids[:, None] == of_columns.ids) == mask.id)
    if mask.above is not None:
        threshold = of_rows.threshold[:, None] if term.axis is Axis.ROW else of_columns.threshold
        result = result & ((s > threshold) == mask.above)
    return result


_NEUTRAL = {Reduce.LSE: -math.inf, Reduce.SUM: 0.0, Reduce.MAX: -math.inf}
_REDUCE = {Reduce.LSE: torch.logsumexp, Reduce.SUM: torch.sum, Reduce.MAX: torch.amax}
_MERGE = {Reduce.LSE: torch.logaddexp, Reduce.SUM: torch.add, Reduce.MAX: torch.maximum}


def neutral(reduce: Reduce) -> float:
    """The value of a term that admits no pair."""
    return _NEUTRAL[reduce]


def reduce_tile(reduce: Reduce, s: Tensor, admits: Tensor, dim: int) -> Tensor:
    """Reduce the admitted pairs of a tile along ``dim``."""
    return _REDUCE[reduce](s.masked_fill(~admits, _NEUTRAL[reduce]), dim=dim)


def merge(reduce: Reduce, x: Tensor, y: Tensor) -> Tensor:
    """Combine the reductions of two disjoint sets of pairs."""
    return _MERGE[reduce](x, y)


def weight_tile(term: Term, s: Tensor, admits: Tensor, statistic: Tensor, incoming: Tensor) -> Tensor | None:
    """incoming * d(statistic)/dS on a tile, None for a term without a gradient."""
    if term.reduce is Reduce.MAX:
        return None
    if term.axis is Axis.ROW:
        statistic, incoming = statistic[:, None], incoming[:, None]
    if term.reduce is Reduce.SUM:
        return incoming * admits.to(s.dtype)
    # A statistic of -inf admitted nothing (or only logits of -inf): its slope is 0 everywhere.
    statistic = statistic.masked_fill(statistic == -math.inf, math.inf)
    return (s - statistic).exp_().masked_fill_(~admits, 0.0).mul_(incoming)
