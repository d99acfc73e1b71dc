"""A softmax loss along rows, value and gradients from one sweep: panels of whole rows of E = exp(S - shift).

A panel's rows are complete, so their log-sum-exps are known before their gradient is formed. E is kept in place of S,
and with it no second sweep is needed: W = diag(r) E, so that W @ B = diag(r) (E @ B) and W.T @ A = E.T @ (diag(r) A).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastcl import tuning
from fastcl.backends.panels import MOST_ELEMENTS, KeepRows, add_product, round_up
from fastcl.backends.triton import launch
from fastcl.backends.triton.backward import GROUP_M
from fastcl.backends.triton.forward import finished
from fastcl.backends.triton.kernels.exponentials import exponentials_kernel, repair_kernel
from fastcl.backends.triton.kernels.head import head_kernel
from fastcl.backends.triton.loss import LossAndProducts
from fastcl.backends.triton.plan import LSE_CODE, SUM_CODE, Constants, TermCode, constants, table_entry
from fastcl.terms import CrossEntropy, Needs, Plan, Products, Reduce, Statistics

_LOWEST_PANEL = 1024
"""rows of a panel that still keep a GPU's matrix product busy"""
_RAISED_BY = 40.0
"""added to the fixed shift: E then stays below exp(40), far from overflow in E @ B, and r above exp(-40) of its row's
weight, while rows with a log-sum-exp down to 60 below the bound still need no shift of their own"""
_HEAD_BLOCK = 128
_PROGRAMS_OF_A_REPAIR = 32


def panel_rows(plan: Plan, x: launch.Inputs, head: CrossEntropy) -> int:
    """The height of the panels, 0 where they don't serve this loss or too few whole rows fit into the workspace."""
    denses = [term.mask.is_sparse for term in plan.rows if term.reduce is Reduce.LSE]
    sums = [term.mask.is_sparse for term in plan.rows if term.reduce is Reduce.SUM]
    if plan.symmetric or plan.columns or denses != [False] or (head.positive is None and sums != [True]):
        return 0
    if head.positive is None and not all(term.mask.names_pairs for term in plan.rows if term.reduce is Reduce.SUM):
        return 0  # the head looks for the positive where the self pair or the target is
    if x.a.dtype is torch.float16:
        return 0  # it can't hold the range of E
    n, m, _ = x.shape
    config = launch.configuration(table_entry("weights", plan), x.a, n, m)
    elements = min(tuning.workspace_bytes(launch.capability(x.a)) // x.a.element_size(), MOST_ELEMENTS)
    fitting = elements // round_up(m, config.block_n) // config.block_m * config.block_m
    if fitting < min(_LOWEST_PANEL, n):
        return 0
    return round_up(math.ceil(n / math.ceil(n / fitting)), config.block_m)


class _Rows(NamedTuple):
    """What the head makes of rows: their losses, their r, and the gradients of their positives where wanted."""

    losses: Tensor
    factors: Tensor
    positive: Tensor | None

    def of(self, rows: slice) -> _Rows:
        return _Rows(*(None if x is None else x[rows] for x in self))


def cross_entropy(
    plan: Plan, x: launch.Inputs, head: CrossEntropy, needs: Needs, keep_rows: KeepRows | None, height: int
) -> LossAndProducts:
    """Loss and products from panels of ``height`` rows, as :func:`panel_rows` has it, where a product is needed."""
    x = x._replace(shift=x.shift + _RAISED_BY)
    n, m, d = x.shape
    codes = constants(plan)
    config = launch.configuration(table_entry("weights", plan), x.a, n, m)
    workspace = x.a.new_empty(height, round_up(m, config.block_n))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.a.device)

    found = _Rows(empty(n), empty(n), empty(n) if needs.positive else None)
    sum_a = empty(n if keep_rows is None else min(height, n), d) if needs.product_a else None
    sum_b = empty(m, d) if needs.b else None
    values = []
    with launch.on_device(x.a):
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            own = _rows_of(x, rows)
            panel = workspace[: own.shape[0], :m]
            values.append(_exponentials(codes, own, panel, config))
            _apply(_rows_of_head(head, rows), head.factor(plan, n), codes, own, values[-1], panel, found.of(rows))
            factors = found.factors[rows, None]
            if sum_a is not None:
                rows_of_a = sum_a[rows] if keep_rows is None else sum_a[: len(factors)]
                add_product(rows_of_a, panel, x.b, beta=0)
                rows_of_a.mul_(factors)
                if keep_rows is not None:
                    keep_rows(rows, rows_of_a)
            if sum_b is not None:
                scaled = torch.mul(own.a, factors, out=torch.empty_like(own.a))
                add_product(sum_b, panel.t(), scaled, beta=int(start > 0))
    statistics = Statistics(values[0] if len(values) == 1 else torch.cat(values, dim=1), empty(0, m))
    products = Products(sum_a if keep_rows is None else None, sum_b)
    return LossAndProducts(found.losses, statistics, products, found.positive)


def _rows_of(x: launch.Inputs, rows: slice) -> launch.Inputs:
    target = None if x.target is None else x.target[rows]
    tags = x.row_tags.part(rows)
    return x._replace(a=x.a[rows], target=target, row_tags=tags, self_offset=x.self_offset + rows.start)


def _rows_of_head(head: CrossEntropy, rows: slice) -> CrossEntropy:
    positive, weights = (None if x is None else launch.vector(x[rows]) for x in (head.positive, head.weights))
    return replace(head, positive=positive, weights=weights)


def _exponentials(codes: Constants, x: launch.Inputs, panel: Tensor, config: tuning.Config) -> Tensor:
    """Fills the panel with E and returns the statistics of its rows, [terms, rows]."""
    n, m, d = x.shape
    tiles_m, tiles_n = triton.cdiv(n, config.block_m), triton.cdiv(m, config.block_n)
    partials = torch.empty(len(codes.row_terms), tiles_n, n, dtype=torch.float32, device=x.a.device)
    exponentials_kernel[(tiles_m * tiles_n,)](
        x.a,
        x.b,
        *launch.operand_tiles(x, config),
        x.scale,
        x.shift,
        x.target,
        x.row_tags,
        x.column_tags,
        partials,
        panel,
        n,
        m,
        d,
        x.a.stride(0),
        x.b.stride(0),
        x.self_offset,
        x.first_column,
        panel.stride(0),
        TERMS=codes.row_terms,
        USES_SELF=codes.uses_self,
        USES_TARGET=codes.uses_target,
        LABEL_WIDTH=codes.label_width,
        GROUP_M=GROUP_M,
        **launch.tile_arguments(x, config),
    )
    statistics = finished(codes, partials, x, own_is_row=True)
    lse, term = _of(codes, statistics, LSE_CODE)
    config = launch.configuration("redo", x.a, n, m)
    sharing = min(triton.cdiv(m, config.block_n), _PROGRAMS_OF_A_REPAIR)
    repair_kernel[(triton.cdiv(n, config.block_m), sharing)](
        x.a,
        x.b,
        x.scale,
        x.shift,
        x.target,
        x.row_tags,
        x.column_tags,
        lse,
        panel,
        n,
        m,
        d,
        x.a.stride(0),
        x.b.stride(0),
        x.self_offset,
        x.first_column,
        x.threshold,
        panel.stride(0),
        TERMS=(term,),
        LABEL_WIDTH=codes.label_width,
        **launch.tile_arguments(x, config),
    )
    return statistics


def _apply(
    head: CrossEntropy,
    share: float,
    codes: Constants,
    x: launch.Inputs,
    statistics: Tensor,
    panel: Tensor,
    found: _Rows,
) -> None:
    n, m, _ = x.shape
    lse, _ = _of(codes, statistics, LSE_CODE)
    positive, tests = head.positive, (0, 0)
    if positive is None:
        positive, (_, *tests) = _of(codes, statistics, SUM_CODE)
    head_kernel[(triton.cdiv(n, _HEAD_BLOCK),)](
        lse,
        positive,
        head.weights,
        x.shift,
        x.target,
        panel,
        *found,
        n,
        m,
        x.self_offset,
        x.first_column,
        x.threshold,
        share,
        panel.stride(0),
        SELF=tests[0],
        TARGET=tests[1],
        BLOCK=_HEAD_BLOCK,
    )


def _of(codes: Constants, statistics: Tensor, reduce: int) -> tuple[Tensor, TermCode]:
    """The values and the code of the only term of its kind."""
    return next((values, code) for values, code in zip(statistics, codes.row_terms, strict=True) if code[0] == reduce)
