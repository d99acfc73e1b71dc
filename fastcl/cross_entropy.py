"""The softmax losses as one operator: value and gradients together, from as few sweeps as the backend can.

May import :mod:`fastcl.terms`, :mod:`fastcl.engine` and :mod:`fastcl.pairwise`. A loss that is one number, a sum over
rows whose weights are known before the sweep, needs no second operator call for its gradient; one that looks along rows
only needs no second look at S either. The gradients are made with the value, where a gradient is recorded at all, and
wait in the accumulation dtype for the factor that backward brings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcl import engine
from fastcl.pairwise import autocast, check_operands, refuse_double_backward, scalar_tensor
from fastcl.terms import Axis, CrossEntropy, Needs, Operands, Plan, Term, accumulation_dtype


def cross_entropy(
    a: Tensor,
    b: Tensor | None,
    terms: Sequence[Term],
    scale: float | Tensor = 1.0,
    *,
    positive: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    target: Tensor | None = None,
    norm_bound: float | None = None,
    row0: int = 0,
    col0: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""The softmax cross entropy over the pairs of S, and the statistics it comes from.

    With :math:`S_{ij} = \text{scale}\,\langle a_i, b_j\rangle`, each LSE term :math:`L` of ``terms``, whose mask admits
    negatives only, and the positive's logit :math:`p_i`,

    .. math:: \sum_i w_i \,\text{softplus}(L_i - p_i) = \sum_i w_i \log\bigl(1 + e^{L_i - p_i}\bigr),

    averaged over the LSE terms, and over i for ``reduction="mean"``.

    Args:
        a, b, scale, target, norm_bound, row0, col0, backend: as in :func:`fastcl.pairwise.pairwise`.
        terms: LSE terms of the negatives, one SUM term along rows that is the positive's logit (unless ``positive`` is
            given), and any MAX terms. Terms along columns need as many columns as rows.
        positive: [N], the positives' logits, which may require grad.
        weights: [N], a constant weight for each row (and column); a row of weight 0 has no say at all.
        reduction: "mean" or "sum" over i.
        normalize: scale the rows of a and b to unit length first.

    Returns:
        The loss (0-d), and the value of each term, without gradient.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
        RuntimeError: a second derivative is asked for.

    Complexity: with P = N * M * D multiply-adds, value and gradients take 2 P with ``b=None``, 3 P for terms along rows
    only (2 P if only one of a and b requires grad), 4 P otherwise, and O(N + M) memory beyond a copy of a and b where
    ``normalize`` and gradients in float32. Without gradients half a P or one.

    >>> import torch
    >>> from fastcl.terms import Mask, Reduce, Term
    >>> terms = [Term(Reduce.LSE, Mask(self_pair=False)), Term(Reduce.SUM, Mask(self_pair=True))]
    >>> loss, _ = cross_entropy(torch.eye(3), torch.eye(3), terms)  # log(1 + 2 / e)
    >>> round(loss.item(), 4)
    0.5514
    """
    plan = Plan(tuple(terms), symmetric=b is None)
    check_operands(plan, a, b, scale, target, row0, col0)
    dtype = accumulation_dtype(a.dtype)
    a, b = autocast(a), None if b is None else autocast(b)
    scale = scalar_tensor(scale, dtype, a.device)
    recorded = torch.is_grad_enabled()
    needs = (recorded and x is not None and x.requires_grad for x in (a, b, scale, positive))
    loss, rows, columns, *_ = torch.ops.fastcl.cross_entropy(
        a,
        b,
        scale,
        None if target is None else target.to(torch.int64),
        positive,
        weights,
        plan.encode(),
        reduction == "mean",
        normalize,
        norm_bound,
        row0,
        col0,
        *needs,
        backend,
    )
    values = {Axis.ROW: iter(rows.unbind()), Axis.COLUMN: iter(columns.unbind())}
    return loss, tuple(next(values[term.axis]) for term in plan.terms)


@torch.library.custom_op("fastcl::cross_entropy", mutates_args=())
def _cross_entropy(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    positive: Tensor | None,
    weights: Tensor | None,
    plan: str,
    mean: bool,
    normalize: bool,
    norm_bound: float | None,
    row0: int,
    col0: int,
    needs_a: bool,
    needs_b: bool,
    needs_scale: bool,
    needs_positive: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = engine.cross_entropy(
        Plan.decode(plan),
        Operands(a, b, scale, target, norm_bound, row0, col0),
        CrossEntropy(positive, weights, mean, normalize),
        Needs(needs_a, needs_b, needs_scale, needs_positive),
        backend,
    )
    gradients = (*found.gradients, found.positive)
    return found.loss, *found.statistics, *(scale.new_empty(0) if g is None else g for g in gradients)


@_cross_entropy.register_fake
def _(a, b, scale, target, positive, weights, plan, mean, normalize, norm_bound, row0, col0, *needs_and_backend):
    decoded, dtype = Plan.decode(plan), accumulation_dtype(a.dtype)
    n, m = a.shape[0], (a if b is None else b).shape[0]

    def gradient_of(x: Tensor | None, needed: bool) -> Tensor:
        return scale.new_empty(x.shape if needed else (0,), dtype=dtype)

    needs = needs_and_backend[:4]
    return (
        scale.new_empty((), dtype=dtype),
        scale.new_empty((len(decoded.rows), n), dtype=dtype),
        scale.new_empty((len(decoded.columns), m), dtype=dtype),
        *(gradient_of(x, needed) for x, needed in zip((a, b, scale, positive), needs, strict=True)),
    )


def _save_gradients(ctx, inputs, output) -> None:
    a, b, scale, _, positive, *_ = inputs
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, scale, positive, *others[2:])


def _backward(ctx, grad_loss: Tensor | None, *_: None):
    operands, gradients = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    needed = (ctx.needs_input_grad[i] for i in (0, 1, 2, 4))
    results = [None] * 17
    for at, x, gradient, need in zip((0, 1, 2, 4), operands, gradients, needed, strict=True):
        if need and grad_loss is not None:
            scaled = torch.ops.fastcl.first_derivative(gradient, x) if torch.is_grad_enabled() else gradient
            results[at] = (scaled * grad_loss).to(x.dtype)
    return tuple(results)


@torch.library.custom_op("fastcl::first_derivative", mutates_args=())
def _first_derivative(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient``, which depends on ``x`` in a way that autograd doesn't know: its own derivative is refused."""
    return gradient.clone()


@_first_derivative.register_fake
def _(gradient, x):
    return torch.empty_like(gradient)


_cross_entropy.register_autograd(_backward, setup_context=_save_gradients)
_first_derivative.register_autograd(refuse_double_backward)
