"""The sigmoid loss: every pair is a yes-or-no question.

May import :mod:`fastcl.losses.common` and :mod:`fastcl.losses.sigmoid`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.checks import check_pair, check_scalar
from fastcl.losses.common import LossStats, Run, check_tags, check_weight, normalize_rows, summarize
from fastcl.losses.sigmoid import sigmoid_rows
from fastcl.terms import AXES, Mask, Reduce, Tags, Term


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    labels: Tensor | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The pairwise sigmoid loss of matching images and texts.

    With :math:`S_{ij} = \text{scale}\,\langle x_i, y_j\rangle + \text{bias}` over B pairs,

    .. math:: \ell_i = -\log \sigma(S_{ii}) - \sum_{j \ne i} \log \sigma(-S_{ij})

    The mean equals open_clip's ``SigLipLoss`` and the loss of Hugging Face's SigLIP on one rank: features are expected
    to be normalised by the model, and ``logit_scale`` is the factor itself, already exponentiated.

    Args:
        image_features, text_features: [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        logit_scale: a positive float or a 0-d tensor, which may require grad (10 at first, in the paper).
        logit_bias: a float or a 0-d tensor, which may require grad (-10 at first, in the paper).
        labels: integers [B]: images and texts with an equal label match, too.
        ids: integers [B]: images and texts with an equal id are left out where they don't match (duplicates).
        weight: [B], a constant factor of an image's loss. The mean still divides by B.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [B], the sums over each image's row.
        return_stats: also return a :class:`fastcl.LossStats`, from one more pass.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty. The texts of all ranks are gathered.

    Returns:
        The loss in float32 (float64 for float64 features). With a ``group``, "mean" and "sum" are over the rows of all
        ranks; after the usual mean of gradients over ranks, all gradients are those of the loss of the union.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 3 * B^2 * D multiply-adds for value and gradients (4 for "none"), O(B) memory beyond features and
    gradients.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023 (arXiv:2303.15343).

    >>> import torch, fastcl
    >>> x = torch.eye(2, 8)
    >>> round(fastcl.siglip_loss(x, x, 1.0, 0.0).item(), 4)  # log(1 + 1 / e) + log 2
    1.0064
    """
    check_scalar("logit_scale", logit_scale, positive=True)
    check_scalar("logit_bias", logit_bias, positive=False)
    check_pair(
        "image_features", image_features, "text_features", text_features, same_rows=True, may_be_empty=group is not None
    )
    check_tags(image_features, labels=labels, ids=ids)
    check_weight(weight, image_features)
    run = Run.checked(reduction, backend, group, "auto", loss="siglip_loss", return_stats=return_stats)
    if normalize:
        image_features, text_features = normalize_rows(image_features), normalize_rows(text_features)
    tags = Tags(labels, ids)
    loss = run.panels(
        sigmoid_rows,
        image_features,
        text_features,
        weight,
        scale=logit_scale,
        bias=logit_bias,
        tags=tags,
        key_tags=tags,
    )
    if not return_stats:
        return loss
    negatives = Mask(self_pair=False, label=None if labels is None else False, id=None if ids is None else False)
    terms = [Term(Reduce.SUM, Mask(self_pair=True)), *(Term(Reduce.MAX, negatives, axis) for axis in AXES)]
    with torch.no_grad():
        positive, *hardest = run.statistics(image_features, text_features, terms, logit_scale, tags=tags, key_tags=tags)
    return loss, summarize(run, positive, hardest, None, logit_scale)


def reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    labels: Tensor | None = None,
    ids: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each image, [B]."""
    if normalize:
        image_features, text_features = (F.normalize(x, dim=1) for x in (image_features, text_features))
    logits = logit_scale * image_features @ text_features.T + logit_bias
    positive = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    if labels is not None:
        positive |= labels[:, None] == labels
    losses = -F.logsigmoid(torch.where(positive, logits, -logits))
    if ids is not None:
        losses = losses.masked_fill((ids[:, None] == ids) & ~positive, 0.0)
    return losses.sum(dim=1)
