"""Panel functions as operators, with their gradients: a number for each row, or the sum over the rows in one sweep.

May import :mod:`fastcl.terms`, :mod:`fastcl.engine`, :mod:`fastcl.panels`, :mod:`fastcl.pairwise` and
:mod:`fastcl.cross_entropy`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl import engine, panels
from fastcl.cross_entropy import FirstDerivative
from fastcl.pairwise import agreement, autocast, refuse_double_backward, scalar_tensor
from fastcl.panels import PanelFunction
from fastcl.terms import NO_TAGS, PanelOperands, Tags, accumulation_dtype, split_tags


def panel_rows(function: PanelFunction, a: Tensor, b: Tensor | None, **operands: object) -> tuple[Tensor, ...]:
    """The numbers that ``function`` makes of each row of S = scale * A @ B.T + bias, differentiable, [N] each.

    Args:
        function: see :data:`fastcl.panels.PanelFunction`.
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
    **operands: object,
) -> tuple[Tensor, ...]:
    """The sums over the rows of what ``function`` makes of each; only the first is differentiable.

    Its gradients are made with the value, in one sweep over S.

    Args:
        function: see :data:`fastcl.panels.PanelFunction`.
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
        backend: insist on one of :func:`fastcl.list_backends`; all but "tiled" and "dense" (one panel of all rows) need
            a kernel for the function.

    Complexity: with P = N * M * D multiply-adds, 3 P for value and gradients, 1 P without; O(N + M) memory beyond
    gradients in the accumulation dtype, and a panel.
    """
    operands = _operands(function, a, b, **operands)
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
    backend: str | None = None,
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
    return a, b, scale, bias, row_params, column_params, row0, all_tags, list(numbers), guide, function.path, backend


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
    backend: str | None,
    weights: Tensor | None,
    needs: str,
) -> EightTensors:
    if row0 is None:
        engine.warn_if_ranks_are_apart()
    x = PanelOperands(a, b, scale, bias, row_params, column_params, row0, *split_tags(tags), numbers, guide)
    with engine.plain_arithmetic(a.device):
        if "1" not in needs:
            values = panels.values(panels.resolve(function), x, backend)
            first = values[0] if weights is None else values[0] * weights
            return first.sum(), values[1:].sum(dim=1), *_or_nothing([None] * 6, scale)
        wanted = [need == "1" for need in needs]
        sums, gradients = panels.sweep(panels.resolve(function), x, weights, None, wanted, backend)
        return sums[0].clone(), sums[1:].clone(), *_or_nothing(gradients, scale)


@_sum.register_fake
def _(a, b, scale, bias, row_params, column_params, row0, tags, numbers, guide, function, backend, weights, needs):
    outputs = panels.resolve(function).outputs
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
    results: list[object] = [*[None] * 8, *ctx.lists, *[None] * 4]
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
    backend: str | None,
) -> Tensor:
    if row0 is None:
        engine.warn_if_ranks_are_apart()
    x = PanelOperands(a, b, scale, bias, row_params, column_params, row0, *split_tags(tags), numbers, guide)
    with engine.plain_arithmetic(a.device):
        return panels.values(panels.resolve(function), x, backend)


@_rows.register_fake
def _(a, b, scale, bias, row_params, column_params, row0, tags, numbers, guide, function, backend):
    return scale.new_empty(panels.resolve(function).outputs, len(a))


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
    backend: str | None,
    values: Tensor,
    incoming: Tensor,
    needs: str,
) -> SixTensors:
    x = PanelOperands(a, b, scale, bias, row_params, column_params, row0, *split_tags(tags), numbers, guide)
    with engine.plain_arithmetic(a.device):
        wanted = [need == "1" for need in needs]
        _, gradients = panels.sweep(panels.resolve(function), x, None, incoming, wanted, backend, values)
    inputs = (a, b, scale, bias, row_params, column_params)
    return tuple(
        scale.new_empty(0) if gradient is None else gradient.to(x.dtype)
        for x, gradient in zip(inputs, gradients, strict=True)
    )


@_gradient.register_fake
def _(
    a, b, scale, bias, row_params, column_params, row0, tags, numbers, guide, function, backend, values, incoming, needs
):
    inputs = (a, b, scale, bias, row_params, column_params)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need == "1" else scale.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _save_operands(ctx, inputs, output) -> None:
    *tensors, row0, tags, numbers, guide, function, backend = inputs
    ctx.save_for_backward(*tensors, row0, output, *tags, *guide)
    ctx.constants = len(tags), list(numbers), function, backend
    ctx.lists = _no_gradient_of_lists(numbers, guide)


def _rows_backward(ctx, incoming: Tensor):
    tag_count, numbers, function, backend = ctx.constants
    tensors, (row0, values), rest = ctx.saved_tensors[:6], ctx.saved_tensors[6:8], ctx.saved_tensors[8:]
    tags, guide = list(rest[:tag_count]), list(rest[tag_count:])
    needs = ctx.needs_input_grad[:6]
    wanted = "".join("01"[need] for need in needs)
    gradients = torch.ops.fastcl.panel_gradient(
        *tensors, row0, tags, numbers, guide, function, backend, values, incoming, wanted
    )
    results = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return (*results, None, None, *ctx.lists, None, None)


_rows.register_autograd(_rows_backward, setup_context=_save_operands)
_gradient.register_autograd(refuse_double_backward)
