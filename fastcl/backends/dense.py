"""Backend `dense`: any plan with all of S at once, in any dtype up to float64.

May import :mod:`fastcl.terms` and what backends share, ``pairs`` and ``softmax``. It judges the other backends and
serves small problems on request; it needs several N x M matrices, so it is never selected automatically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.backends.pairs import admitted, logits, reduce_tile, weight_tile
from fastcl.backends.softmax import two_sweeps
from fastcl.terms import CrossEntropy, LossAndGradients, Needs, Operands, Plan, Products, Statistics, Term

PANEL_KERNELS = {}


def unavailable() -> str | None:
    return None


def refuses(plan: Plan) -> str | None:
    return None


def supports(plan: Plan, operands: Operands) -> str | None:
    return None


def statistics(plan: Plan, operands: Operands) -> Statistics:
    rows, columns = _everything(operands)
    s = logits(operands, rows, columns)

    def reduce_all(terms: tuple[Term, ...], dim: int, length: int) -> Tensor:
        values = [reduce_tile(t.reduce, s, admitted(t, plan, operands, s, rows, columns), dim) for t in terms]
        return torch.stack(values) if values else s.new_empty((0, length))

    n, m = operands.shape
    return Statistics(reduce_all(plan.rows, 1, n), reduce_all(plan.columns, 0, m))


def gradient(
    plan: Plan,
    operands: Operands,
    statistics: Statistics,
    incoming: Statistics,
    needs_a: bool,
    needs_b: bool,
) -> Products:
    rows, columns = _everything(operands)
    s = logits(operands, rows, columns)
    w = torch.zeros_like(s)
    for terms, values, grads in zip((plan.rows, plan.columns), statistics, incoming, strict=True):
        for term, value, grad in zip(terms, values, grads, strict=True):
            weights = weight_tile(term, s, admitted(term, plan, operands, s, rows, columns), value, grad)
            if weights is not None:
                w += weights
    if plan.symmetric:
        w = w + w.mT
    return Products(
        w @ operands.keys.to(w.dtype) if needs_a else None,
        w.mT @ operands.a.to(w.dtype) if needs_b else None,
    )


def cross_entropy(plan: Plan, operands: Operands, head: CrossEntropy, needs: Needs) -> LossAndGradients:
    return two_sweeps(statistics, gradient, plan, operands, head, needs)


def _everything(operands: Operands) -> tuple[slice, slice]:
    n, m = operands.shape
    return slice(0, n), slice(0, m)
