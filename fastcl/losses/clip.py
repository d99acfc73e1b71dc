"""The CLIP loss, both directions at once. May import the vocabulary and :mod:`fastcl.losses.common`."""

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
    margin_test,
    normalize_rows,
    row_similarity,
    softmax_loss,
    summarize,
)
from fastcl.losses.sup_con import Labelled, multi_positive_loss
from fastcl.terms import AXES, Mask, Reduce, Tags, Term


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    labels: Tensor | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    false_negative_margin: float | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The symmetric cross entropy of matching images and texts.

    With :math:`S_{ij} = \text{scale}\,\langle x_i, y_j\rangle + \text{bias}` over B pairs,

    .. math:: \ell_i = -\tfrac12\left(\log\frac{e^{S_{ii}}}{\sum_j e^{S_{ij}}}
                                     + \log\frac{e^{S_{ii}}}{\sum_j e^{S_{ji}}}\right)

    The mean equals open_clip's ``ClipLoss`` on one rank: features are expected to be normalised by the model, and
    ``logit_scale`` is the factor itself, already exponentiated. Hugging Face's ``model.logit_scale`` is its logarithm:
    pass ``model.logit_scale.exp()``.

    Args:
        image_features, text_features: [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        logit_scale: 1 / temperature, a positive float or a 0-d tensor, which may require grad.
        logit_bias: a float or a 0-d tensor. A softmax is blind to it: it changes neither the loss nor any gradient.
        labels: integers [B]: all images and texts with an equal label are positives of each other (several captions of
            an image, say); each direction is the loss of :func:`fastcl.sup_con_loss`.
        ids: integers [B]: pairs with an equal id are never negatives of each other (duplicates).
        weight: [B], a constant factor of a pair's loss. The mean still divides by B.
        false_negative_margin: leave out negatives that are more similar than the row's positive by more than this, as
            likely positives that nobody marked; a similarity, before the scale.
        label_smoothing: the share :math:`\varepsilon` of the target that is spread evenly over the candidates A, all
            but those that ``ids`` leave out; it adds :math:`\varepsilon (\bar S_P - \bar S_A)` to the loss of each
            direction, the mean logits of its positive (with ``labels``: positives) and of its candidates. Excludes a
            margin.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [B].
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

    Complexity: 4 * B^2 * D multiply-adds for value and gradients (rows and columns come from one sweep, both gradients
    from one recomputation), O(B) memory beyond features and gradients.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021
    (arXiv:2103.00020).

    >>> import torch, fastcl
    >>> x = torch.eye(3, 8)
    >>> round(fastcl.clip_loss(x, x, 1.0).item(), 4)  # log(1 + 2 / e)
    0.5514
    """
    check_scalar("logit_scale", logit_scale, positive=True)
    if logit_bias is not None:
        check_scalar("logit_bias", logit_bias, positive=False)
    check_pair(
        "image_features", image_features, "text_features", text_features, same_rows=True, may_be_empty=group is not None
    )
    check_tags(image_features, labels=labels, ids=ids)
    check_weight(weight, image_features)
    check_options(labels, false_negative_margin, label_smoothing)
    margin = false_negative_margin
    bias = "a tensor" if isinstance(logit_bias, Tensor) else logit_bias
    run = Run.checked(
        reduction, backend, group, exchange, loss="clip_loss", normalize=normalize, return_stats=return_stats,
        labels=labels is not None, ids=ids is not None, margin=margin is not None, smoothing=label_smoothing > 0,
        logit_bias=bias,
    )  # fmt: skip
    images, texts, norm_bound = image_features, text_features, None
    if labels is not None:
        pairs = Labelled(images, texts, Tags(labels, ids), Tags(labels, ids))
        loss, stats = multi_positive_loss(
            run,
            pairs,
            logit_scale,
            both_axes=True,
            normalize=normalize,
            weight=weight,
            label_smoothing=label_smoothing,
            return_stats=return_stats,
        )
    else:
        threshold = None
        if normalize and margin is not None:
            images, texts, normalize, norm_bound = normalize_rows(images), normalize_rows(texts), False, 1.0
        if margin is not None:
            threshold = false_negative_threshold(row_similarity(images, texts), margin, logit_scale)
        negatives = Mask(self_pair=False, id=None if ids is None else False, above=margin_test(margin))
        kinds = (Reduce.LSE, Reduce.MAX) if return_stats else (Reduce.LSE,)
        terms = [Term(Reduce.SUM, Mask(self_pair=True))]
        terms += [Term(reduce, negatives, axis) for reduce in kinds for axis in AXES]
        loss, (positive, _, _, *hardest) = softmax_loss(
            run,
            images,
            texts,
            terms,
            logit_scale,
            normalize=normalize,
            weight=weight,
            tags=Tags(None, ids, threshold),
            key_tags=Tags(None, ids, threshold),
            norm_bound=norm_bound,
            label_smoothing=label_smoothing,
            left_out=1 if ids is None or not label_smoothing else count_equal(run, ids, ids),
        )
        stats = summarize(run, positive, hardest, None, logit_scale) if return_stats else None
    if logit_bias is not None:
        # A parameter that changes nothing has a gradient of zero, not none; a NaN in it still shows.
        loss = loss + 0.0 * logit_bias
    return (loss, stats) if return_stats else loss


def reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    labels: Tensor | None = None,
    ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = False,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each pair, [B]."""
    if normalize:
        image_features, text_features = (
            torch.nn.functional.normalize(x, dim=1) for x in (image_features, text_features)
        )
    logits = logit_scale * image_features @ text_features.T
    if logit_bias is not None:
        logits = logits + logit_bias
    directions = (logits, logits.T)
    if ids is None and false_negative_margin is None and labels is None:
        target = torch.arange(len(logits), device=logits.device)
        by_row, by_column = (
            torch.nn.functional.cross_entropy(s, target, reduction="none", label_smoothing=label_smoothing)
            for s in directions
        )
        return 0.5 * (by_row + by_column)
    diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    positive = diagonal if labels is None else labels[:, None] == labels
    dropped = [torch.zeros_like(diagonal) if ids is None else ids[:, None] == ids] * 2
    if false_negative_margin is not None:
        margin = false_negative_margin * logit_scale
        dropped = [d | (s > s.diagonal()[:, None] + margin) for d, s in zip(dropped, directions, strict=True)]
    losses = []
    for s, left_out in zip(directions, dropped, strict=True):
        candidate = positive | ~left_out
        log_p = s.masked_fill(~candidate, float("-inf")).log_softmax(dim=1).masked_fill(~candidate, 0.0)
        of_positives = (log_p * positive).sum(dim=1) / positive.sum(dim=1)
        of_all = log_p.sum(dim=1) / candidate.sum(dim=1)
        losses.append((label_smoothing - 1) * of_positives - label_smoothing * of_all)
    return 0.5 * sum(losses)
