"""The gradient's products from bounded panels of W, whatever N and M are.

May import :mod:`fastcl.terms` only. A kernel writes a panel of W, library products multiply it into float32 sums. Of a
symmetric plan only panels on and above the diagonal are formed: W already holds both directions, so one panel off the
diagonal feeds the rows I as W @ Z_J and the rows J as W.T @ Z_I.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.terms import Plan, Products, Reduce, Statistics, Term

_TALLEST = 8192
_MOST_ELEMENTS = 2**30


class Panel(NamedTuple):
    """A block of W; ``mirror`` where it lies on a symmetric plan's diagonal."""

    row_begin: int
    row_end: int
    column_begin: int
    column_end: int
    mirror: bool = False

    @property
    def rows(self) -> slice:
        return slice(self.row_begin, self.row_end)

    @property
    def columns(self) -> slice:
        return slice(self.column_begin, self.column_end)

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_end - self.row_begin, self.column_end - self.column_begin


def products(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    needs_a: bool,
    needs_b: bool,
    tile: int,
    workspace_bytes: int,
    write: Callable[[Panel, Tensor], None],
) -> Products:
    """W @ B and W.T @ A, of a symmetric plan (W + W.T) @ A, where ``write`` fills a panel with W.

    A panel has room for whole tiles of ``tile`` rows and columns, of a's dtype, in at most ``workspace_bytes``.
    """
    (n, d), m = a.shape, b.shape[0]

    # the first panel of a row or column block overwrites what is there
    def empty(count: int) -> Tensor:
        return torch.empty(count, d, dtype=torch.float32, device=a.device)

    sum_a = empty(n) if needs_a else None
    sum_b = empty(m) if needs_b and not plan.symmetric else None
    if sum_a is None and sum_b is None:
        return Products(None, None)
    height, width = _panel_shape(n, m, tile, workspace_bytes // a.element_size())
    panels = list(_panels(n, m, height, width, plan.symmetric))
    rows, columns = map(max, zip(*(panel.shape for panel in panels), strict=True))
    workspace = a.new_empty(_round_up(rows, tile), _round_up(columns, tile))
    for panel in panels:
        write(panel, workspace)
        weights = workspace[: panel.shape[0], : panel.shape[1]]
        beta_rows, beta_columns = int(panel.column_begin > 0), int(panel.row_begin > 0)
        if sum_a is not None:
            _add_product(sum_a[panel.rows], weights, b[panel.columns], beta_rows)
        if sum_b is not None:
            _add_product(sum_b[panel.columns], weights.t(), a[panel.rows], beta_columns)
        if plan.symmetric and not panel.mirror:
            _add_product(sum_a[panel.columns], weights.t(), a[panel.rows], beta_columns)
    return Products(sum_a, sum_b)


def multiplier(plan: Plan, incoming: Statistics, dtype: torch.dtype) -> Tensor | None:
    """A power of two that lifts W into float16's range: |W| is at most the largest |gradient| of each term, summed.

    Without it nearly all of W, about 1/N each, would be subnormal; with N itself a loss scaled by GradScaler overflows.
    """
    if dtype is not torch.float16:
        return None
    bound = _largest_sum(plan.rows, incoming.rows) * (2 if plan.symmetric else 1)
    return lifting_power(bound + _largest_sum(plan.columns, incoming.columns))


def lifting_power(bound: Tensor) -> Tensor:
    """A power of two that lifts what is at most ``bound`` into float16's range."""
    power = torch.exp2(14.0 - torch.ceil(torch.log2(bound)).clamp(-100.0, 100.0))
    return torch.where(torch.isfinite(bound) & (bound > 0), power, 1.0)


def _largest_sum(terms: tuple[Term, ...], incoming: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.float32, device=incoming.device)
    return sum((g.abs().amax() for t, g in zip(terms, incoming, strict=True) if t.reduce is not Reduce.MAX), zero)


def _panel_shape(n: int, m: int, tile: int, elements: int) -> tuple[int, int]:
    """A bounded panel of whole tiles: first tall, so that W @ B fills a GPU, then wide."""
    elements = min(elements, _MOST_ELEMENTS)
    tallest = max(tile, min(_TALLEST, math.isqrt(elements)) // tile * tile)
    height = min(_round_up(n, tile), tallest)
    return height, max(tile, elements // height // tile * tile)


def _panels(n: int, m: int, height: int, width: int, symmetric: bool) -> Iterator[Panel]:
    for row_begin in range(0, n, height):
        row_end = min(row_begin + height, n)
        first_column = 0
        if symmetric:
            yield Panel(row_begin, row_end, row_begin, row_end, mirror=True)
            first_column = row_end
        for column_begin in range(first_column, m, width):
            yield Panel(row_begin, row_end, column_begin, min(column_begin + width, m))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _add_product(accumulator: Tensor, weights: Tensor, vectors: Tensor, beta: int) -> None:
    """accumulator = beta * accumulator + weights @ vectors; with beta 0 it may hold anything."""
    if accumulator.is_cuda and weights.dtype is not torch.float32:
        torch.addmm(accumulator, weights, vectors, beta=beta, out_dtype=torch.float32, out=accumulator)
    else:
        torch.addmm(accumulator, weights.float(), vectors.float(), beta=beta, out=accumulator)
