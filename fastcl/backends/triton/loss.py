"""A softmax loss by two sweeps: the statistics, what they come to, and the backward over panels of W."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastcl.backends.panels import KeepRows
from fastcl.backends.triton import backward, forward, launch
from fastcl.backends.triton.kernels.head import loss_kernel
from fastcl.backends.triton.plan import SUM_CODE, constants
from fastcl.terms import CrossEntropy, Needs, Plan, Products, Statistics

_BLOCK = 128


class LossAndProducts(NamedTuple):
    """What comes before the gradients: the rows' losses, their statistics, and the products with W.

    ``positive`` is the gradient of the positives where they are not among the statistics.
    """

    losses: Tensor
    statistics: Statistics
    products: Products
    positive: Tensor | None


def two_sweeps(
    plan: Plan, x: launch.Inputs, head: CrossEntropy, needs: Needs, keep_rows: KeepRows | None
) -> LossAndProducts:
    statistics = forward.statistics(plan, x)
    losses, incoming, positive = _evaluated(plan, x, head, statistics, needs.positive)
    products = backward.gradient(plan, x, statistics, incoming, needs.product_a, needs.b, keep_rows)
    return LossAndProducts(losses, statistics, products, positive)


def _evaluated(
    plan: Plan, x: launch.Inputs, head: CrossEntropy, statistics: Statistics, needs_positive: bool
) -> tuple[Tensor, Statistics, Tensor | None]:
    """The rows' losses, the gradient with respect to the statistics, and with respect to ``head.positive``."""
    codes = constants(plan)
    n = x.a.shape[0]
    sums = [t for t, (reduce, *_) in enumerate(codes.row_terms) if reduce == SUM_CODE]
    incoming = Statistics(*map(torch.empty_like, statistics))
    losses = statistics.rows.new_empty(n)
    gradient = torch.empty_like(losses) if needs_positive else None
    with launch.on_device(x.a):
        loss_kernel[(triton.cdiv(n, _BLOCK),)](
            *statistics,
            launch.vector(head.positive),
            launch.vector(head.weights),
            *incoming,
            losses,
            gradient,
            n,
            head.factor(plan, n),
            ROW_TERMS=codes.row_terms,
            COLUMN_TERMS=() if plan.symmetric else codes.column_terms,
            POSITIVE=sums[0] if head.positive is None else -1,
            BLOCK=_BLOCK,
        )
    return losses, incoming, gradient
