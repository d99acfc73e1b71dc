"""Debiased and hard-negative contrastive losses: negatives corrected for those that are positives, and reweighted.

May import the vocabulary and :mod:`fastcl.losses.common`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.checks import check_between, check_pair, check_scalar
from fastcl.losses.common import (
    LossStats,
    Run,
    check_weight,
    count_equal,
    inverse,
    normalize_rows,
    other_view,
    summarize,
)
from fastcl.terms import Mask, Reduce, Tags, Term


def debiased_loss(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    tau_plus: float,
    *,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""NT-Xent whose negatives are corrected for the share of them that must be of the row's own class.

    With :math:`z = [z_1; z_2]` of 2B rows of unit length, :math:`p(i)` the row of the other view of the same example,
    :math:`S_{ij} = \langle z_i, z_j\rangle / \tau`, and the N = 2B - 2 negatives :math:`j \ne i, p(i)`,

    .. math:: \ell_i = -\log \frac{e^{S_{ip(i)}}}{e^{S_{ip(i)}} + G_i}, \qquad
              G_i = \max\Bigl(\frac{\sum_j e^{S_{ij}} - N \tau^+ e^{S_{ip(i)}}}{1 - \tau^+},\; N e^{-1/\tau}\Bigr)

    With ``tau_plus=0`` it is :func:`fastcl.nt_xent`.

    Args:
        z1, z2: the views [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        tau: the temperature, a positive float or a 0-d tensor, which may require grad.
        tau_plus: the probability that a negative is of the same class as the row, at least 0 and below 1.
        ids: integers [B]: rows with an equal id are never negatives of each other, nor counted in N.
        weight: [B], a constant factor of the losses of both views of an example. The mean still divides by 2B.
        normalize: scale each row to unit length first; False if the rows are so already, as the bound of G supposes.
        reduction: "mean", "sum", or "none" for [2B]: the rows of ``z1``, then those of ``z2``.
        return_stats: also return a :class:`fastcl.LossStats` from the same sweep.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch, and N, is then that of its ranks together, whose batches
            may differ in length, or be empty.
        exchange: how the ranks' features travel: "ring", "gather", or "auto" by their size (docs/many-ranks.md).

    Returns:
        The loss in float32 (float64 for float64 features). A row without negatives has loss 0 and gradient 0. With a
        ``group``, "mean" and "sum" are over the rows of all ranks, the same on each, and "none" is this rank's rows.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 2 * (2B)^2 * D multiply-adds for value and gradient, O(B) memory beyond features and gradients.

    Source: Chuang et al., Debiased Contrastive Learning, 2020 (arXiv:2007.00224).

    >>> import torch, fastcl
    >>> z = torch.eye(4, 8)
    >>> round(fastcl.debiased_loss(z, z, 1.0, 0.1).item(), 4)  # log(1 + 6 (1 - 0.1 e) / 0.9 / e)
    1.0246
    """
    return _corrected_loss(
        z1, z2, tau, tau_plus, 0.0, ids=ids, weight=weight, normalize=normalize, reduction=reduction,
        return_stats=return_stats, backend=backend, group=group, exchange=exchange,
    )  # fmt: skip


def hard_negative_loss(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    tau_plus: float,
    beta: float,
    *,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The debiased loss whose negatives count the more, the more similar they are.

    It is :func:`debiased_loss` with

    .. math:: G_i = \max\Bigl(\frac{1}{1 - \tau^+} \Bigl(
              \frac{\sum_j e^{(1 + \beta) S_{ij}}}{\frac1N \sum_j e^{\beta S_{ij}}} - N \tau^+ e^{S_{ip(i)}}\Bigr),\;
              N e^{-1/\tau}\Bigr)

    The weights :math:`e^{\beta S_{ij}}` over their mean carry a gradient. With ``beta=0`` it is the debiased loss.

    Args:
        z1, z2, tau, tau_plus, ids, weight, normalize: as in :func:`debiased_loss`.
        beta: how much harder negatives count, a float of at least 0.
        reduction, return_stats, backend, group, exchange: as in :func:`debiased_loss`.

    Returns:
        As :func:`debiased_loss`.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 4 * (2B)^2 * D multiply-adds for value and gradient (two sweeps, of the scales (1 + beta) / tau and
    beta / tau), O(B) memory beyond features and gradients.

    Source: Robinson et al., Contrastive Learning with Hard Negative Samples, 2021 (arXiv:2010.04592).

    >>> import torch, fastcl
    >>> z = torch.eye(4, 8)
    >>> round(fastcl.hard_negative_loss(z, z, 1.0, 0.1, 1.0).item(), 4)  # equal negatives have equal weights
    1.0246
    """
    return _corrected_loss(
        z1, z2, tau, tau_plus, beta, ids=ids, weight=weight, normalize=normalize, reduction=reduction,
        return_stats=return_stats, backend=backend, group=group, exchange=exchange,
    )  # fmt: skip


def _corrected_loss(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    tau_plus: float,
    beta: float,
    *,
    ids: Tensor | None,
    weight: Tensor | None,
    normalize: bool,
    reduction: str,
    return_stats: bool,
    backend: str | None,
    group: ProcessGroup | None,
    exchange: str,
) -> Tensor | tuple[Tensor, LossStats]:
    check_scalar("tau", tau, positive=True)
    check_between("tau_plus", tau_plus, 0.0, math.nextafter(1.0, 0.0))
    check_between("beta", beta, 0.0, math.inf)
    check_pair("z1", z1, "z2", z2, same_rows=True, may_be_empty=group is not None)
    check_weight(weight, z1)
    run = Run.checked(
        reduction, backend, group, exchange, loss="debiased_loss", normalize=normalize, return_stats=return_stats,
        ids=ids is not None, tau_plus=tau_plus, beta=beta,
    )  # fmt: skip
    z, scale = torch.cat((z1, z2)), inverse(tau, z1)
    ids, weight = (None if x is None else torch.cat((x, x)) for x in (ids, weight))
    if normalize:
        z = normalize_rows(z)

    def sweep(terms: list[Term], factor: float) -> tuple[Tensor, ...]:
        target = other_view(len(z1), z.device)
        return run.statistics(
            z, None, terms, scale * factor, target=target, tags=Tags(None, ids), norm_bound=1.0 if normalize else None
        )

    mask = Mask(self_pair=False, target=False, id=None if ids is None else False)
    terms = [Term(Reduce.LSE, mask), Term(Reduce.SUM, Mask(target=True))]
    negatives, *logits = sweep([*terms, Term(Reduce.MAX, mask)] if return_stats else terms, 1.0 + beta)
    positive, *hardest = (x / (1.0 + beta) for x in logits)
    has_negatives = negatives > -math.inf
    # The places of rows without negatives are filled before anything is subtracted from -inf.
    negatives = negatives.masked_fill(~has_negatives, 0.0)
    log_count = _count(run, negatives, ids).clamp_min(1).log()
    if beta:
        (weights,) = sweep([Term(Reduce.LSE, mask)], beta)
        negatives = negatives - weights.masked_fill(~has_negatives, 0.0) + log_count
    loss = F.softplus(_log_corrected(negatives, positive, log_count, scale, tau_plus) - positive, threshold=40.0)
    loss = run.reduce(loss, weight, has_negatives)
    return (loss, summarize(run, positive, hardest, None, scale)) if return_stats else loss


def _count(run: Run, like: Tensor, ids: Tensor | None) -> Tensor:
    """How many negatives each row has among those of all ranks."""
    rows = run.over_ranks(like.new_full((), len(like)), "sum")
    return rows - (2 if ids is None else count_equal(run, ids, ids))


def _log_corrected(
    negatives: Tensor, positive: Tensor, log_count: Tensor, scale: float | Tensor, tau_plus: float
) -> Tensor:
    """log G of the docstring, from the logarithms of the sum over negatives, of the positive and of N."""
    floor = (log_count - scale).expand_as(negatives)
    share = log_count + positive + (math.log(tau_plus) if tau_plus else -math.inf) - negatives
    found = share < 0
    corrected = negatives + (-torch.expm1(share.where(found, -1.0))).log() - math.log1p(-tau_plus)
    return corrected.where(found & (corrected > floor), floor)


def reference(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    tau_plus: float,
    beta: float = 0.0,
    *,
    ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each row, [2B]."""
    z = torch.cat((z1, z2))
    if normalize:
        z = F.normalize(z, dim=1)
    example = torch.arange(len(z1), device=z.device).repeat(2)
    kept = example[:, None] != example
    if ids is not None:
        kept &= ids.repeat(2)[:, None] != ids.repeat(2)
    similarity = z @ z.T / tau
    positive = similarity.diagonal(len(z1)).repeat(2).exp()
    count = kept.sum(dim=1)
    weights = (beta * similarity).exp() * kept
    weights = weights / (weights.sum(dim=1) / count.clamp_min(1)).where(count > 0, 1.0)[:, None]
    negatives = (weights * similarity.exp()).sum(dim=1)
    corrected = (negatives - count * (tau_plus * positive)) / (1 - tau_plus)
    corrected = torch.maximum(corrected, count * torch.as_tensor(-1 / tau).exp().to(corrected.dtype))
    return (corrected / positive).log1p().where(count > 0, 0.0)
