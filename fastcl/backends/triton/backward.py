"""The backward on the host: panels of W from the weights kernel, multiplied by library GEMMs into float32 sums.

A panel is bounded whatever N and M are. Of a symmetric plan only panels on and above the diagonal are formed: W already
holds both directions, so one panel off the diagonal feeds the rows I as W @ Z_J and the rows J as W.T @ Z_I.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastcl import tuning
from fastcl.backends.triton import launch
from fastcl.backends.triton.kernels.weights import weights_kernel
from fastcl.backends.triton.plan import MAX_CODE, Constants, TermCode, constants, table_entry
from fastcl.terms import Plan, Products, Statistics

_PANEL_ROWS = 8192
MOST_ELEMENTS = 2**30
GROUP_M = 8


class Panel(NamedTuple):
    """A block of W; ``mirror`` where it lies on a symmetric plan's diagonal."""

    row_begin: int
    row_end: int
    column_begin: int
    column_end: int
    mirror: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_end - self.row_begin, self.column_end - self.column_begin


def gradient(
    plan: Plan,
    x: launch.Inputs,
    statistics: Statistics,
    incoming: Statistics,
    needs_a: bool,
    needs_b: bool,
) -> Products:
    if plan.symmetric:
        needs_b = False
    if not (needs_a or needs_b):
        return Products(None, None)
    codes = constants(plan)
    n, m, d = x.shape
    row_statistics, row_incoming = statistics.rows.contiguous(), incoming.rows.contiguous()
    if plan.symmetric:
        column_statistics, column_incoming = row_statistics, row_incoming
    else:
        column_statistics, column_incoming = statistics.columns.contiguous(), incoming.columns.contiguous()
    multiplier = _multiplier(codes, row_incoming, column_incoming, x.a.dtype)

    # the first panel of a row or column block overwrites what is there
    grad_a = torch.empty(n, d, dtype=torch.float32, device=x.a.device) if needs_a else None
    grad_b = torch.empty(m, d, dtype=torch.float32, device=x.a.device) if needs_b else None
    config = launch.configuration(table_entry("weights", plan), x.a, n, m)
    height, width = _panel_shape(n, m, x.a, config)
    panels = list(_panels(n, m, height, width, plan.symmetric))
    panel_rows, panel_columns = map(max, zip(*(panel.shape for panel in panels), strict=True))
    workspace = torch.empty(
        round_up(panel_rows, config.block_m),
        round_up(panel_columns, config.block_n),
        dtype=x.a.dtype,
        device=x.a.device,
    )
    with launch.on_device(x.a):
        for panel in panels:
            rows, columns = panel.shape
            weights_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)](
                x.a,
                x.b,
                x.scale,
                x.shift,
                x.target,
                x.row_tags,
                x.column_tags,
                row_statistics,
                column_statistics,
                row_incoming,
                column_incoming,
                multiplier,
                workspace,
                n,
                m,
                d,
                x.a.stride(0),
                x.b.stride(0),
                x.self_offset,
                x.first_column,
                x.threshold,
                *panel[:4],
                workspace.stride(0),
                MIRROR=panel.mirror,
                GROUP_M=GROUP_M,
                **launch.constant_arguments(codes, x, config),
            )
            weights = workspace[:rows, :columns]
            of_rows = slice(panel.row_begin, panel.row_end)
            of_columns = slice(panel.column_begin, panel.column_end)
            beta_rows, beta_columns = int(panel.column_begin > 0), int(panel.row_begin > 0)
            if grad_a is not None:
                add_product(grad_a[of_rows], weights, x.b[of_columns], beta_rows)
            if grad_b is not None:
                add_product(grad_b[of_columns], weights.t(), x.a[of_rows], beta_columns)
            if plan.symmetric and not panel.mirror:
                add_product(grad_a[of_columns], weights.t(), x.a[of_rows], beta_columns)
    return Products(*(_unscaled(grad, multiplier) for grad in (grad_a, grad_b)))


def _panel_shape(n: int, m: int, like: Tensor, config: tuning.Config) -> tuple[int, int]:
    """A bounded panel of whole tiles: first tall, so that W @ B fills a GPU, then wide."""
    elements = min(tuning.workspace_bytes(launch.capability(like)) // like.element_size(), MOST_ELEMENTS)
    tallest = max(config.block_m, min(_PANEL_ROWS, math.isqrt(elements)) // config.block_m * config.block_m)
    height = min(round_up(n, config.block_m), tallest)
    width = max(config.block_n, elements // height // config.block_n * config.block_n)
    return height, width


def round_up(count: int, multiple: int) -> int:
    return triton.cdiv(count, multiple) * multiple


def _panels(n: int, m: int, height: int, width: int, symmetric: bool) -> Iterator[Panel]:
    for row_begin in range(0, n, height):
        row_end = min(row_begin + height, n)
        first_column = 0
        if symmetric:
            yield Panel(row_begin, row_end, row_begin, row_end, mirror=True)
            first_column = row_end
        for column_begin in range(first_column, m, width):
            yield Panel(row_begin, row_end, column_begin, min(column_begin + width, m))


def _multiplier(codes: Constants, row_incoming: Tensor, column_incoming: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A power of two that lifts W into float16's range: |W| is at most the largest |gradient| of each term, summed.

    Without it nearly all of W, about 1/N each, would be subnormal; with N itself a loss scaled by GradScaler overflows.
    """
    if dtype is not torch.float16:
        return None
    bound = _largest_sum(codes.row_terms, row_incoming) + _largest_sum(codes.column_terms, column_incoming)
    multiplier = torch.exp2(14.0 - torch.ceil(torch.log2(bound)).clamp(-100.0, 100.0))
    return torch.where(torch.isfinite(bound) & (bound > 0), multiplier, 1.0)


def _largest_sum(terms: tuple[TermCode, ...], incoming: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.float32, device=incoming.device)
    return sum((incoming[t].abs().amax() for t, (reduce, *_) in enumerate(terms) if reduce != MAX_CODE), zero)


def _unscaled(grad: Tensor | None, multiplier: Tensor | None) -> Tensor | None:
    return grad if grad is None or multiplier is None else grad.div_(multiplier)


def add_product(accumulator: Tensor, weights: Tensor, vectors: Tensor, beta: int) -> None:
    """accumulator = beta * accumulator + weights @ vectors; with beta 0 it may hold anything."""
    if accumulator.is_cuda and weights.dtype is not torch.float32:
        torch.addmm(accumulator, weights, vectors, beta=beta, out_dtype=torch.float32, out=accumulator)
    else:
        torch.addmm(accumulator, weights.float(), vectors.float(), beta=beta, out=accumulator)
