"""Losses of each similarity itself: any function of whole rows of S, over panels of bounded size.

May import :mod:`fastcl.terms`, :mod:`fastcl.engine`, :mod:`fastcl.pairwise` and :mod:`fastcl.cross_entropy`. What the
terms of :func:`fastcl.pairwise` can't say (a hinge of each pair, an order, a second similarity) is said by a *panel
function*: it gets some rows of S as a :class:`Panel` and makes a few numbers of each of them, in ordinary PyTorch. It
is plain PyTorch on every device: no kernel, but never more of S at once than a panel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl import engine
from fastcl.cross_entropy import FirstDerivative
from fastcl.pairwise import agreement, autocast, refuse_double_backward, scalar_tensor
from fastcl.terms import NO_TAGS, Tags, accumulation_dtype, split_tags

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


def panel_function(outputs: int) -> Callable[[PanelFunction], PanelFunction]:
    """Marks a function of a :class:`Panel` that makes so many numbers of each row."""

    def mark(function: PanelFunction) -> PanelFunction:
        function.outputs, function.path = outputs, f"{function.__module__}:{function.__qualname__}"
        return function

    return mark


def panel_rows(function: PanelFunction, a: Tensor, b: Tensor | None, **operands: object) -> tuple[Tensor, ...]:
    """The numbers that ``function`` makes of each row of S = scale * A @ B.T + bias, differentiable, [N] each.

    Args:
        function: see :data:`PanelFunction`.
        a, b: features [N, D] and [M, D]; ``b=None`` means ``a``.
        **operands: as in :func:`panel_sum`, but for ``weights``.

    Complexity: with P = N * M * D multiply-adds, P forward and up to 3 P backward; O(N + M) memory, and a panel.
    """
    operands = _operands(function, a, b, **operands)
    return torch.ops.fastcl.panel_rows(*operands).unbind()


def panel_sum(
    function: PanelFunction,
    a: Tensor,
    b: Tensor | None,
    *,
    weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    row_params: Tensor | None = None,
    column_params: Tensor | None = None,
    tags: Tags = NO_TAGS,
    key_tags: Tags = NO_TAGS,
    numbers: Sequence[float] = (),
    guide: Sequence[Tensor] = (),
    group: ProcessGroup | None = None,
    call: str = "loss=panels",
) -> tuple[Tensor, ...]:
    """The sums over the rows of what ``function`` makes of each; only the first is differentiable.

    Its gradients are made with the value, in one sweep over S.

    Args:
        function: see :data:`PanelFunction`.
        a, b: features [N, D] and [M, D]; ``b=None`` means ``a``.
        weights: [N], constant factors of the rows in the first sum.
        scale, bias: floats or 0-d tensors, which may require grad.
        row_params, column_params: [P, N] and [Q, M], which may require grad.
        tags, key_tags: labels, ids and thresholds; with ``b=None`` ``key_tags`` is ``tags``.
        numbers: constants that the function needs.
        guide: features [N, E] and [M, E] and a scale, of a second S, without gradient.
        group: a process group: the columns are those of all ranks, one rank's after the other's, the rows are this
            rank's. Sums are those of this rank's rows; gradients are those of the sum of all ranks' objectives.
        call: lines ``name=value`` on which, besides everything here, all ranks must agree.

    Complexity: with P = N * M * D multiply-adds, 3 P for value and gradients, 1 P without; O(N + M) memory beyond
    gradients in the accumulation dtype, and a panel.
    """
    operands = _operands(
        function,
        a,
        b,
        scale=scale,
        bias=bias,
        row_params=row_params,
        column_params=column_params,
        tags=tags,
        key_tags=key_tags,
        numbers=numbers,
        guide=guide,
        group=group,
        call=call,
    )
    recorded = torch.is_grad_enabled()
    needs = "".join("01"[recorded and x is not None and x.requires_grad] for x in operands[:6])
    first, others, *_ = torch.ops.fastcl.panel_sum(*operands, weights, needs)
    return first, *others.detach().unbind()


def _operands(
    function: PanelFunction,
    a: Tensor,
    b: Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    row_params: Tensor | None = None,
    column_params: Tensor | None = None,
    tags: Tags = NO_TAGS,
    key_tags: Tags = NO_TAGS,
    numbers: Sequence[float] = (),
    guide: Sequence[Tensor] = (),
    group: ProcessGroup | None = None,
    call: str = "loss=panels",
) -> tuple[object, ...]:
    """The arguments of the operators: six that may require grad, and the others."""
    dtype = accumulation_dtype(a.dtype)
    a, b = autocast(a), None if b is None else autocast(b)
    row0 = None
    if b is None:
        key_tags = tags
    if group is not None:
        call = "\n".join((call, *agreement(a, b, scale, bias)))
        gather = functools.partial(torch.ops.fastcl.gather_over_ranks, group=group.group_name, call=call)
        b, _ = gather(a if b is None else b)
        row0 = gather(torch.full((1,), len(a), device=a.device))[0][: group.rank()].sum()
        column_params = None if column_params is None else gather(column_params.mT.contiguous())[0].mT
        key_tags = Tags(*(None if tag is None else gather(tag)[0] for tag in key_tags))
        guide = (guide[0], gather(guide[1])[0], guide[2]) if guide else ()
    scale, bias = (scalar_tensor(x, dtype, a.device) for x in (scale, bias))
    guide = [x.detach() for x in guide]
    all_tags = [*tags, *key_tags]
    return a, b, scale, bias, row_params, column_params, row0, all_tags, list(numbers), guide, function.path


class _Problem(NamedTuple):
    """The operands of one call, as the operators get them."""

    a: Tensor
    b: Tensor | None
    scale: Tensor
    bias: Tensor
    row_params: Tensor | None
    column_params: Tensor | None
    row0: Tensor | None
    tags: Sequence[Tensor | None]
    numbers: Sequence[float]
    guide: Sequence[Tensor]
    function: str

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M), the shape of S."""
        return len(self.a), len(self.a if self.b is None else self.b)

    def panels(self) -> Iterator[tuple[slice, Panel]]:
        """All panels, from the first row to the last."""
        n, keys = len(self.a), self.a if self.b is None else self.b
        dtype, device = accumulation_dtype(self.a.dtype), self.a.device
        tags, key_tags = split_tags(self.tags)
        columns = keys.to(dtype)
        column_params = (
            keys.new_empty((0, len(keys)), dtype=dtype) if self.column_params is None else self.column_params
        )
        pairs = _PANEL_ON_CPU if device.type == "cpu" else _PANEL_ELSEWHERE
        height = max(_FEWEST_ROWS, pairs // max(1, len(keys)))
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            part = self.a[rows].to(dtype)
            s = (part @ columns.mT).mul_(self.scale).add_(self.bias)
            guide = None
            if self.guide:
                of_rows, of_columns, factor = self.guide
                guide = (of_rows[rows].to(dtype) @ of_columns.to(dtype).mT).mul_(factor)
            empty = s.new_empty((0, len(part)))
            yield (
                rows,
                Panel(
                    s,
                    torch.arange(rows.start, rows.stop, device=device) + (0 if self.row0 is None else self.row0),
                    empty if self.row_params is None else self.row_params[:, rows],
                    column_params,
                    tags.part(rows),
                    key_tags,
                    tuple(self.numbers),
                    guide,
                ),
            )


def resolve(path: str) -> PanelFunction:
    """The panel function at ``module:name``."""
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def _values(problem: _Problem) -> Tensor:
    """What the function makes of all rows, [outputs, N]."""
    function = resolve(problem.function)
    nothing = torch.empty(function.outputs, 0, dtype=problem.scale.dtype, device=problem.a.device)
    return torch.cat([nothing, *(torch.stack(function(panel)[0]) for _, panel in problem.panels())], dim=1)


def _sweep(
    problem: _Problem, weights: Tensor | None, incoming: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The sums of the outputs, and the gradients of a, b, scale, bias, row_params and column_params.

    The gradients are those of the outputs times ``incoming`` [outputs, N], or of the first output times ``weights``.
    """
    function = resolve(problem.function)
    dtype, keys = accumulation_dtype(problem.a.dtype), problem.a if problem.b is None else problem.b
    needs_a, needs_b, needs_scale, needs_bias, needs_rows, needs_columns = needs
    symmetric = problem.b is None
    columns = keys.to(dtype)

    def zeros(x: Tensor, needed: bool) -> Tensor | None:
        return torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if needed else None

    product_a = zeros(problem.a, needs_a)
    product_b = product_a if symmetric else zeros(keys, needs_b)
    inner, of_bias = (torch.zeros((), dtype=dtype, device=keys.device) for _ in range(2))
    of_rows = zeros(problem.row_params, needs_rows) if needs_rows else None
    of_columns = zeros(problem.column_params, needs_columns) if needs_columns else None
    totals = [inner.new_zeros(function.outputs)]
    for rows, panel in problem.panels():
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
        own = problem.a[rows].to(dtype)
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
        product_a.mul_(problem.scale) if needs_a else None,
        product_b.mul_(problem.scale) if needs_b else None,
        inner if needs_scale else None,
        of_bias if needs_bias else None,
        of_rows,
        of_columns,
    ]


def _or_nothing(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if gradient is None else gradient for gradient in gradients]


SixTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
EightTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastcl::panel_sum", mutates_args=())
def _sum(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    row_params: Tensor | None,
    column_params: Tensor | None,
    row0: Tensor | None,
    tags: Sequence[Tensor | None],
    numbers: Sequence[float],
    guide: Sequence[Tensor],
    function: str,
    weights: Tensor | None,
    needs: str,
) -> EightTensors:
    if row0 is None:
        engine.warn_if_ranks_are_apart()
    problem = _Problem(a, b, scale, bias, row_params, column_params, row0, tags, numbers, guide, function)
    with engine.plain_arithmetic(a.device):
        if "1" not in needs:
            values = _values(problem)
            first = values[0] if weights is None else values[0] * weights
            return first.sum(), values[1:].sum(dim=1), *_or_nothing([None] * 6, scale)
        sums, gradients = _sweep(problem, weights, None, [need == "1" for need in needs])
        return sums[0].clone(), sums[1:].clone(), *_or_nothing(gradients, scale)


@_sum.register_fake
def _(a, b, scale, bias, row_params, column_params, row0, tags, numbers, guide, function, weights, needs):
    outputs = resolve(function).outputs
    inputs = (a, b, scale, bias, row_params, column_params)
    gradients = (scale.new_empty(x.shape if need == "1" else (0,)) for x, need in zip(inputs, needs, strict=True))
    return scale.new_empty(()), scale.new_empty(outputs - 1), *gradients


def _no_gradient_of_lists(numbers: Sequence[float], guide: Sequence[Tensor]) -> tuple[object, object]:
    # torch takes an empty list for one of tensors, and wants a list in its place.
    return None if numbers else [], [None] * len(guide)


def _save_gradients(ctx, inputs, output) -> None:
    _, _, *gradients = output
    ctx.save_for_backward(*inputs[:6], *gradients)
    ctx.lists = _no_gradient_of_lists(*inputs[8:10])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, grad_sum: Tensor | None, *_):
    inputs, gradients = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    results: list[object] = [*[None] * 8, *ctx.lists, None, None, None]
    for k, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        if ctx.needs_input_grad[k] and grad_sum is not None:
            first = FirstDerivative.apply(gradient, x) if torch.is_grad_enabled() else gradient
            results[k] = (first * grad_sum).to(x.dtype)
    return tuple(results)


_sum.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op("fastcl::panel_rows", mutates_args=())
def _rows(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    row_params: Tensor | None,
    column_params: Tensor | None,
    row0: Tensor | None,
    tags: Sequence[Tensor | None],
    numbers: Sequence[float],
    guide: Sequence[Tensor],
    function: str,
) -> Tensor:
    if row0 is None:
        engine.warn_if_ranks_are_apart()
    with engine.plain_arithmetic(a.device):
        return _values(_Problem(a, b, scale, bias, row_params, column_params, row0, tags, numbers, guide, function))


@_rows.register_fake
def _(a, b, scale, bias, row_params, column_params, row0, tags, numbers, guide, function):
    return scale.new_empty(resolve(function).outputs, len(a))


@torch.library.custom_op("fastcl::panel_gradient", mutates_args=())
def _gradient(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    row_params: Tensor | None,
    column_params: Tensor | None,
    row0: Tensor | None,
    tags: Sequence[Tensor | None],
    numbers: Sequence[float],
    guide: Sequence[Tensor],
    function: str,
    incoming: Tensor,
    needs: str,
) -> SixTensors:
    problem = _Problem(a, b, scale, bias, row_params, column_params, row0, tags, numbers, guide, function)
    with engine.plain_arithmetic(a.device):
        _, gradients = _sweep(problem, None, incoming, [need == "1" for need in needs])
    inputs = (a, b, scale, bias, row_params, column_params)
    return tuple(
        scale.new_empty(0) if gradient is None else gradient.to(x.dtype)
        for x, gradient in zip(inputs, gradients, strict=True)
    )


@_gradient.register_fake
def _(a, b, scale, bias, row_params, column_params, row0, tags, numbers, guide, function, incoming, needs):
    inputs = (a, b, scale, bias, row_params, column_params)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need == "1" else scale.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _save_operands(ctx, inputs, output) -> None:
    *tensors, row0, tags, numbers, guide, function = inputs
    ctx.save_for_backward(*tensors, row0, *tags, *guide)
    ctx.constants = len(tags), list(numbers), function
    ctx.lists = _no_gradient_of_lists(numbers, guide)


def _rows_backward(ctx, incoming: Tensor):
    tag_count, numbers, function = ctx.constants
    tensors, row0, rest = ctx.saved_tensors[:6], ctx.saved_tensors[6], ctx.saved_tensors[7:]
    tags, guide = list(rest[:tag_count]), list(rest[tag_count:])
    needs = ctx.needs_input_grad[:6]
    gradients = torch.ops.fastcl.panel_gradient(
        *tensors, row0, tags, numbers, guide, function, incoming, "".join("01"[need] for need in needs)
    )
    wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return (*wanted, None, None, *ctx.lists, None)


_rows.register_autograd(_rows_backward, setup_context=_save_operands)
_gradient.register_autograd(refuse_double_backward)
