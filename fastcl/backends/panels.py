"""The gradient's products from bounded panels of W, whatever N and M are.

May import :mod:`fastcl.terms` only. A kernel writes a panel of W, library products multiply it into float32 sums. Of a
symmetric plan only panels on and above the diagonal are formed: W already holds both directions, so one panel off the
diagonal feeds the rows I as W @ Z_J and the rows J as W.T @ Z_I.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.terms import Plan, Products, Reduce, Statistics, Term

TALLEST = 8192
"""rows of a panel"""
MOST_ELEMENTS = 2**30


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


KeepRows = Callable[[slice, Tensor], None]
"""Takes complete rows of W @ B, which it may overwrite, in place of :class:`fastcl.terms.Products`."""


def products(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    needs_a: bool,
    needs_b: bool,
    tile: tuple[int, int],
    workspace_bytes: int,
    write: Callable[[Panel, Tensor], None],
    multiplier: Tensor | None = None,
    keep_rows: KeepRows | None = None,
) -> Products:
    """W @ B and W.T @ A, of a symmetric plan (W + W.T) @ A, where ``write`` fills a panel with W times ``multiplier``.

    A panel has room for whole tiles, of a's dtype, in at most ``workspace_bytes``. Of a plan that isn't symmetric the
    rows of W @ B are complete one panel after the other: with ``keep_rows`` they are never all in float32.
    """
    needs_b = needs_b and not plan.symmetric
    if not (needs_a or needs_b):
        return Products(None, None)
    (n, d), m = a.shape, b.shape[0]
    panels = cut(n, m, tile, workspace_bytes // a.element_size(), plan.symmetric)
    rows, columns = map(max, zip(*(panel.shape for panel in panels), strict=True))
    workspace = a.new_empty(round_up(rows, tile[0]), round_up(columns, tile[1]))

    # the first panel of a row or column block overwrites what is there
    def empty(count: int) -> Tensor:
        return torch.empty(count, d, dtype=torch.float32, device=a.device)

    sum_a = empty(n if keep_rows is None else rows) if needs_a else None
    sum_b = empty(m) if needs_b else None
    for panel in panels:
        write(panel, workspace)
        weights = workspace[: panel.shape[0], : panel.shape[1]]
        beta_rows, beta_columns = int(panel.column_begin > 0), int(panel.row_begin > 0)
        if sum_a is not None:
            own = sum_a[panel.rows] if keep_rows is None else sum_a[: panel.shape[0]]
            add_product(own, weights, b[panel.columns], beta_rows)
            if panel.column_end == m and not plan.symmetric:
                _unlift(own, multiplier)
                if keep_rows is not None:
                    keep_rows(panel.rows, own)
        if sum_b is not None:
            add_product(sum_b[panel.columns], weights.t(), a[panel.rows], beta_columns)
        if plan.symmetric and not panel.mirror:
            add_product(sum_a[panel.columns], weights.t(), a[panel.rows], beta_columns)
    _unlift(sum_a if plan.symmetric else sum_b, multiplier)
    return Products(sum_a if keep_rows is None else None, sum_b)


def _unlift(product: Tensor | None, multiplier: Tensor | None) -> None:
    if product is not None and multiplier is not None:
        product.div_(multiplier)


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


def cut(n: int, m: int, tile: tuple[int, int], elements: int, symmetric: bool) -> list[Panel]:
    """S in bounded panels of whole tiles, rows after rows: first tall, so that W @ B fills a GPU, then wide."""
    tile_m, tile_n = tile
    elements = min(elements, MOST_ELEMENTS)
    tallest = max(tile_m, min(TALLEST, math.isqrt(elements)) // tile_m * tile_m)
    height = min(round_up(n, tile_m), tallest)
    width = max(tile_n, elements // height // tile_n * tile_n)
    panels = []
    for row_begin in range(0, n, height):
        row_end = min(row_begin + height, n)
        first_column = 0
        if symmetric:
            panels.append(Panel(row_begin, row_end, row_begin, row_end, mirror=True))
            first_column = row_end
        for column_begin in range(first_column, m, width):
            panels.append(Panel(row_begin, row_end, column_begin, min(column_begin + width, m)))
    return panels


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def add_product(accumulator: Tensor, weights: Tensor, vectors: Tensor, beta: int) -> None:
    """accumulator = beta * accumulator + weights @ vectors; with beta 0 it may hold anything."""
    if accumulator.is_cuda and weights.dtype is not torch.float32:
        torch.addmm(accumulator, weights, vectors, beta=beta, out_dtype=torch.float32, out=accumulator)
    else:
        torch.addmm(accumulator, weights.float(), vectors.float(), beta=beta, out=accumulator)
