"""Losses of each similarity itself: any function of whole rows of S, over panels of bounded size.

May import :mod:`fastcl.terms` and :mod:`fastcl.engine`; :mod:`fastcl.panelwise` makes operators of it. What the terms
of :func:`fastcl.pairwise` can't say (a hinge of each pair, an order, a second similarity) is said by a *panel
function*: it gets some rows of S as a :class:`Panel` and makes a few numbers of each of them, in ordinary PyTorch. That
runs on every device, with never more of S at once than a panel; some backends have a kernel that does the same.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl import engine
from fastcl.backends import PanelKernel
from fastcl.terms import NO_GRADIENTS, PanelNeeds, PanelOperands, Tags, accumulation_dtype

_PANEL_ON_CPU, _PANEL_ELSEWHERE = 1 << 19, 1 << 25
"""pairs that a panel holds, where its columns leave it more than the fewest rows"""
_FEWEST_ROWS = 32


class Panel(NamedTuple):
    """Some rows of S against all of its columns, and what is known of both."""

    s: Tensor
    """[rows, columns] in the accumulation dtype"""
    self_column: Tensor
    """int64 [rows], the column of each row's own key"""
    row_params: Tensor
    """[P, rows], float parameters of the rows"""
    column_params: Tensor
    """[Q, columns], float parameters of the columns"""
    tags: Tags
    key_tags: Tags
    numbers: tuple[float, ...]
    guide: Tensor | None
    """a second S of the same shape, without gradient"""

    @property
    def self_pair(self) -> Tensor:
        """bool [rows, columns], true where the key is the row's own."""
        return self.self_column[:, None] == torch.arange(self.s.shape[1], device=self.s.device)

    @property
    def same_label(self) -> Tensor:
        """bool [rows, columns], true where the labels are equal."""
        return self.tags.labels[:, None] == self.key_tags.labels


class Slopes(NamedTuple):
    """A gradient with respect to what a panel function looks at: S, and the parameters that it differentiates."""

    s: Tensor
    row_params: Tensor | None = None
    column_params: Tensor | None = None


Outputs = tuple[Tensor, ...]
"""numbers of each row of a panel, each [rows]"""
PanelFunction = Callable[[Panel], tuple[Outputs, Callable[[Outputs], Slopes]]]
"""Outputs, and the function from the gradient with respect to them to that with respect to the panel.

It is a function of a module, marked with :func:`panel_function`. Autograd can't be used inside of an operator, so the
slope is written by hand; it shares what the value needed, and gradcheck compares the two.
"""


def panel_function(outputs: int, kernel: str | None = None) -> Callable[[PanelFunction], PanelFunction]:
    """Marks a function of a :class:`Panel` that makes so many numbers of each row.

    ``kernel`` names its compiled equivalent in the backends' ``PANEL_KERNELS``.
    """

    def mark(function: PanelFunction) -> PanelFunction:
        function.outputs, function.kernel = outputs, kernel
        function.path = f"{function.__module__}:{function.__qualname__}"
        return function

    return mark


def resolve(path: str) -> PanelFunction:
    """The panel function at ``module:name``."""
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def values(function: PanelFunction, x: PanelOperands, backend: str | None) -> Tensor:
    """What the function makes of all rows, [outputs, N]."""
    chosen, kernel = engine.select_panels(function.kernel, x, backend)
    if kernel is not None and 0 not in x.shape:
        return kernel(x, None, None, NO_GRADIENTS).values
    nothing = x.scale.new_empty(function.outputs, 0)
    panels = _panels(x, whole=chosen == "dense")
    return torch.cat([nothing, *(torch.stack(function(panel)[0]) for _, panel in panels)], dim=1)


def sweep(
    function: PanelFunction,
    x: PanelOperands,
    weights: Tensor | None,
    incoming: Tensor | None,
    needs: Sequence[bool],
    backend: str | None,
    found: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The sums of the outputs, and the gradients of a, b, scale, bias, row_params and column_params.

    The gradients are those of the outputs times ``incoming`` [outputs, N], or of the first output times ``weights``;
    with ``incoming`` the sums mean nothing, and ``found`` may hold the outputs of an earlier sweep.
    """
    chosen, kernel = engine.select_panels(function.kernel, x, backend)
    if kernel is not None and 0 not in x.shape:
        return _sweep_by(kernel, x, weights, incoming, needs, found, function.outputs)
    dtype = accumulation_dtype(x.a.dtype)
    needs_a, needs_b, needs_scale, needs_bias, needs_rows, needs_columns = needs
    symmetric = x.b is None
    columns = x.keys.to(dtype)

    def zeros(x: Tensor, needed: bool) -> Tensor | None:
        return torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if needed else None

    product_a = zeros(x.a, needs_a)
    product_b = product_a if symmetric else zeros(x.keys, needs_b)
    inner, of_bias = (torch.zeros((), dtype=dtype, device=x.a.device) for _ in range(2))
    of_rows = zeros(x.row_params, needs_rows) if needs_rows else None
    of_columns = zeros(x.column_params, needs_columns) if needs_columns else None
    totals = [inner.new_zeros(function.outputs)]
    for rows, panel in _panels(x, whole=chosen == "dense"):
        outputs, pull_back = function(panel)
        if incoming is None:
            first = torch.ones_like(outputs[0]) if weights is None else weights[rows].to(outputs[0].dtype)
            cotangents = (first, *(torch.zeros_like(x) for x in outputs[1:]))
            totals.append(torch.stack([(outputs[0] * first).sum(), *(x.sum() for x in outputs[1:])]))
        else:
            cotangents = tuple(incoming[:, rows].unbind())
        gradient, row_gradient, column_gradient = pull_back(cotangents)
        if needs_bias:
            of_bias += gradient.sum()
        if of_rows is not None:
            of_rows[:, rows] = row_gradient
        if of_columns is not None:
            of_columns += column_gradient
        own = x.a[rows].to(dtype)
        if needs_a or (needs_scale and not needs_b):
            of_panel = gradient @ columns
            inner += (of_panel * own).sum()
            if needs_a:
                product_a[rows] += of_panel
        if needs_b or (symmetric and needs_a):
            of_panel = gradient.mT @ own
            if needs_b and not needs_a:
                inner += (of_panel * columns).sum()
            product_b += of_panel
    return torch.stack(totals).sum(dim=0), [
        product_a.mul_(x.scale) if needs_a else None,
        product_b.mul_(x.scale) if needs_b else None,
        inner if needs_scale else None,
        of_bias if needs_bias else None,
        of_rows,
        of_columns,
    ]


def _sweep_by(
    kernel: PanelKernel,
    x: PanelOperands,
    weights: Tensor | None,
    incoming: Tensor | None,
    needs: Sequence[bool],
    found: Tensor | None,
    outputs: int,
) -> tuple[Tensor, list[Tensor | None]]:
    """The same by a backend's kernel, which knows two operands; both may be one."""
    needs_a, needs_b, *others = needs
    wanted = PanelNeeds(needs_a, needs_a if x.b is None else needs_b, *others, values=incoming is None)
    if incoming is None:
        factors = x.scale.new_zeros(outputs, len(x.a))
        factors[0] = 1.0 if weights is None else weights
        made = kernel(x, factors, None, wanted)
        sums = made.values.sum(dim=1)
        if weights is not None:
            sums[0] = made.values[0] @ factors[0]
    else:
        made = kernel(x, incoming, found, wanted)
        sums = x.scale.new_zeros(outputs)
    gradients = list(made[:6])
    if x.b is None and needs_a:
        gradients[:2] = made.a + made.b, None
    return sums, gradients


def _panels(x: PanelOperands, whole: bool) -> Iterator[tuple[slice, Panel]]:
    """All panels, from the first row to the last; one if ``whole``."""
    n, m = x.shape
    dtype, device = accumulation_dtype(x.a.dtype), x.a.device
    columns = x.keys.to(dtype)
    column_params = columns.new_empty((0, m)) if x.column_params is None else x.column_params
    pairs = _PANEL_ON_CPU if device.type == "cpu" else _PANEL_ELSEWHERE
    height = max(1, n) if whole else max(_FEWEST_ROWS, pairs // max(1, m))
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        part = x.a[rows].to(dtype)
        s = (part @ columns.mT).mul_(x.scale).add_(x.bias)
        guide = None
        if x.guide:
            of_rows, of_columns, factor = x.guide
            guide = (of_rows[rows].to(dtype) @ of_columns.to(dtype).mT).mul_(factor)
        empty = s.new_empty((0, len(part)))
        yield (
            rows,
            Panel(
                s,
                torch.arange(rows.start, rows.stop, device=device) + (0 if x.row0 is None else x.row0),
                empty if x.row_params is None else x.row_params[:, rows],
                column_params,
                x.tags.part(rows),
                x.key_tags,
                tuple(x.numbers),
                guide,
            ),
        )
