"""The panel function of :mod:`fastcl.losses.sigmoid` on the host: one sweep over panels for its value and gradient."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastcl import tuning
from fastcl.backends import panels
from fastcl.backends.panels import Panel
from fastcl.backends.softmax import finish
from fastcl.backends.triton import launch, partials
from fastcl.backends.triton.backward import GROUP_M
from fastcl.backends.triton.kernels.sigmoid import sigmoid_kernel
from fastcl.terms import Needs, Operands, PanelGradients, PanelNeeds, PanelOperands, Plan, Products


def value_and_gradients(x: PanelOperands, incoming: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    sweep = _Sweep(x, incoming, needs)
    products = Products(None, None)
    with launch.on_device(x.a):
        if needs.product_a or needs.b:
            products = panels.products(
                Plan(()),
                sweep.a,
                sweep.b,
                needs.product_a,
                needs.b,
                (sweep.config.block_m, sweep.config.block_n),
                sweep.workspace_bytes,
                sweep.run,
                sweep.multiplier,
            )
        else:
            for panel in partials.bare_panels(*x.shape, sweep.config):
                sweep.run(panel, None)
        operands = Operands(sweep.a, sweep.b, x.scale)
        gradients = finish(Plan(()), operands, products, Needs(needs.a, needs.b, needs.scale), x.scale.dtype)
    columns = None if sweep.columns is None else sweep.columns.neg_()[None]
    return PanelGradients(*gradients, sweep.bias, None, columns, None if sweep.costs is None else sweep.costs[None])


class _Sweep:
    """The kernel over one panel after the other, and what their partial sums add up to, in the order of the panels."""

    def __init__(self, x: PanelOperands, incoming: Tensor | None, needs: PanelNeeds) -> None:
        self.a, self.b = launch.unit_stride(x.a), launch.unit_stride(x.keys)
        self.x, self.incoming = x, None if incoming is None else launch.vector(incoming[0])
        self.factors, self.offsets = (
            None if params is None else launch.vector(params[0]) for params in (x.row_params, x.column_params)
        )
        self.tags, self.key_tags = (launch.contiguous(tags) for tags in (x.tags, x.key_tags))
        is_tagged = x.tags.labels is not None or x.tags.ids is not None
        self.config = launch.configuration("weights_tags" if is_tagged else "sigmoid", self.a, *x.shape)
        self.workspace_bytes = tuning.workspace_bytes(launch.capability(self.a))
        self.multiplier = None
        if incoming is not None and self.a.dtype is torch.float16:
            bound = self.incoming.abs().amax()
            if self.factors is not None:
                bound = bound * self.factors.abs().amax().clamp_min(1.0)
            self.multiplier = panels.lifting_power(bound)
        n, m = x.shape
        self.costs = x.scale.new_empty(n) if needs.values else None
        self.columns = x.scale.new_empty(m) if needs.column_params else None
        self.bias = x.scale.new_zeros(()) if needs.bias else None

    def run(self, panel: Panel, workspace: Tensor | None) -> None:
        """Fills the workspace with W, and adds up the rest."""
        x, (rows, columns) = self.x, panel.shape
        tiles_m, tiles_n = triton.cdiv(rows, self.config.block_m), triton.cdiv(columns, self.config.block_n)

        def empty(sums: Tensor | None, slots: int, count: int) -> Tensor | None:
            return None if sums is None else x.scale.new_empty(slots, count)

        costs = empty(self.costs, tiles_n, rows)
        row_sums = empty(self.bias, tiles_n, rows)
        column_sums = empty(self.columns, tiles_m, columns)
        sigmoid_kernel[(tiles_m * tiles_n,)](
            self.a,
            self.b,
            x.scale,
            x.bias,
            self.offsets,
            self.factors,
            self.incoming,
            x.row0,
            self.tags,
            self.key_tags,
            self.multiplier,
            costs,
            row_sums,
            column_sums,
            workspace,
            *x.shape,
            self.a.shape[1],
            self.a.stride(0),
            self.b.stride(0),
            *panel[:4],
            0 if workspace is None else workspace.stride(0),
            GROUP_M=GROUP_M,
            **launch.tile_arguments(x, self.config),
        )
        partials.add(self.costs, panel.rows, costs, panel.column_begin == 0)
        partials.add(self.columns, panel.columns, column_sums, panel.row_begin == 0)
        if row_sums is not None:
            self.bias += row_sums.sum()
