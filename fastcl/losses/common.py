"""What the softmax losses share: normalisation, the loss of one row, reductions and the statistics they report.

May import :mod:`fastcl.terms` and :mod:`fastcl.checks`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.terms import accumulation_dtype

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


def softmax_loss(negatives: Tensor, positive: Tensor) -> Tensor:
    """-log softmax of the positive, from the log-sum-exp of the negatives alone.

    softplus(negatives - positive) keeps its precision when the positive dominates, where the difference of a
    log-sum-exp over everything and the positive cancels. Rows without negatives (-inf) have loss 0 and gradient 0.
    """
    return F.softplus(negatives - positive, threshold=40.0)


def reduce_loss(loss: Tensor, reduction: str, group: ProcessGroup | None = None) -> Tensor:
    """Mean, sum or nothing; the mean and the sum are over the rows of all ranks of the group."""
    if reduction == "none":
        return loss
    if group is None:
        return loss.mean() if reduction == "mean" else loss.sum()
    total, count = over_ranks(torch.stack((loss.sum(), loss.new_full((), loss.shape[0]))), "sum", group).unbind()
    return total / count if reduction == "mean" else total


def describe_call(loss: str, **options: object) -> str:
    """What the ranks of a group must agree on besides their tensors, for the error that says where they don't."""
    return "\n".join(f"{name}={value}" for name, value in (("loss", loss), *options.items()))


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
