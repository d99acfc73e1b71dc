"""Backend `tiled`: any plan in plain PyTorch, streaming S through tiles of bounded size.

May import :mod:`fastcl.terms`, :mod:`fastcl.backends.pairs` and :mod:`fastcl.backends.softmax`. It runs wherever torch
runs and needs no compiler. A symmetric plan visits only tiles on and above the diagonal: one tile serves the rows of
both of its sides. A softmax loss along rows only takes one sweep over panels of whole rows, whose S is kept until the
gradient's weights are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastcl.backends.pairs import admitted, logits, merge, neutral, reduce_tile, weight_tile
from fastcl.backends.softmax import evaluate, finish, through_unit_length, two_sweeps, unit_operands
from fastcl.terms import Axis, CrossEntropy, LossAndGradients, Needs, Operands, Plan, Products, Reduce, Statistics, Term

PANEL_KERNELS = {}
_TILE_ON_CPU = 1024
_TILE_ELSEWHERE = 4096
_PANEL_TILES = 2
"""tiles whose memory a panel of whole rows may take"""
_LOWEST_PANEL = 64
"""rows of a panel that still make a good matrix product"""


def unavailable() -> str | None:
    return None


def refuses(plan: Plan) -> str | None:
    return None


def supports(plan: Plan, operands: Operands) -> str | None:
    return None


def statistics(plan: Plan, operands: Operands) -> Statistics:
    n, m = operands.shape
    result = Statistics(_neutral(plan.rows, n, operands), _neutral(plan.columns, m, operands))
    for rows, columns in _tiles(plan, operands):
        s = logits(operands, rows, columns)
        _accumulate(result.rows, plan, s, operands, rows, columns, Axis.ROW)
        _accumulate(result.columns, plan, s, operands, rows, columns, Axis.COLUMN)
        if plan.symmetric and rows != columns:
            _accumulate(result.rows, plan, s.mT, operands, columns, rows, Axis.ROW)
    return result


def gradient(
    plan: Plan,
    operands: Operands,
    statistics: Statistics,
    incoming: Statistics,
    needs_a: bool,
    needs_b: bool,
) -> Products:
    dtype = operands.accumulation_dtype
    grad_a = torch.zeros_like(operands.a, dtype=dtype) if needs_a else None
    grad_b = torch.zeros_like(operands.keys, dtype=dtype) if needs_b else None

    def weights(s: Tensor, rows: slice, columns: slice) -> Tensor:
        w = torch.zeros_like(s)
        sides = ((plan.rows, 0, rows), (plan.columns, 1, columns))
        for terms, side, span in sides:
            for term, value, grad in zip(terms, statistics[side][:, span], incoming[side][:, span], strict=True):
                tile = weight_tile(term, s, admitted(term, plan, operands, s, rows, columns), value, grad)
                if tile is not None:
                    w += tile
        return w

    for rows, columns in _tiles(plan, operands):
        s = logits(operands, rows, columns)
        w = weights(s, rows, columns)
        if plan.symmetric:
            w = w + (w.mT if rows == columns else weights(s.mT, columns, rows).mT)
        if grad_a is not None:
            _add_product(grad_a[rows], w, operands.keys[columns])
            if plan.symmetric and rows != columns:
                _add_product(grad_a[columns], w.mT, operands.a[rows])
        if grad_b is not None:
            _add_product(grad_b[columns], w.mT, operands.a[rows])
    return Products(grad_a, grad_b)


def cross_entropy(plan: Plan, operands: Operands, head: CrossEntropy, needs: Needs) -> LossAndGradients:
    rows = _panel_rows(operands)
    one_direction = not (plan.symmetric or plan.columns) and sum(t.reduce is Reduce.LSE for t in plan.rows) == 1
    if not one_direction or rows < min(_LOWEST_PANEL, operands.shape[0]) or not (needs.product_a or needs.b):
        return two_sweeps(statistics, gradient, plan, operands, head, needs)
    unit = unit_operands(operands) if head.normalize else operands
    n, m = operands.shape
    dtype = operands.accumulation_dtype
    everything = slice(0, m)
    values = _neutral(plan.rows, n, operands)
    products = Products(
        operands.a.new_empty(operands.a.shape, dtype=dtype) if needs.product_a else None,
        operands.a.new_zeros(operands.keys.shape, dtype=dtype) if needs.b else None,
    )
    loss, positive = values.new_zeros(()), []
    for start in range(0, n, rows):
        panel = slice(start, min(start + rows, n))
        s = logits(unit, panel, everything)
        admits = [admitted(term, plan, unit, s, panel, everything) for term in plan.rows]
        for k, term in enumerate(plan.rows):
            values[k, panel] = reduce_tile(term.reduce, s, admits[k], 1)
        own = replace(
            head,
            positive=None if head.positive is None else head.positive[panel],
            weights=None if head.weights is None else head.weights[panel],
        )
        found = evaluate(plan, own, Statistics(values[:, panel], values[:0]), n)
        w = torch.zeros_like(s)
        for k, term in enumerate(plan.rows):
            tile = weight_tile(term, s, admits[k], values[k, panel], found.incoming.rows[k])
            if tile is not None:
                w += tile
        if products.a is not None:
            torch.mm(w, unit.keys.to(dtype), out=products.a[panel])
        if products.b is not None:
            _add_product(products.b, w.mT, unit.a[panel])
        loss += found.loss
        positive.append(found.positive)
    gradients = finish(plan, unit, products, needs, dtype)
    if head.normalize:
        gradients = through_unit_length(operands, gradients)
    all_values = Statistics(values, values.new_empty((0, m)))
    return LossAndGradients(loss, all_values, gradients, torch.cat(positive) if needs.positive else None)


def _panel_rows(operands: Operands) -> int:
    """Rows of a panel of S: as many as a tile has, or as fit into the memory of a few tiles."""
    size = _tile_size(operands)
    return max(1, min(size, _PANEL_TILES * size * size // operands.shape[1]))


def _tile_size(operands: Operands) -> int:
    return _TILE_ON_CPU if operands.a.device.type == "cpu" else _TILE_ELSEWHERE


def _tiles(plan: Plan, operands: Operands) -> Iterator[tuple[slice, slice]]:
    n, m = operands.shape
    size = _tile_size(operands)
    for i in range(0, n, size):
        for j in range(i if plan.symmetric else 0, m, size):
            yield slice(i, min(i + size, n)), slice(j, min(j + size, m))


def _add_product(result: Tensor, w: Tensor, x: Tensor) -> None:
    result += w @ x.to(w.dtype)


def _neutral(terms: tuple[Term, ...], length: int, operands: Operands) -> Tensor:
    result = operands.a.new_empty(len(terms), length, dtype=operands.accumulation_dtype)
    for row, term in zip(result, terms, strict=True):
        row.fill_(neutral(term.reduce))
    return result


def _accumulate(
    result: Tensor, plan: Plan, s: Tensor, operands: Operands, rows: slice, columns: slice, axis: Axis
) -> None:
    terms, span, dim = (plan.rows, rows, 1) if axis is Axis.ROW else (plan.columns, columns, 0)
    for k, term in enumerate(terms):
        partial = reduce_tile(term.reduce, s, admitted(term, plan, operands, s, rows, columns), dim)
        result[k, span] = merge(term.reduce, result[k, span], partial)
