"""The softmax losses below autograd: from statistics to one number, its gradient, and back through unit length.

May import :mod:`fastcl.terms` only. Backends share what is here; :func:`two_sweeps` is the whole computation for a
backend that knows nothing better than its ``statistics`` and ``gradient``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcl.terms import (
    CrossEntropy,
    Gradients,
    LossAndGradients,
    Needs,
    Operands,
    Plan,
    Products,
    Reduce,
    Statistics,
)

_SMALLEST_NORM = 1e-12
_CHUNK = 1 << 25


class Evaluation(NamedTuple):
    """The loss [0-d], its gradient with respect to the statistics, and with respect to ``CrossEntropy.positive``."""

    loss: Tensor
    incoming: Statistics
    positive: Tensor | None


def evaluate(plan: Plan, head: CrossEntropy, statistics: Statistics, rows: int) -> Evaluation:
    """What ``head`` makes of the statistics of (some of) the ``rows`` that its mean is over."""
    factor = head.factor(plan, rows)
    sums = [i for i, term in enumerate(plan.rows) if term.reduce is Reduce.SUM]
    positive = statistics.rows[sums[0]] if head.positive is None else head.positive
    incoming = Statistics(*(torch.zeros_like(values) for values in statistics))
    loss, total = positive.new_zeros(()), torch.zeros_like(positive)
    for terms, values, gradients in zip((plan.rows, plan.columns), statistics, incoming, strict=True):
        for k, term in enumerate(terms):
            if term.reduce is not Reduce.LSE:
                continue
            difference = values[k] - positive
            row_loss, slope = F.softplus(difference, threshold=40.0), torch.sigmoid(difference)
            if head.weights is not None:
                # A row without weight has no say, whatever its similarities are.
                ignored = head.weights == 0
                row_loss = (row_loss * head.weights).masked_fill(ignored, 0.0)
                slope = (slope * head.weights).masked_fill(ignored, 0.0)
            loss += row_loss.sum() * factor
            gradients[k] = slope * factor
            total += gradients[k]
    if head.positive is None:
        incoming.rows[sums[0]] = -total
    return Evaluation(loss, incoming, None if head.positive is None else -total)


def two_sweeps(
    statistics: Callable[..., Statistics],
    gradient: Callable[..., Products],
    plan: Plan,
    operands: Operands,
    head: CrossEntropy,
    needs: Needs,
) -> LossAndGradients:
    """Loss and gradients by a backend's sweep for the statistics and its sweep for the products."""
    unit = unit_operands(operands) if head.normalize else operands
    values = statistics(plan, unit)
    found = evaluate(plan, head, values, operands.shape[0])
    products = Products(None, None)
    if needs.a or needs.b or needs.scale:
        products = gradient(plan, unit, values, found.incoming, needs.product_a, needs.b)
    gradients = finish(plan, unit, products, needs, operands.accumulation_dtype)
    if head.normalize:
        gradients = through_unit_length(operands, gradients)
    return LossAndGradients(found.loss, values, gradients, found.positive if needs.positive else None)


def finish(plan: Plan, operands: Operands, products: Products, needs: Needs, dtype: torch.dtype) -> Gradients:
    """Gradients of the operands, in ``dtype``, and of the scale from the products, which are used up."""
    scale = scale_gradient(plan, operands, products) if needs.scale else None

    def gradient_of(product: Tensor) -> Tensor:
        return torch.mul(product, operands.scale, out=narrowed(product, dtype))

    return Gradients(gradient_of(products.a) if needs.a else None, gradient_of(products.b) if needs.b else None, scale)


def scale_gradient(plan: Plan, operands: Operands, products: Products) -> Tensor:
    """The scale's gradient from either product: S = scale * A @ B.T, so it is the sum of W * (A @ B.T)."""
    x, product = (operands.a, products.a) if products.b is None else (operands.keys, products.b)
    # a symmetric product counts each pair twice
    return _inner_product(x, product) * (0.5 if plan.symmetric else 1.0)


def narrowed(product: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the gradient that is made of a product goes: the product itself where it has the gradient's dtype."""
    return product if product.dtype is dtype else torch.empty_like(product, dtype=dtype)


def unit_operands(operands: Operands) -> Operands:
    """The operands with rows of unit length, in their dtype."""
    dtype = operands.accumulation_dtype

    def unit(x: Tensor) -> Tensor:
        parts = [F.normalize(part.to(dtype), dim=1, eps=_SMALLEST_NORM).to(x.dtype) for part in _parts(x)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return replace(operands, a=unit(operands.a), b=None if operands.b is None else unit(operands.b), norm_bound=1.0)


def through_unit_length(operands: Operands, gradients: Gradients) -> Gradients:
    """Gradients with respect to rows of unit length turned into those with respect to ``operands``, in place."""

    def back(x: Tensor, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        for given, part in zip(_parts(x), _parts(gradient), strict=True):
            given = given.to(part.dtype)
            norm = torch.linalg.vector_norm(given, dim=1, keepdim=True)
            clamped = norm.clamp_min(_SMALLEST_NORM)
            direction = given / clamped
            radial = (part * direction).sum(dim=1, keepdim=True).masked_fill_(norm < _SMALLEST_NORM, 0.0)
            part.sub_(radial * direction).div_(clamped)
        return gradient

    return Gradients(back(operands.a, gradients.a), back(operands.keys, gradients.b), gradients.scale)


def _inner_product(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([(p.to(q.dtype) * q).sum() for p, q in zip(_parts(x), _parts(y), strict=True)]).sum()


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Rows together, in parts whose copies in a wider dtype are small."""
    return x.split(max(1, _CHUNK // max(1, x.shape[1])))
