"""What the softmax losses share: normalisation, the loss from its terms, and the statistics they report.

May import the primitives, :mod:`fastcl.terms` and :mod:`fastcl.checks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.checks import check_choice
from fastcl.cross_entropy import cross_entropy
from fastcl.distributed import EXCHANGES
from fastcl.pairwise import pairwise
from fastcl.terms import Reduce, Term, accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")


class LossStats(NamedTuple):
    """Detached 0-d diagnostics of a batch, from the loss's own sweep; reading one is what waits for the device."""

    accuracy: Tensor
    """share of the rows (for CLIP: rows and columns) whose positive is the most similar candidate (acc@1)"""
    positive_similarity: Tensor
    """mean similarity of the positive pairs, before the scale"""
    hardest_negative: Tensor
    """largest similarity of any negative pair, before the scale"""
    scale: Tensor
    """1 / temperature"""


def normalize_rows(x: Tensor) -> Tensor:
    """Rows of unit length, in the dtype of ``x``.

    The norm and the division are in float32 (float64 for float64), so that no half-precision norm overflows and a row
    of zeros stays zeros.
    """
    return F.normalize(x.to(accumulation_dtype(x.dtype)), dim=-1).to(x.dtype)


def inverse(tau: float | Tensor, features: Tensor) -> float | Tensor:
    """The scale that a temperature stands for, in the accumulation dtype of the features."""
    return 1.0 / (tau.to(accumulation_dtype(features.dtype)) if isinstance(tau, Tensor) else tau)


def softmax_loss(
    a: Tensor,
    b: Tensor | None,
    terms: Sequence[Term],
    scale: float | Tensor,
    *,
    reduction: str,
    normalize: bool,
    positive: Tensor | None = None,
    has_positive: Tensor | None = None,
    target: Tensor | None = None,
    norm_bound: float | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
    call: str = "",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-log softmax of each row's positive, averaged over the LSE terms, and the values of all terms.

    The LSE terms admit negatives only: softplus(L - positive) keeps its precision when the positive dominates, where
    the difference of a log-sum-exp over everything and the positive cancels. Rows without negatives (L = -inf) have
    loss 0 and gradient 0, and so have rows where ``has_positive`` is false. The positive is the SUM term unless given.

    A mean or a sum is one operator call for value and gradient. The losses of the single rows, whose weights only
    backward knows, take one for each, and so do those of a ``group``, whose rows are complete only after the exchange.
    ``call`` says in lines ``name=value`` what all ranks of the group must agree on besides the arguments here.
    """
    check_choice("exchange", exchange, EXCHANGES)
    if reduction != "none" and group is None:
        return cross_entropy(
            a,
            b,
            terms,
            scale,
            positive=positive,
            weights=None if has_positive is None else has_positive.to(accumulation_dtype(a.dtype)),
            reduction=reduction,
            normalize=normalize,
            target=target,
            norm_bound=norm_bound,
            backend=backend,
        )
    if normalize:
        a, b, norm_bound = normalize_rows(a), None if b is None else normalize_rows(b), 1.0
    values = pairwise(
        a,
        b,
        terms,
        scale,
        target=target,
        norm_bound=norm_bound,
        backend=backend,
        group=group,
        exchange=exchange,
        call=f"{call}\nnormalize={normalize}\nreduction={reduction}",
    )
    if positive is None:
        positive = next(value for term, value in zip(terms, values, strict=True) if term.reduce is Reduce.SUM)
    negatives = [value for term, value in zip(terms, values, strict=True) if term.reduce is Reduce.LSE]
    loss = sum(F.softplus(value - positive, threshold=40.0) for value in negatives) / len(negatives)
    if has_positive is not None:
        loss = loss.where(has_positive, loss.new_zeros(()))
    return _reduce(loss, reduction, group), values


def _reduce(loss: Tensor, reduction: str, group: ProcessGroup | None) -> Tensor:
    """Mean, sum or nothing, over the rows of all ranks of the group."""
    if reduction == "none":
        return loss
    total, count = over_ranks(torch.stack((loss.sum(), loss.new_full((), loss.shape[0]))), "sum", group).unbind()
    return total / count if reduction == "mean" else total


def over_ranks(x: Tensor, operation: str, group: ProcessGroup | None) -> Tensor:
    """The "sum" or "max" over the ranks of the group, if there is one."""
    return x if group is None else torch.ops.fastcl.reduce_over_ranks(x, operation, group.group_name)


def summarize(
    positive: Tensor,
    hardest: list[Tensor],
    has_positive: Tensor | None,
    scale: float | Tensor,
    group: ProcessGroup | None = None,
) -> LossStats:
    """LossStats from the positives' logits and, for each direction, the largest negative logit of each row."""
    positive = positive.detach()
    hardest = [negative.detach() for negative in hardest]
    scale = torch.as_tensor(scale, dtype=positive.dtype, device=positive.device).detach()
    valid = torch.ones_like(positive, dtype=torch.bool) if has_positive is None else has_positive
    sums = [valid.sum(), positive.where(valid, positive.new_zeros(())).sum()]
    sums += [((positive > negative) & valid).sum() for negative in hardest]
    count, similarity, *correct = over_ranks(torch.stack([x.to(positive.dtype) for x in sums]), "sum", group).unbind()
    nothing = positive.new_full((1,), -math.inf)
    largest = torch.cat([nothing, *hardest]).amax()
    count = count.clamp_min(1)
    return LossStats(
        accuracy=torch.stack(correct).mean() / count,
        positive_similarity=similarity / count / scale,
        hardest_negative=over_ranks(largest, "max", group) / scale,
        scale=scale,
    )
