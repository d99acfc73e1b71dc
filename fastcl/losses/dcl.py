"""The decoupled contrastive loss. May import the vocabulary and :mod:`fastcl.losses.common`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_pair, check_scalar
from fastcl.losses.common import LossStats, Run, check_weight, inverse, normalize_rows, other_view, summarize
from fastcl.terms import Mask, Reduce, Tags, Term


def dcl_loss(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    *,
    sigma: float | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""NT-Xent without the positive in its denominator: an easy positive doesn't weaken the negatives' gradient.

    With :math:`z = [z_1; z_2]` of 2B rows (scaled to unit length where ``normalize``) and :math:`p(i)` the row of the
    other view of the same example,

    .. math:: \ell_i = -\frac{w_i \langle z_i, z_{p(i)}\rangle}{\tau}
                       + \log \sum_{j \ne i, p(i)} \exp(\langle z_i, z_j\rangle / \tau),
              \qquad w_i = 2 - \frac{B \exp(\langle z_i, z_{p(i)}\rangle / \sigma)}
                                    {\sum_{k \le B} \exp(\langle z_k, z_{p(k)}\rangle / \sigma)}

    and :math:`w_i = 1` without ``sigma``. The weights favour positives that are far apart, and carry no gradient. The
    mean over all 2B rows equals lightly's ``DCLLoss``, and with ``sigma`` its ``DCLWLoss``. It may be negative.

    Args:
        z1, z2: the views [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        tau: the temperature, a positive float or a 0-d tensor, which may require grad.
        sigma: the temperature of the positives' weights, a positive float (0.5 in lightly); None for no weights.
        ids: integers [B]: rows with an equal id are never negatives of each other (duplicates, other views).
        weight: [B], a constant factor of the losses of both views of an example. The mean still divides by 2B.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [2B]: the rows of ``z1``, then those of ``z2``.
        return_stats: also return a :class:`fastcl.LossStats` from the same sweep.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty; the positives' weights are those of the union, too.
        exchange: how the ranks' features travel: "ring", "gather", or "auto" by their size (docs/many-ranks.md).

    Returns:
        The loss in float32 (float64 for float64 features). A row without negatives has loss 0 and gradient 0. With a
        ``group``, "mean" and "sum" are over the rows of all ranks, the same on each, and "none" is this rank's rows.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 2 * (2B)^2 * D multiply-adds for value and gradient, O(B) memory beyond features and gradients.

    Source: Yeh et al., Decoupled Contrastive Learning, 2022 (arXiv:2110.06848).

    >>> import torch, fastcl
    >>> z = torch.eye(4, 8)
    >>> round(fastcl.dcl_loss(z, z, 1.0).item(), 4)  # log 6 - 1
    0.7918
    """
    check_scalar("tau", tau, positive=True)
    if sigma is not None:
        check_scalar("sigma", sigma, positive=True)
    check_pair("z1", z1, "z2", z2, same_rows=True, may_be_empty=group is not None)
    check_weight(weight, z1)
    run = Run.checked(
        reduction, backend, group, exchange, loss="dcl_loss", normalize=normalize, return_stats=return_stats,
        ids=ids is not None, sigma=sigma,
    )  # fmt: skip
    z, scale, batch = torch.cat((z1, z2)), inverse(tau, z1), z1.shape[0]
    ids, weight = (None if x is None else torch.cat((x, x)) for x in (ids, weight))
    mask = Mask(self_pair=False, target=False, id=None if ids is None else False)
    terms = [Term(Reduce.LSE, mask), Term(Reduce.SUM, Mask(target=True))]
    negatives, positive, *hardest = run.statistics(
        normalize_rows(z) if normalize else z,
        None,
        [*terms, Term(Reduce.MAX, mask)] if return_stats else terms,
        scale,
        target=other_view(batch, z.device),
        tags=Tags(None, ids),
        norm_bound=1.0 if normalize else None,
    )
    pulled = positive
    if sigma is not None:
        pulled = positive * _weights(run, (positive * tau / sigma).detach())
    loss = run.reduce(negatives - pulled, weight, has_say=negatives > -math.inf)
    return (loss, summarize(run, positive, hardest, None, scale)) if return_stats else loss


def _weights(run: Run, logits: Tensor) -> Tensor:
    """2 - B softmax(logits of the B examples of all ranks), given those of both views."""
    nothing = logits.new_full((1,), -math.inf)
    weights = (logits - run.over_ranks(torch.cat((nothing, logits)).amax(), "max")).exp()
    total, rows = run.over_ranks(torch.stack((weights.sum(), weights.new_full((), len(weights)))), "sum")
    return 2.0 - rows * weights / total


def reference(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    *,
    sigma: float | None = None,
    ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each row, [2B]."""
    z = torch.cat((z1, z2))
    if normalize:
        z = torch.nn.functional.normalize(z, dim=1)
    batch = len(z1)
    similarity = z @ z.T
    example = torch.arange(batch, device=z.device).repeat(2)
    dropped = example[:, None] == example
    if ids is not None:
        dropped |= ids.repeat(2)[:, None] == ids.repeat(2)
    positive = similarity.diagonal(batch).repeat(2)
    weights = torch.ones_like(positive)
    if sigma is not None:
        weights = (2 - batch * (positive[:batch].detach() / sigma).softmax(dim=0)).repeat(2)
    alone = dropped.all(dim=1)
    logits = (similarity / tau).masked_fill(dropped & ~alone[:, None], float("-inf"))
    return (logits.logsumexp(dim=1) - weights * positive / tau).where(~alone, 0.0)
