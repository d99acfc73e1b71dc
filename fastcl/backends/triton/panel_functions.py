"""Panel functions on the host: what the kernel is given for each, and the sweeps over panels that it takes.

Row statistics that a slope needs are found in a sweep of their own; what remains is a sum over tiles, of values and
gradients both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastcl import tuning
from fastcl.backends import panels
from fastcl.backends.panels import Panel
from fastcl.backends.softmax import finish
from fastcl.backends.triton import launch, partials
from fastcl.backends.triton.backward import GROUP_M
from fastcl.backends.triton.kernels import pair_functions
from fastcl.backends.triton.kernels.panel_function import panel_function_kernel
from fastcl.terms import Needs, Operands, PanelGradients, PanelNeeds, PanelOperands, Plan, Products


def _log_sum_exps(slots: Tensor) -> Tensor:
    return slots.logsumexp(dim=1)


def _sum(slots: Tensor) -> Tensor:
    return slots.sum(dim=1)


def _of_hardest(slots: Tensor) -> Tensor:
    """Columns of the farthest positive and the nearest negative, the first of several, -1 where one is missing."""
    (farthest, of_farthest), (nearest, of_nearest) = slots[0].max(dim=0), slots[2].min(dim=0)
    columns = torch.cat((slots[1].gather(0, of_farthest[None]), slots[3].gather(0, of_nearest[None])))
    return columns.where((farthest > -torch.inf) & (nearest < torch.inf), -1.0)


def _of_similarities(slots: Tensor) -> Tensor:
    return torch.cat((slots[:2].amax(dim=1), slots[2:].sum(dim=1)))


def _of_nearest(slots: Tensor) -> Tensor:
    return torch.stack((slots[0].sum(dim=0), slots[1].amin(dim=0)))


def _of_norms(sums: Tensor) -> Tensor:
    """The gradient of parameters of which the last are squared norms, halved in W, from the sums of W and others."""
    return torch.cat((sums[1:], -0.5 * sums[:1]))


def _of_norms_and_positives(sums: Tensor) -> Tensor:
    return torch.cat((-0.5 * sums, sums))


class Function(NamedTuple):
    """A panel function in terms of functions of a tile, from ``pair_functions``."""

    statistics: Any = None
    """makes ``vectors`` numbers of each row of a tile"""
    vectors: int = 0
    combine: Callable[[Tensor], Tensor] = _log_sum_exps
    """from these of each tile, [vectors, tiles, rows], to those of a row, [..., rows]"""
    pairs: Any = None
    """makes W, given the statistics"""
    sums: int = 0
    """values that are sums over the tiles that ``pairs`` makes; without any the statistics are the values"""
    incoming: tuple[int, ...] = (0,)
    """the outputs that have a gradient"""
    more: int = 0
    """sums over rows and over columns, beyond W's"""
    is_steep: bool = False
    """whether W may be much larger than the incoming gradient"""
    of_rows: Callable[[Tensor], Tensor] = _of_norms
    """from the sums of W and others over rows, [1 + more, N], to the gradients of the rows' parameters"""


def _energy(statistics: Any, pairs: Any) -> Function:
    return Function(statistics, 1, pairs=pairs, sums=1, of_rows=_of_norms_and_positives)


FUNCTIONS = {
    "contrastive": Function(pairs=pair_functions.contrastive, sums=4, incoming=(0, 2), is_steep=True),
    "negatives": Function(pair_functions.negatives_lse, 1, pairs=pair_functions.negatives, is_steep=True),
    "lifted": Function(pairs=pair_functions.lifted, sums=2, more=1, is_steep=True),
    "hardest": Function(pair_functions.hardest, 4, _of_hardest),
    "similarities": Function(pair_functions.similarities, 4, _of_similarities),
    "nearest": Function(pair_functions.nearest, 2, _of_nearest),
    "energy_softmax": _energy(pair_functions.softmax_lse, pair_functions.softmax),
    "energy_uniform": _energy(pair_functions.count, pair_functions.uniform)._replace(combine=_sum),
    "energy_power": _energy(pair_functions.power_lse, pair_functions.power),
    "soft_targets": Function(pair_functions.soft_targets_lse, 2, pairs=pair_functions.soft_targets, sums=1),
}


def value_and_gradients(
    name: str, x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds
) -> PanelGradients:
    function = FUNCTIONS[name]
    if function.is_steep and incoming is not None and x.a.dtype is torch.float16:
        # One over a small distance has no room in a panel of W.
        x = replace(x, a=x.a.float(), b=x.keys.float())
    with launch.on_device(x.a):
        tiles = _Tiles(x)
        found = None
        if function.sums == 0 and values is not None:
            found = values
        elif function.statistics is not None:
            found = _statistics(function, tiles)
        if function.sums == 0:
            values = found if needs.values else None
            needs = needs._replace(values=False)
        if not any(needs):
            return PanelGradients(*[None] * 6, values)
        sums = _Sums(function, tiles, found, incoming, needs)
        products = sums.sweep(needs)
        operands = Operands(tiles.x.a, tiles.x.b, x.scale)
        gradients = finish(Plan(()), operands, products, Needs(needs.a, needs.b, needs.scale), x.scale.dtype)
    return PanelGradients(
        *gradients,
        sums.rows[0].sum() if needs.bias else None,
        function.of_rows(sums.rows)[: len(x.row_params)] if needs.row_params else None,
        _of_norms(sums.columns)[: len(x.column_params)] if needs.column_params else None,
        values if function.sums == 0 else sums.values,
    )


class _Tiles:
    """The operands as the kernel wants them."""

    def __init__(self, x: PanelOperands) -> None:
        self.x = replace(x, a=launch.unit_stride(x.a), b=launch.unit_stride(x.keys))
        self.tags = [launch.contiguous(tags._replace(threshold=None)) for tags in (x.tags, x.key_tags)]
        self.params = [_vectors(params) for params in (x.row_params, x.column_params)]
        self.guide = [None, None, None]
        if x.guide:
            of_rows, of_columns, scale = x.guide
            if of_rows.dtype is torch.float64:
                of_rows, of_columns = of_rows.float(), of_columns.float()
            self.guide = [launch.unit_stride(of_rows), launch.unit_stride(of_columns), scale.float()]
        features = [part for part in (self.x.a, self.guide[0]) if part is not None]
        self.config = launch.configuration("weights_tags", max(features, key=Tensor.element_size), *x.shape)

    def shape(self, panel: Panel) -> tuple[int, int]:
        rows, columns = panel.shape
        return triton.cdiv(rows, self.config.block_m), triton.cdiv(columns, self.config.block_n)

    def run(
        self,
        function: Any,
        panel: Panel,
        *,
        values: Tensor | None = None,
        row_sums: Tensor | None = None,
        column_sums: Tensor | None = None,
        workspace: Tensor | None = None,
        found: Tensor | None = None,
        incoming: Sequence[Tensor] | None = None,
        multiplier: Tensor | None = None,
    ) -> None:
        """Fills what is given with what the function makes of the panel's tiles."""
        x, (tiles_m, tiles_n), (guide_a, guide_b, _) = self.x, self.shape(panel), self.guide
        depth, strides = 0, (0, 0)
        if guide_a is not None:
            depth, strides = guide_a.shape[1], (guide_a.stride(0), guide_b.stride(0))
        panel_function_kernel[(tiles_m * tiles_n,)](
            x.a,
            x.b,
            x.scale,
            x.bias,
            *self.guide,
            *self.params,
            _vectors(found),
            incoming,
            tuple(map(float, x.numbers)),
            x.row0,
            *self.tags,
            multiplier,
            values,
            row_sums,
            column_sums,
            workspace,
            *x.shape,
            x.a.shape[1],
            depth,
            x.a.stride(0),
            x.b.stride(0),
            *strides,
            *panel[:4],
            0 if workspace is None else workspace.stride(0),
            FUNCTION=function,
            EVEN_GUIDE=depth % self.config.block_d == 0,
            GUIDE_PRECISION=launch.matmul_precision(x.a.dtype if guide_a is None else guide_a.dtype),
            GROUP_M=GROUP_M,
            **launch.tile_arguments(x, self.config),
        )


def _vectors(rows: Tensor | None) -> tuple[Tensor, ...]:
    return () if rows is None else tuple(launch.vector(row) for row in rows)


def _statistics(function: Function, tiles: _Tiles) -> Tensor:
    """[..., N], in sweeps over whole rows."""
    found = []
    for panel in partials.bare_panels(*tiles.x.shape, tiles.config, function.vectors):
        slots = tiles.x.scale.new_empty(function.vectors, tiles.shape(panel)[1], panel.shape[0])
        tiles.run(function.statistics, panel, values=slots)
        found.append(function.combine(slots))
    return torch.cat(found, dim=1)


class _Sums:
    """What one panel after the other adds up to, in their order."""

    def __init__(
        self, function: Function, tiles: _Tiles, found: Tensor | None, incoming: Tensor | None, needs: PanelNeeds
    ) -> None:
        self.function, self.tiles, self.found = function, tiles, found
        (n, m), scale = tiles.x.shape, tiles.x.scale
        self.incoming = self.multiplier = None
        if incoming is not None:
            self.incoming = tuple(launch.vector(incoming[k]) for k in function.incoming)
            if tiles.x.a.dtype is torch.float16:
                self.multiplier = panels.lifting_power(self.incoming[0].abs().amax())
        self.values = scale.new_empty(function.sums, n) if needs.values else None
        self.rows = scale.new_empty(1 + function.more, n) if needs.bias or needs.row_params else None
        self.columns = scale.new_empty(1 + function.more, m) if needs.column_params else None

    def sweep(self, needs: PanelNeeds) -> Products:
        x, config = self.tiles.x, self.tiles.config
        if needs.product_a or needs.b:
            return panels.products(
                Plan(()),
                x.a,
                x.b,
                needs.product_a,
                needs.b,
                (config.block_m, config.block_n),
                tuning.workspace_bytes(launch.capability(x.a)),
                self.run,
                self.multiplier,
            )
        for panel in partials.bare_panels(*x.shape, config, self.function.sums + 1 + self.function.more):
            self.run(panel, None)
        return Products(None, None)

    def run(self, panel: Panel, workspace: Tensor | None) -> None:
        """Fills the workspace with W, and adds up the rest."""
        (tiles_m, tiles_n), (rows, columns) = self.tiles.shape(panel), panel.shape

        def empty(sums: Tensor | None, slots: int, count: int) -> Tensor | None:
            return None if sums is None else sums.new_empty(len(sums), slots, count)

        values, row_sums = (empty(sums, tiles_n, rows) for sums in (self.values, self.rows))
        column_sums = empty(self.columns, tiles_m, columns)
        self.tiles.run(
            self.function.pairs,
            panel,
            values=values,
            row_sums=row_sums,
            column_sums=column_sums,
            workspace=workspace,
            found=self.found,
            incoming=self.incoming,
            multiplier=self.multiplier,
        )
        partials.add(self.values, panel.rows, values, panel.column_begin == 0)
        partials.add(self.rows, panel.rows, row_sums, panel.column_begin == 0)
        partials.add(self.columns, panel.columns, column_sums, panel.row_begin == 0)
