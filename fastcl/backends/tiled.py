"""Backend `tiled`: any plan in plain PyTorch, streaming S through tiles of bounded size.

May import :mod:`fastcl.terms` and :mod:`fastcl.backends.pairs`. It runs wherever torch runs and needs no compiler. A
symmetric plan visits only tiles on and above the diagonal: one tile serves the rows of both of its sides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcl.backends.pairs import admitted, logits, merge, neutral, reduce_tile, weight_tile
from fastcl.terms import Operands, Plan, Products, Statistics, Term

_TILE_ON_CPU = 1024
_TILE_ELSEWHERE = 4096


def unavailable() -> str | None:
    return None


def supports(plan: Plan, operands: Operands) -> str | None:
    return None


def statistics(plan: Plan, operands: Operands) -> Statistics:
    n, m = operands.shape
    result = Statistics(_neutral(plan.rows, n, operands), _neutral(plan.columns, m, operands))
    for rows, columns in _tiles(plan, operands):
        s = logits(operands, rows, columns)
        _accumulate(result.rows, plan.rows, s, 1, operands, rows, columns)
        _accumulate(result.columns, plan.columns, s, 0, operands, rows, columns)
        if plan.symmetric and rows != columns:
            _accumulate(result.rows, plan.rows, s.mT, 1, operands, columns, rows)
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
                tile = weight_tile(term, s, admitted(term.mask, operands, rows, columns), value, grad)
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


def _tiles(plan: Plan, operands: Operands) -> Iterator[tuple[slice, slice]]:
    n, m = operands.shape
    size = _TILE_ON_CPU if operands.a.device.type == "cpu" else _TILE_ELSEWHERE
    for i in range(0, n, size):
        for j in range(i if plan.symmetric else 0, m, size):
            yield slice(i, min(i + size, n)), slice(j, min(j + size, m))


def _add_product(result: Tensor, w: Tensor, x: Tensor) -> None:
    result += w @ x.to(w.dtype)


def _neutral(terms: tuple[Term, ...], length: int, operands: Operands) -> Tensor:
    values = [neutral(term.reduce) for term in terms]
    column = torch.tensor(values, dtype=operands.accumulation_dtype, device=operands.a.device)
    return column[:, None].repeat(1, length)


def _accumulate(
    result: Tensor, terms: tuple[Term, ...], s: Tensor, dim: int, operands: Operands, rows: slice, columns: slice
) -> None:
    span = rows if dim == 1 else columns
    for k, term in enumerate(terms):
        partial = reduce_tile(term.reduce, s, admitted(term.mask, operands, rows, columns), dim)
        result[k, span] = merge(term.reduce, result[k, span], partial)
