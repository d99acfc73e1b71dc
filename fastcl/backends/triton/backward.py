"""The backward on the host: the weights kernel fills panels of W, which library products multiply."""

from __future__ import annotations

import triton
from torch import Tensor

from fastcl import tuning
from fastcl.backends import panels
from fastcl.backends.triton import launch
from fastcl.backends.triton.kernels.weights import weights_kernel
from fastcl.backends.triton.plan import constants, table_entry
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
    config = launch.configuration(table_entry("weights", plan), x.a, n, m)

    def write(panel: panels.Panel, out: Tensor) -> None:
        height, width = panel.shape
        weights_kernel[(triton.cdiv(height, config.block_m) * triton.cdiv(width, config.block_n),)](
            x.a,
            x.b,
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
