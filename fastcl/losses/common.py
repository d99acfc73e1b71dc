"""What the softmax losses share: normalisation, the loss of one row, reductions and the statistics they report.

May import :mod:`fastcl.terms` and :mod:`fastcl.checks`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
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


def reduce_loss(loss: Tensor, reduction: str) -> Tensor:
    """Mean, sum or nothing."""
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


def summarize(positive: Tensor, hardest: list[Tensor], has_positive: Tensor | None, scale: float | Tensor) -> LossStats:
    """LossStats from the positives' logits and, for each direction, the largest negative logit of each row."""
    positive = positive.detach()
    scale = torch.as_tensor(scale, dtype=positive.dtype, device=positive.device).detach()
    valid = torch.ones_like(positive, dtype=torch.bool) if has_positive is None else has_positive
    count = valid.sum().clamp_min(1)
    correct = torch.stack([((positive > negative) & valid).sum() / count for negative in hardest])
    return LossStats(
        accuracy=correct.mean(),
        positive_similarity=positive.where(valid, positive.new_zeros(())).sum() / count / scale,
        hardest_negative=torch.stack([negative.amax() for negative in hardest]).amax() / scale,
        scale=scale,
    )
