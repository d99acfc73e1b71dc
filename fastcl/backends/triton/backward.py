"""The backward on the host: the weights kernel fills panels of W, which library products multiply.

Of a symmetric plan with rows so short that their sums fit into registers, one kernel may do both.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastcl import tuning
from fastcl.backends import panels
from fastcl.backends.triton import launch
from fastcl.backends.triton.kernels.registers import registers_kernel
from fastcl.backends.triton.kernels.weights import weights_kernel
from fastcl.backends.triton.plan import Constants, constants, table_entry
from fastcl.terms import Plan, Products, Statistics

GROUP_M = 8


def gradient(
    plan: Plan,
    x: launch.Inputs,
    statistics: Statistics,
    incoming: Statistics,
    needs_a: bool,
    needs_b: bool,
    keep_rows: panels.KeepRows | None = None,
) -> Products:
    codes = constants(plan)
    n, m, d = x.shape
    multiplier = panels.multiplier(plan, incoming, x.a.dtype)
    rows = statistics.rows.contiguous(), incoming.rows.contiguous()
    columns = rows if plan.symmetric else (statistics.columns.contiguous(), incoming.columns.contiguous())
    if plan.symmetric and needs_a and (in_registers := _registers(plan, x)) is not None:
        return Products(_in_registers(codes, x, *rows, multiplier, in_registers), None)
    config = launch.configuration(table_entry("weights", plan), x.a, n, m)

    def write(panel: panels.Panel, out: Tensor) -> None:
        height, width = panel.shape
        tiles = triton.cdiv(height, config.block_m) * triton.cdiv(width, config.block_n)
        weights_kernel[(launch.programs(tiles, x.a, config),)](
            x.a,
            x.b,
            *launch.operand_tiles(x, config),
            x.scale,
            x.shift,
            x.target,
            x.row_tags,
            x.column_tags,
            rows[0],
            columns[0],
            rows[1],
            columns[1],
            multiplier,
            out,
            n,
            m,
            d,
            x.a.stride(0),
            x.b.stride(0),
            x.self_offset,
            x.first_column,
            x.threshold,
            *panel[:4],
            out.stride(0),
            MIRROR=panel.mirror,
            GROUP_M=GROUP_M,
            PERSISTENT=config.persistent,
            **launch.constant_arguments(codes, x, config),
        )

    with launch.on_device(x.a):
        return panels.products(
            plan,
            x.a,
            x.b,
            needs_a,
            needs_b,
            (config.block_m, config.block_n),
            tuning.workspace_bytes(launch.capability(x.a)),
            write,
            multiplier,
            keep_rows,
        )


def _registers(plan: Plan, x: launch.Inputs) -> tuning.Config | None:
    """Masks that test tags would take the registers that the sums are in."""
    if not plan.names_pairs:
        return None
    precision = tuning.precision_class(x.a.dtype, launch.matmul_precision(x.a.dtype))
    return tuning.registers(precision, launch.capability(x.a), x.a.shape[1])


def _in_registers(
    codes: Constants,
    x: launch.Inputs,
    statistics: Tensor,
    incoming: Tensor,
    multiplier: Tensor | None,
    config: tuning.Config,
) -> Tensor:
    n, d = x.a.shape
    product = torch.empty(n, d, dtype=torch.float32, device=x.a.device)
    with launch.on_device(x.a):
        registers_kernel[(triton.cdiv(n, config.block_m),)](
            x.a,
            x.scale,
            x.shift,
            x.target,
            x.row_tags,
            statistics,
            incoming,
            multiplier,
            product,
            n,
            d,
            x.a.stride(0),
            x.self_offset,
            x.first_column,
            x.threshold,
            TERMS=codes.row_terms,
            USES_SELF=codes.uses_self,
            USES_TARGET=codes.uses_target,
            PIECE=min(config.piece, config.block_n),
            **launch.tile_arguments(x, config),
        )
    return product
