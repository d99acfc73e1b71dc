"""Model-aware contrastive loss: a temperature that follows the alignment. May import :mod:`fastcl.losses.common`."""

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
    inverse,
    normalize_rows,
    other_view,
    row_similarity,
    summarize,
)
from fastcl.terms import Mask, Reduce, Tags, Term

_SMALLEST_REMAINDER = 1e-8


def macl_loss(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    *,
    alpha: float = 0.5,
    initial_alignment: float = 0.0,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""NT-Xent at a temperature that rises with the alignment, with more weight on rows that are nearly right.

    With :math:`z = [z_1; z_2]` of 2B rows, scaled to unit length, :math:`p(i)` the row of the other view of the same
    example and :math:`A = \frac{1}{2B}\sum_i \langle z_i, z_{p(i)}\rangle`,

    .. math:: \ell_i = -\frac{\log P_i}{1 - P_i + 10^{-8}}, \qquad
              P_i = \frac{\exp(\langle z_i, z_{p(i)}\rangle / t)}{\sum_{j \ne i} \exp(\langle z_i, z_j\rangle / t)},
              \qquad t = \tau \bigl(1 + \alpha (A - A_0)\bigr)

    where no gradient reaches the denominator :math:`1 - P_i` and A. The mean equals lightly's ``MACLLoss``. There is no
    ``normalize``: A is a cosine, and of rows of any length neither the size nor the sign of t would be known.

    Args:
        z1, z2: the views [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        tau: the base temperature, a positive float or a 0-d tensor, which may require grad.
        alpha: how much the temperature follows the alignment, from 0 to 1.
        initial_alignment: :math:`A_0`, the alignment at which the temperature is ``tau``, from 0 to 1.
        ids: integers [B]: rows with an equal id are never negatives of each other (duplicates, other views).
        weight: [B], a constant factor of the losses of both views of an example. The mean still divides by 2B.
        reduction: "mean", "sum", or "none" for [2B]: the rows of ``z1``, then those of ``z2``.
        return_stats: also return a :class:`fastcl.LossStats` from the same sweep.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch, and A, is then that of its ranks together, whose batches
            may differ in length, or be empty.
        exchange: how the ranks' features travel: "ring", "gather", or "auto" by their size (docs/many-ranks.md).

    Returns:
        The loss in float32 (float64 for float64 features). A row without negatives has loss 0 and gradient 0. With a
        ``group``, "mean" and "sum" are over the rows of all ranks, the same on each, and "none" is this rank's rows.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 2 * (2B)^2 * D multiply-adds for value and gradient, O(B) memory beyond features and gradients.

    Source: Huang et al., Model-Aware Contrastive Learning: Towards Escaping the Dilemmas, 2023 (arXiv:2207.07874).

    >>> import torch, fastcl
    >>> z = torch.eye(4, 8)
    >>> round(fastcl.macl_loss(z, z, 0.5, alpha=0.0).item(), 4)  # -log(P) / (1 - P) at P = 1 / (1 + 6 exp(-2))
    1.3265
    """
    check_scalar("tau", tau, positive=True)
    check_between("alpha", alpha, 0.0, 1.0)
    check_between("initial_alignment", initial_alignment, 0.0, 1.0)
    check_pair("z1", z1, "z2", z2, same_rows=True, may_be_empty=group is not None)
    check_weight(weight, z1)
    run = Run.checked(
        reduction, backend, group, exchange, loss="macl_loss", return_stats=return_stats, ids=ids is not None,
        alpha=alpha, initial_alignment=initial_alignment,
    )  # fmt: skip
    z = normalize_rows(torch.cat((z1, z2)))
    ids, weight = (None if x is None else torch.cat((x, x)) for x in (ids, weight))
    other = other_view(len(z1), z.device)
    aligned = row_similarity(z.detach(), z.detach()[other])
    total, rows = run.over_ranks(torch.stack((aligned.sum(), aligned.new_full((), len(z)))), "sum")
    scale = inverse(tau, z1) / (1.0 + alpha * (total / rows - initial_alignment))
    mask = Mask(self_pair=False, target=False, id=None if ids is None else False)
    terms = [Term(Reduce.LSE, mask), Term(Reduce.SUM, Mask(target=True))]
    if return_stats:
        terms.append(Term(Reduce.MAX, mask))
    negatives, positive, *hardest = run.statistics(
        z, None, terms, scale, target=other, tags=Tags(None, ids), norm_bound=1.0
    )
    loss = F.softplus(negatives - positive, threshold=40.0)
    remainder = -torch.expm1(-loss.detach()) + _SMALLEST_REMAINDER
    loss = run.reduce(loss / remainder, weight, has_say=negatives > -math.inf)
    return (loss, summarize(run, positive, hardest, None, scale)) if return_stats else loss


def reference(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    *,
    alpha: float = 0.5,
    initial_alignment: float = 0.0,
    ids: Tensor | None = None,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each row, [2B]."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    similarity, batch = z @ z.T, len(z1)
    positive = similarity.diagonal(batch).repeat(2)
    temperature = tau * (1 + alpha * (positive.detach().mean() - initial_alignment))
    tag = torch.arange(batch, device=z.device).repeat(2) if ids is None else ids.repeat(2)
    dropped = tag[:, None] == tag
    example = torch.arange(batch, device=z.device).repeat(2)
    dropped |= example[:, None] == example
    logits = (similarity / temperature).masked_fill(dropped, float("-inf"))
    logits = torch.cat((positive[:, None] / temperature, logits), dim=1)
    log_p = logits.log_softmax(dim=1)[:, 0]
    remainder = 1 - log_p.detach().exp() + 1e-8
    return -log_p / remainder.where(remainder > 0, 1.0)
