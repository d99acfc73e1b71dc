"""Panel functions (:mod:`fastcl.panels`) on the host: sweeps of one kernel over panels of S, and how tiles add up.

The kernel writes each tile's numbers of its rows into slots of their own; they are put together here, in the order of
the slots. W goes to the panel that library products multiply, as in :mod:`fastcl.backends.panels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl import tuning
from fastcl.backends import panels
from fastcl.backends.cuda.binding import aligned, capability, extension, run
from fastcl.backends.panels import Panel
from fastcl.backends.softmax import finish
from fastcl.terms import Needs, Operands, PanelGradients, PanelNeeds, PanelOperands, Plan, Products, Tags, wants_tf32

_CODES = {
    name: code
    for code, name in enumerate(
        (
            "questions",
            "contrastive",
            "positive_pairs",
            "negatives",
            "negatives_weights",
            "energy_softmax",
            "energy_uniform",
            "energy_power",
            "energy_softmax_weights",
            "energy_uniform_weights",
            "energy_power_weights",
            "soft_targets",
            "soft_targets_weights",
            "similarities",
            "nearest",
            "hardest",
            "squares",
        )
    )
}
"""Functions of pairs in the order of ``csrc/cuda/problem.h``."""
_MOST_PARTIALS = 2**22
"""tiles' numbers of one kind in a panel without W"""


class _Sums(NamedTuple):
    """What W sums up to, beside the numbers of the rows [.., N]; None where not wanted."""

    numbers: Tensor | None
    rows: Tensor | None
    """[N], of W along rows"""
    columns: Tensor | None
    """[M], of W along columns"""
    of_columns: Tensor | None
    """[M], gradients of the columns' parameter that are no sums of W"""


class _Operands(NamedTuple):
    """The operands as the kernel wants them; scalars stay on the device, and nothing waits for them."""

    given: PanelOperands
    a: Tensor
    b: Tensor
    row0: Tensor | None
    row_params: Tensor | None
    column_params: Tensor | None
    tags: Tags
    key_tags: Tags

    @classmethod
    def of(cls, x: PanelOperands) -> _Operands:
        a = aligned(x.a.detach())
        return cls(
            x,
            a,
            a if x.b is None else aligned(x.b.detach()),
            None if x.row0 is None else x.row0.to(torch.int64),
            _numbers(x.row_params),
            _numbers(x.column_params),
            *(Tags(*(None if tag is None else tag.contiguous() for tag in tags)) for tags in (x.tags, x.key_tags)),
        )

    def sweep(
        self,
        function: str,
        panel: Panel,
        incoming: Tensor | None,
        found: Tensor | None,
        multiplier: Tensor | None,
        sums: _Sums,
        out: Tensor | None,
    ) -> None:
        """The kernel over one panel."""
        x = self.given
        run(
            "pairs",
            self.a.device,
            _CODES[function],
            *(*x.numbers, 0.0, 0.0)[:2],
            self.a,
            self.b,
            _numbers(x.scale),
            _numbers(x.bias),
            self.row0,
            self.row_params,
            self.column_params,
            incoming,
            found,
            *self.tags[:2],
            *self.key_tags[:2],
            self.guide(panel),
            multiplier,
            not wants_tf32(),
            *panel[:4],
            *sums,
            out,
        )

    def guide(self, panel: Panel) -> Tensor | None:
        """The panel's part of the second S."""
        if not self.given.guide:
            return None
        of_rows, of_columns, factor = self.given.guide
        s = torch.empty(panel.shape, dtype=torch.float32, device=self.a.device)
        panels.add_product(s, of_rows[panel.rows], of_columns[panel.columns].t(), beta=0)
        return s.mul_(factor)

    @property
    def workspace_bytes(self) -> int:
        """For a panel of W, beside which there may be one of the second S."""
        workspace, size = tuning.workspace_bytes(capability(self.a)), self.a.element_size()
        return workspace * size // (size + 4) if self.given.guide else workspace

    def bare_panels(self) -> Iterator[Panel]:
        """Panels for sums alone, which come to complete rows one after the other."""
        n, m = self.given.shape
        tile = extension().TILE
        height = max(1, _MOST_PARTIALS // -(-m // tile) // tile) * tile
        width = m
        if self.given.guide:
            height = min(height, panels.TALLEST)
            width = max(1, self.workspace_bytes // self.a.element_size() // height // tile) * tile
        for row in range(0, n, height):
            for column in range(0, m, width):
                yield Panel(row, min(row + height, n), column, min(column + width, m))


def _numbers(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _slots(panel: Panel) -> tuple[int, int]:
    """Tiles down and across."""
    return tuple(-(-count // extension().TILE) for count in panel.shape)


Combine = Callable[[Tensor], Tensor]
"""Numbers of rows from those of their tiles [.., slots, N]."""


def _numbers_of_rows(function: str, count: int, combine: Combine, x: _Operands) -> Tensor:
    """So many numbers of each tile's rows, put together."""
    m = x.given.shape[1]
    found, tiles = [], []
    for panel in x.bare_panels():
        tiles.append(x.given.scale.new_empty(count, _slots(panel)[1], panel.shape[0]))
        x.sweep(function, panel, None, None, None, _Sums(tiles[-1], None, None, None), None)
        if panel.column_end == m:
            found.append(combine(tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)))
            tiles = []
    return torch.cat(found, dim=1)


def _weigh(
    function: str,
    count: int,
    x: _Operands,
    incoming: Tensor,
    found: Tensor | None,
    needs: PanelNeeds,
    bound: Tensor | None,
    own_gradients: bool,
) -> tuple[Products, _Sums]:
    """W, times whatever it is wanted for, and the sums of W; ``count`` numbers of the rows that are sums, too."""
    n, m = x.given.shape
    new = x.given.scale.new_empty
    sums = _Sums(
        new(count, n) if count else None,
        new(n) if needs.bias or needs.row_params else None,
        new(m) if needs.column_params else None,
        new(m) if needs.column_params and own_gradients else None,
    )
    multiplier = None if bound is None else panels.lifting_power(bound)

    def write(panel: Panel, out: Tensor | None) -> None:
        down, across = _slots(panel)
        rows, columns = panel.shape
        shapes = ((count, across, rows), (across, rows), (down, columns), (down, columns))
        tiles = _Sums(*(None if x is None else new(shape) for x, shape in zip(sums, shapes, strict=True)))
        x.sweep(function, panel, incoming, found, multiplier, tiles, out)
        for of_rows, total, part in zip((True, True, False, False), sums, tiles, strict=True):
            if total is None:
                continue
            to = total[..., panel.rows if of_rows else panel.columns]
            first = panel.column_begin == 0 if of_rows else panel.row_begin == 0
            if first:
                torch.sum(part, dim=-2, out=to)
            else:
                to += part.sum(dim=-2)

    if not (needs.product_a or needs.b):
        for panel in x.bare_panels():
            write(panel, None)
        return Products(None, None), sums
    tile = (extension().TILE, extension().TILE)
    products = panels.products(Plan(()), x.a, x.b, needs.product_a, needs.b, tile, x.workspace_bytes, write, multiplier)
    return products, sums


def _add(tiles: Tensor) -> Tensor:
    return tiles.sum(dim=1)


def _sum_of_incoming(x: PanelOperands, incoming: Tensor) -> Tensor:
    return incoming.abs().amax(dim=1).sum()


@dataclass(frozen=True)
class _Function:
    """A panel function by functions of pairs: one that makes numbers of the rows, and one that makes W.

    These may be the same one, whose numbers are sums and come with W. Else W is made with what is known of whole rows.
    """

    numbers: str
    count: int
    outputs: Callable[[PanelOperands, Tensor], Tensor] = lambda x, numbers: numbers
    """the panel function's outputs, from the numbers of the rows"""
    combine: Combine = _add
    weights: str | None = None
    found: Callable[[PanelOperands, Tensor], Tensor] = lambda x, numbers: numbers
    """what W needs to know, from the same"""
    takes_outputs: bool = False
    """whether the outputs are the numbers"""
    params: Callable[[PanelOperands, _Sums], tuple[Tensor | None, Tensor | None]] = lambda x, sums: (None, None)
    """gradients of the rows' and the columns' parameters"""
    bound: Callable[[PanelOperands, Tensor], Tensor] = _sum_of_incoming
    """what no |W| exceeds, or few"""
    own_gradients: bool = False
    """whether numbers and column sums hold gradients of parameters"""

    def __call__(
        self, x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds
    ) -> PanelGradients:
        operands, numbers, found = _Operands.of(x), None, None
        in_one_sweep = incoming is not None and self.weights == self.numbers
        if not in_one_sweep:
            numbers = values if self.takes_outputs else None
            if numbers is None:
                numbers = _numbers_of_rows(self.numbers, self.count, self.combine, operands)
            if incoming is None:
                return PanelGradients(None, None, None, None, None, None, self.outputs(x, numbers))
            found = self.found(x, numbers).contiguous()
        incoming = _numbers(incoming)
        sums_wanted = in_one_sweep and (needs.values or (needs.row_params and self.own_gradients))
        products, sums = _weigh(
            self.weights,
            self.count if sums_wanted else 0,
            operands,
            incoming,
            found,
            needs,
            self.bound(x, incoming) if operands.a.dtype is torch.float16 else None,
            self.own_gradients,
        )
        gradients = finish(
            Plan(()),
            Operands(operands.a, operands.b, x.scale),
            products,
            Needs(needs.a, needs.b, needs.scale),
            x.scale.dtype,
        )
        of_rows, of_columns = self.params(x, sums)
        return PanelGradients(
            *gradients,
            sums.rows.sum() if needs.bias else None,
            of_rows if needs.row_params else None,
            of_columns if needs.column_params else None,
            self.outputs(x, sums.numbers if in_one_sweep else numbers) if needs.values else None,
        )


def _bound_of_questions(x: PanelOperands, incoming: Tensor) -> Tensor:
    bound = _sum_of_incoming(x, incoming)
    return bound if x.row_params is None else bound * x.row_params[0].abs().amax().clamp_min(1.0)


def _of_offsets(x: PanelOperands, sums: _Sums) -> tuple[None, Tensor | None]:
    return None, None if sums.columns is None else -sums.columns[None]


def _bound_of_distances(x: PanelOperands, incoming: Tensor) -> Tensor:
    """The slope of a Euclidean distance grows as it falls: float16's range has room for distances down to 2^-12."""
    bound = _sum_of_incoming(x, incoming)
    return bound if x.row_params is None else bound * 2.0**12


def _bound_of_positive_pairs(x: PanelOperands, incoming: Tensor) -> Tensor:
    """Of a pair's distance and the log-sum-exps, too."""
    negatives = torch.maximum(x.row_params[0].amax(), x.column_params[0].amax())
    norms = torch.maximum(*(features.float().square().sum(dim=1).amax() for features in (x.a, x.keys)))
    hinge = (negatives + 2.0 + 2.0 * norms - x.numbers[0]).clamp_min(0.0)
    return incoming[0].abs().amax() * hinge * (2.0**12 if len(x.row_params) > 1 else 1.0)


def _bound_of_squares(x: PanelOperands, incoming: Tensor) -> Tensor:
    norms = (features.float().norm(dim=1).amax() for features in (x.a, x.keys))
    return 2.0 * (math.prod(norms) * x.scale.abs() + x.bias.abs()) * _sum_of_incoming(x, incoming)


def _of_squares(x: PanelOperands, sums: _Sums) -> tuple[Tensor | None, Tensor | None]:
    return tuple(None if w is None else -0.5 * w[None] for w in (sums.rows, sums.columns))


def _of_negatives_and_squares(x: PanelOperands, sums: _Sums) -> tuple[Tensor | None, Tensor | None]:
    squares = (None, None) if len(x.row_params) == 1 else _of_squares(x, sums)
    own = None if sums.numbers is None else sums.numbers[2:], None if sums.of_columns is None else sums.of_columns[None]
    return tuple(
        of_own if of_squares is None or of_own is None else torch.cat((of_own, of_squares))
        for of_own, of_squares in zip(own, squares, strict=True)
    )


def _of_energy(x: PanelOperands, sums: _Sums) -> tuple[Tensor | None, Tensor | None]:
    of_squares, of_columns = _of_squares(x, sums)
    return None if sums.rows is None else torch.cat((of_squares, sums.rows[None])), of_columns


def _log_sum(tiles: Tensor) -> Tensor:
    return tiles.logsumexp(dim=1)


def _mean(lse: Tensor, means: Tensor) -> Tensor:
    """The mean of tiles' means under the softmax of their log-sum-exps; 0 without any."""
    return torch.where((lse == -torch.inf).all(dim=0), 0.0, (lse.softmax(dim=0) * means).sum(dim=0))


def _log_sum_and_mean(tiles: Tensor) -> Tensor:
    """The last two numbers are a log-sum-exp and a mean, those before log-sum-exps."""
    return torch.cat((_log_sum(tiles[:-1]), _mean(*tiles[-2:])[None]))


def _everything(x: PanelOperands, numbers: Tensor, has_positive: bool) -> Tensor:
    """The log-sum-exp that importances are divided by."""
    return torch.logaddexp(numbers[0], -x.row_params[1] / x.numbers[0]) if has_positive else numbers[0]


def _energy(function: str, has_positive: bool = False) -> _Function:
    def value(x: PanelOperands, numbers: Tensor) -> Tensor:
        lse, mean = numbers
        total = torch.where(lse == -torch.inf, 0.0, (lse - _everything(x, numbers, has_positive)).exp())
        return (total * (x.row_params[1] - mean))[None]

    return _Function(
        function,
        2,
        value,
        _log_sum_and_mean,
        weights=f"{function}_weights",
        found=lambda x, numbers: _everything(x, numbers, has_positive)[None],
        params=_of_energy,
    )


def _largest_and_sums(tiles: Tensor) -> Tensor:
    return torch.cat((tiles[:2].amax(dim=1), tiles[2:].sum(dim=1)))


def _sum_and_smallest(tiles: Tensor) -> Tensor:
    return torch.stack((tiles[0].sum(dim=0), -tiles[1].amax(dim=0)))


def _hardest(tiles: Tensor) -> Tensor:
    """Of the farthest positives and the nearest negatives the first columns, -1 for both where one is missing."""
    values, columns = tiles[::2], tiles[1::2]
    best = values.amax(dim=1)
    first = columns.where(values == best[:, None], torch.inf).amin(dim=1)
    return first.where((best > -torch.inf).all(dim=0), -1.0)


PANEL_KERNELS = {
    "sigmoid": _Function("questions", 1, weights="questions", params=_of_offsets, bound=_bound_of_questions),
    "contrastive": _Function("contrastive", 4, weights="contrastive", params=_of_squares, bound=_bound_of_distances),
    "negatives": _Function(
        "negatives",
        1,
        combine=_log_sum,
        weights="negatives_weights",
        takes_outputs=True,
        params=_of_squares,
        bound=_bound_of_distances,
    ),
    "lifted": _Function(
        "positive_pairs",
        3,
        lambda x, numbers: numbers[:2],
        weights="positive_pairs",
        params=_of_negatives_and_squares,
        bound=_bound_of_positive_pairs,
        own_gradients=True,
    ),
    "energy_softmax": _energy("energy_softmax", has_positive=True),
    "energy_uniform": _energy("energy_uniform"),
    "energy_power": _energy("energy_power"),
    "soft_targets": _Function(
        "soft_targets",
        3,
        lambda x, numbers: (numbers[0] - numbers[2])[None],
        _log_sum_and_mean,
        weights="soft_targets_weights",
    ),
    "similarities": _Function("similarities", 4, combine=_largest_and_sums),
    "nearest": _Function("nearest", 2, combine=_sum_and_smallest),
    "hardest": _Function("hardest", 4, combine=_hardest),
    "squares": _Function("squares", 1, weights="squares", bound=_bound_of_squares),
}
