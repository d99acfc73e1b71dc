"""The forward on the host: one sweep, its partial results combined, flagged log-sum-exps redone."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from fastcl.backends.triton import launch
from fastcl.backends.triton.kernels.combine import combine_kernel
from fastcl.backends.triton.kernels.sweep import sweep_kernel
from fastcl.backends.triton.plan import Constants, TermCode, constants, table_entry
from fastcl.terms import Plan, Statistics

_MOST_SUPER_TILES = 32


def statistics(plan: Plan, x: launch.Inputs) -> Statistics:
    codes = constants(plan)
    n, m, d = x.shape
    config = launch.configuration(table_entry("sweep", plan), x.a, n, m)
    super_rows, row_slots = _super_tiles(n, config.block_m)
    super_columns, column_slots = _super_tiles(m, config.block_n)
    row_partials = _partials(codes.row_terms, column_slots, n, x.a)
    column_partials = row_partials if plan.symmetric else _partials(codes.column_terms, row_slots, m, x.a)
    super_tiles = row_slots * (row_slots + 1) // 2 if plan.symmetric else row_slots * column_slots
    with launch.on_device(x.a):
        sweep_kernel[(launch.programs(super_tiles, x.a, config),)](
            x.a,
            x.b,
            *launch.operand_tiles(x, config),
            x.scale,
            x.shift,
            x.target,
            x.row_tags,
            x.column_tags,
            row_partials,
            column_partials,
            n,
            m,
            d,
            x.a.stride(0),
            x.b.stride(0),
            x.self_offset,
            x.first_column,
            super_rows,
            super_columns,
            PERSISTENT=config.persistent,
            **launch.constant_arguments(codes, x, config),
        )
        rows = finished(codes, row_partials, x, own_is_row=True)
        if plan.symmetric:
            return Statistics(rows, rows.new_empty(0, m))
        return Statistics(rows, finished(codes, column_partials, x, own_is_row=False))


def _super_tiles(count: int, multiple: int) -> tuple[int, int]:
    """The side of a super-tile and how many there are; a function of the shape alone, hence the same bits each time."""
    tiles = math.ceil(count / multiple)
    side = math.ceil(tiles / _MOST_SUPER_TILES) * multiple
    return side, math.ceil(count / side)


def _partials(terms: tuple[TermCode, ...], slots: int, count: int, like: Tensor) -> Tensor:
    return torch.empty(len(terms), slots, count, dtype=torch.float32, device=like.device)


def finished(codes: Constants, partials: Tensor, x: launch.Inputs, own_is_row: bool) -> Tensor:
    """The statistics [terms, count] of rows or columns from their partial results [terms, slots, count]."""
    terms = codes.row_terms if own_is_row else codes.column_terms
    _, slots, count = partials.shape
    result = torch.empty(len(terms), count, dtype=torch.float32, device=partials.device)
    if not terms:
        return result
    own, other = (x.a, x.b) if own_is_row else (x.b, x.a)
    own_tags, other_tags = (x.row_tags, x.column_tags) if own_is_row else (x.column_tags, x.row_tags)
    config = launch.configuration("redo", x.a, own.shape[0], other.shape[0])
    combine_kernel[(triton.cdiv(count, config.block_m),)](
        partials,
        result,
        own,
        other,
        x.scale,
        x.shift,
        x.target,
        own_tags,
        other_tags,
        own.shape[0],
        other.shape[0],
        own.shape[1],
        own.stride(0),
        other.stride(0),
        x.self_offset,
        x.first_column,
        x.threshold,
        slots,
        OWN_IS_ROW=own_is_row,
        TERMS=terms,
        LABEL_WIDTH=codes.label_width,
        **launch.tile_arguments(x, config),
    )
    return result
