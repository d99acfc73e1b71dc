"""NT-Xent, the loss of SimCLR. May import the vocabulary and :mod:`fastcl.losses.common`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_pair, check_scalar
from fastcl.losses.common import (
    LossStats,
    Run,
    check_options,
    check_tags,
    check_weight,
    count_equal,
    false_negative_threshold,
    inverse,
    margin_test,
    normalize_rows,
    other_view,
    row_similarity,
    softmax_loss,
    summarize,
)
from fastcl.losses.sup_con import Labelled, multi_positive_loss
from fastcl.terms import NO_TAGS, Mask, Reduce, Tags, Term


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    *,
    labels: Tensor | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    false_negative_margin: float | None = None,
    label_smoothing: float = 0.0,
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
        labels: integers [B]. All rows with an equal label are then positives of each other, and the loss is that of
            :func:`fastcl.sup_con_loss`.
        ids: integers [B]: rows with an equal id are never negatives of each other (duplicates, other views).
        weight: [B], a constant factor of the losses of both views of an example. The mean still divides by 2B.
        false_negative_margin: leave out negatives that are more similar than the row's positive by more than this, as
            likely positives that nobody marked; a similarity, before the temperature.
        label_smoothing: the share :math:`\varepsilon` of the target that is spread evenly over the candidates A, all 2B
            - 1 other rows but those that ``ids`` leave out; it adds :math:`\varepsilon (\bar S_P - \bar S_A)` to a
            row's loss, the mean logits of its positive (with ``labels``: positives) and of its candidates. Excludes a
            margin.
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
    check_pair("z1", z1, "z2", z2, same_rows=True, may_be_empty=group is not None)
    check_tags(z1, labels=labels, ids=ids)
    check_weight(weight, z1)
    check_options(labels, false_negative_margin, label_smoothing)
    margin = false_negative_margin
    run = Run.checked(
        reduction, backend, group, exchange, loss="nt_xent", normalize=normalize, return_stats=return_stats,
        labels=labels is not None, ids=ids is not None, margin=margin is not None, smoothing=label_smoothing > 0,
    )  # fmt: skip
    z, scale, batch = torch.cat((z1, z2)), inverse(tau, z1), z1.shape[0]
    labels, ids, weight = (None if x is None else torch.cat((x, x)) for x in (labels, ids, weight))
    if labels is not None:
        pairs = Labelled(z, None, Tags(labels, ids), NO_TAGS)
        loss, stats = multi_positive_loss(
            run,
            pairs,
            scale,
            normalize=normalize,
            weight=weight,
            label_smoothing=label_smoothing,
            return_stats=return_stats,
        )
        return (loss, stats) if return_stats else loss
    threshold, norm_bound = None, None
    if normalize and margin is not None:
        z, normalize, norm_bound = normalize_rows(z), False, 1.0
    if margin is not None:
        threshold = false_negative_threshold(row_similarity(z, z.roll(batch, 0)), margin, scale)
    negatives = Mask(self_pair=False, target=False, id=None if ids is None else False, above=margin_test(margin))
    terms = [Term(Reduce.LSE, negatives), Term(Reduce.SUM, Mask(target=True))]
    loss, (_, positive, *hardest) = softmax_loss(
        run,
        z,
        None,
        [*terms, Term(Reduce.MAX, negatives)] if return_stats else terms,
        scale,
        normalize=normalize,
        weight=weight,
        target=other_view(batch, z.device),
        tags=Tags(None, ids, threshold),
        norm_bound=norm_bound,
        label_smoothing=label_smoothing,
        left_out=2 if ids is None or not label_smoothing else count_equal(run, ids, ids),
    )
    return (loss, summarize(run, positive, hardest, None, scale)) if return_stats else loss


def reference(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    *,
    ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each row, [2B]."""
    z = torch.cat((z1, z2))
    if normalize:
        z = torch.nn.functional.normalize(z, dim=1)
    batch = z1.shape[0]
    logits = (z @ z.T / tau).fill_diagonal_(float("-inf"))
    positive = torch.arange(2 * batch, device=z.device).roll(batch)
    own = logits.gather(1, positive[:, None])
    if ids is not None:
        logits = logits.masked_fill(ids.repeat(2)[:, None] == ids.repeat(2), float("-inf"))
    if false_negative_margin is not None:
        logits = logits.masked_fill(logits > own + false_negative_margin / tau, float("-inf"))
    if ids is not None or false_negative_margin is not None:
        logits = logits.scatter(1, positive[:, None], own)
    loss = torch.nn.functional.cross_entropy(logits, positive, reduction="none")
    if label_smoothing:
        candidate = logits > float("-inf")
        mean = logits.masked_fill(~candidate, 0.0).sum(dim=1) / candidate.sum(dim=1)
        loss = loss + label_smoothing * (own[:, 0] - mean)
    return loss
