"""NT-Xent, the loss of SimCLR. May import the vocabulary and :mod:`fastcl.losses.common`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_choice, check_pair, check_scalar
from fastcl.losses.common import (
    REDUCTIONS,
    LossStats,
    inverse,
    softmax_loss,
    summarize,
)
from fastcl.terms import Mask, Reduce, Term

_NEGATIVES = Mask(self_pair=False, target=False)
_TERMS = (Term(Reduce.LSE, _NEGATIVES), Term(Reduce.SUM, Mask(target=True)))
_HARDEST = Term(Reduce.MAX, _NEGATIVES)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The normalised temperature-scaled cross entropy of two views of a batch.

    With :math:`z = [z_1; z_2]` of 2B rows (scaled to unit length where ``normalize``) and :math:`p(i)` the row of the
    other view of the same example,

    .. math:: \ell_i = -\log \frac{\exp(\langle z_i, z_{p(i)}\rangle / \tau)}
                                  {\sum_{j \ne i} \exp(\langle z_i, z_j\rangle / \tau)}

    The mean over all 2B rows equals lightly's ``NTXentLoss`` and pytorch-metric-learning's
    ``SelfSupervisedLoss(NTXentLoss)``; SimCLR's original code reports twice that.

    Args:
        z1, z2: the views [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        tau: the temperature, a positive float or a 0-d tensor, which may require grad.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [2B]: the rows of ``z1``, then those of ``z2``.
        return_stats: also return a :class:`fastcl.LossStats` from the same sweep.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty; see Returns.
        exchange: how the ranks' features travel: "ring", "gather", or "auto" by their size (docs/many-ranks.md).

    Returns:
        The loss in float32 (float64 for float64 features). A batch of one pair has no negatives, loss 0 and gradient 0.
        With a ``group``, "mean" and "sum" are over the rows of all ranks, the same on each, and "none" is this rank's
        rows; after the usual mean of gradients over ranks, all gradients are those of the loss of the union.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 2 * (2B)^2 * D multiply-adds for value and gradient, O(B) memory beyond features and gradients.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020 (arXiv:2002.05709).

    >>> import torch, fastcl
    >>> z = torch.eye(4, 8)
    >>> round(fastcl.nt_xent(z, z, 0.5).item(), 4)  # log(1 + 6 * exp(-2))
    0.5944
    """
    check_scalar("tau", tau, positive=True)
    check_choice("reduction", reduction, REDUCTIONS)
    check_pair("z1", z1, "z2", z2, same_rows=True, may_be_empty=group is not None)
    scale, batch = inverse(tau, z1), z1.shape[0]
    loss, (_, positive, *hardest) = softmax_loss(
        torch.cat((z1, z2)),
        None,
        (*_TERMS, _HARDEST) if return_stats else _TERMS,
        scale,
        reduction=reduction,
        normalize=normalize,
        target=torch.arange(batch, 3 * batch, device=z1.device) % max(1, 2 * batch),
        backend=backend,
        group=group,
        exchange=exchange,
        call=f"loss=nt_xent\nreturn_stats={return_stats}",
    )
    return (loss, summarize(positive, hardest, None, scale, group)) if return_stats else loss


def reference(z1: Tensor, z2: Tensor, tau: float | Tensor, *, normalize: bool = True) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each row, [2B]."""
    z = torch.cat((z1, z2))
    if normalize:
        z = torch.nn.functional.normalize(z, dim=1)
    batch = z1.shape[0]
    logits = (z @ z.T / tau).fill_diagonal_(float("-inf"))
    positive = torch.arange(2 * batch, device=z.device).roll(batch)
    return torch.nn.functional.cross_entropy(logits, positive, reduction="none")
