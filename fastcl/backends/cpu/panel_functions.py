"""Panel functions (:mod:`fastcl.panels`) on the CPU: what the engine is given for each, and the sweeps it takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.backends.cpu.binding import extension, packed, vector
from fastcl.terms import NO_GRADIENTS, PanelGradients, PanelNeeds, PanelOperands


def sigmoid(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.sigmoid`."""
    extension()
    n, m = x.shape
    rows, a, b, scale, bias, shifts = torch.ops.fastcl_cpu.sigmoid(
        x.a.detach(),
        x.keys.detach(),
        x.scale.item(),
        vector(x.bias.expand(m) if x.column_params is None else x.bias - x.column_params[0]),
        x.scale.new_ones(n) if x.row_params is None else vector(x.row_params[0]),
        None if incoming is None else vector(incoming[0]),
        packed((x.tags, x.key_tags)),
        0 if x.row0 is None else int(x.row0),
        needs.a,
        needs.b,
        needs.scale,
        needs.column_params,
        needs.values,
    )
    return PanelGradients(
        a if needs.a else None,
        b if needs.b else None,
        scale if needs.scale else None,
        bias if needs.bias else None,
        None,
        shifts.neg_()[None] if needs.column_params else None,
        rows[None] if needs.values else None,
    )


_PAIR_FUNCTIONS = (
    "contrastive", "negatives", "negatives slope", "lifted", "hardest", "similarities", "nearest", "importance",
    "energy", "power importance", "power energy", "candidates", "soft targets", "squares",
)  # fmt: skip
"""as csrc/cpu/pairs.h numbers them"""


class _Sums(NamedTuple):
    """What a sweep makes of a function of every pair: values, products, and the sums of W."""

    values: Tensor
    a: Tensor
    b: Tensor
    scale: Tensor
    rows: Tensor
    """[1 or 2, N]: with respect to S, and to a parameter"""
    columns: Tensor

    def gradients(
        self,
        needs: PanelNeeds,
        of_rows: Tensor | None = None,
        of_columns: Tensor | None = None,
        values: Tensor | None = None,
    ) -> PanelGradients:
        return PanelGradients(
            self.a if needs.a else None,
            self.b if needs.b else None,
            self.scale if needs.scale else None,
            self.rows[0].sum() if needs.bias else None,
            of_rows if needs.row_params else None,
            of_columns if needs.column_params else None,
            (self.values if values is None else values) if needs.values else None,
        )


def _sweep(
    function: str,
    x: PanelOperands,
    numbers: Sequence[float] = (),
    squares: tuple[Tensor, Tensor] | None = None,
    row_given: Tensor | None = None,
    column_given: Tensor | None = None,
    incoming: Tensor | None = None,
    needs: PanelNeeds = NO_GRADIENTS,
) -> _Sums:
    """``squares`` are the squared norms of rows and columns, if the distance is Euclidean."""
    extension()
    of_rows, of_columns = squares or (None, None)
    guide, guide_scale = ([], 0.0) if function != "soft targets" else (x.guide[:2], x.guide[2].item())
    return _Sums(
        *torch.ops.fastcl_cpu.pairs(
            x.a.detach(),
            x.keys.detach(),
            x.scale.item(),
            x.bias.item(),
            _PAIR_FUNCTIONS.index(function),
            torch.tensor([*numbers, 0.0, 0.0][:2], device="cpu"),
            vector(of_rows),
            vector(of_columns),
            vector(row_given),
            vector(column_given),
            list(guide),
            guide_scale,
            vector(incoming),
            packed((x.tags, x.key_tags)),
            0 if x.row0 is None else int(x.row0),
            needs.a,
            needs.b,
            needs.scale,
        )
    )


def _squares(x: PanelOperands, first: int = 0) -> tuple[Tensor, Tensor] | None:
    """Parameter ``first`` of rows and columns, if there is one (see :func:`fastcl.losses.distances.distances`)."""
    if x.row_params is None or len(x.row_params) == first:
        return None
    return x.row_params[first], x.column_params[first]


def _of_distances(sums: _Sums, x: PanelOperands, needs: PanelNeeds, values: Tensor | None = None) -> PanelGradients:
    """The gradients of a function of distances; S has -2 times the slope of a squared norm."""
    euclidean = x.row_params is not None and len(x.row_params) == len(sums.rows)
    of_rows, of_columns = (
        torch.cat((side[1:], -0.5 * side[:1])) if euclidean else side[1:] for side in (sums.rows, sums.columns)
    )
    return sums.gradients(needs, of_rows, of_columns, values)


def contrastive(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.contrastive`."""
    given = None if incoming is None else incoming[:3]
    sums = _sweep("contrastive", x, x.numbers, _squares(x), incoming=given, needs=needs)
    return _of_distances(sums, x, needs)


def negatives(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The first panel function of :mod:`fastcl.losses.lifted_structure`: its values, then its gradient."""
    if values is None:
        values = _sweep("negatives", x, x.numbers, _squares(x)).values
    if incoming is None:
        return _NOTHING._replace(values=values)
    sums = _sweep("negatives slope", x, x.numbers, _squares(x), values, incoming=incoming, needs=needs)
    return _of_distances(sums, x, needs, values)


def lifted(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The second one."""
    given = None if incoming is None else incoming[:1]
    lse = x.row_params[:1], x.column_params[:1]
    sums = _sweep("lifted", x, x.numbers, _squares(x, 1), *lse, incoming=given, needs=needs)
    return _of_distances(sums, x, needs)


def hardest(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.triplet` that mines. A distance that is NaN is nobody's hardest."""
    farthest, positive, nearest, negative = _sweep("hardest", x, squares=_squares(x)).values
    complete = (farthest > -torch.inf) & (nearest > -torch.inf)
    columns = torch.stack((positive, negative)).where(complete, -1.0)
    return _NOTHING._replace(values=columns)


def similarities(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.distances`."""
    return _NOTHING._replace(values=_sweep("similarities", x, squares=_squares(x)).values)


def nearest(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The distances of :mod:`fastcl.losses.alpha_cl`."""
    positive, negative = _sweep("nearest", x, squares=_squares(x)).values
    return _NOTHING._replace(values=torch.stack((positive, -negative)))


def _energy(
    importance: str, x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds
) -> PanelGradients:
    """The panel functions of :mod:`fastcl.losses.alpha_cl`: the sum of a row's importances, then the energy."""
    tau, power = x.numbers
    squares, (_, to_positive) = _squares(x), x.row_params
    numbers = (0.0,) if importance == "uniform" else (-1.0 / tau, power / 2)
    kind = "power " if importance == "power" else ""
    lse = _sweep(kind + "importance", x, numbers, squares).values[0]
    if importance == "softmax":
        lse = torch.logaddexp(lse, -to_positive / tau)
    sums = _sweep(kind + "energy", x, numbers, squares, torch.stack((to_positive, lse)), incoming=incoming, needs=needs)
    return sums.gradients(needs, torch.cat((-0.5 * sums.rows, sums.rows)), -0.5 * sums.columns)


def soft_targets(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.distillation`: both softmaxes' sums, then the cross entropy."""
    of_rows, of_columns, scale = x.guide
    guide = replace(x, a=of_rows, b=of_columns, scale=scale, bias=torch.zeros((), device="cpu"), guide=())
    both = torch.cat([_sweep("candidates", s).values for s in (x, guide)])
    return _sweep("soft targets", x, row_given=both, incoming=incoming, needs=needs).gradients(needs)


def squares(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.spectral`."""
    return _sweep("squares", x, incoming=incoming, needs=needs).gradients(needs)


def triplets(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    """The panel function of :mod:`fastcl.losses.triplet` that takes all."""
    extension()
    margin, semihard = x.numbers
    of_rows, of_columns = _squares(x) or (None, None)
    sums = torch.ops.fastcl_cpu.triplets(
        x.a.detach(),
        x.keys.detach(),
        x.scale.item(),
        x.bias.item(),
        margin,
        bool(semihard),
        vector(of_rows),
        vector(of_columns),
        None if incoming is None else vector(incoming[0]),
        packed((x.tags, x.key_tags)),
        0 if x.row0 is None else int(x.row0),
        needs.a,
        needs.b,
        needs.scale,
    )
    return _of_distances(_Sums(*sums), x, needs)


_NOTHING = PanelGradients(*[None] * 7)
PANEL_KERNELS = {
    "sigmoid": sigmoid,
    "contrastive": contrastive,
    "negatives": negatives,
    "lifted": lifted,
    "hardest": hardest,
    "similarities": similarities,
    "nearest": nearest,
    **{f"energy_{rule}": functools.partial(_energy, rule) for rule in ("softmax", "uniform", "power")},
    "soft_targets": soft_targets,
    "squares": squares,
    "triplets": triplets,
}
