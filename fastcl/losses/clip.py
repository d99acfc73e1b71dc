"""The CLIP loss, both directions at once. May import the vocabulary and :mod:`fastcl.losses.common`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_choice, check_pair, check_scalar
from fastcl.losses.common import REDUCTIONS, LossStats, softmax_loss, summarize
from fastcl.terms import Axis, Mask, Reduce, Term

_NEGATIVES = Mask(self_pair=False)
_TERMS = (
    Term(Reduce.LSE, _NEGATIVES),
    Term(Reduce.LSE, _NEGATIVES, Axis.COLUMN),
    Term(Reduce.SUM, Mask(self_pair=True)),
)
_HARDEST = (Term(Reduce.MAX, _NEGATIVES), Term(Reduce.MAX, _NEGATIVES, Axis.COLUMN))


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
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
    check_choice("reduction", reduction, REDUCTIONS)
    check_pair(
        "image_features", image_features, "text_features", text_features, same_rows=True, may_be_empty=group is not None
    )
    bias = "a tensor" if isinstance(logit_bias, Tensor) else logit_bias
    loss, (_, _, positive, *hardest) = softmax_loss(
        image_features,
        text_features,
        _TERMS + _HARDEST if return_stats else _TERMS,
        logit_scale,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
        group=group,
        exchange=exchange,
        call=f"loss=clip_loss\nreturn_stats={return_stats}\nlogit_bias={bias}",
    )
    if logit_bias is not None:
        # A parameter that changes nothing has a gradient of zero, not none; a NaN in it still shows.
        loss = loss + 0.0 * logit_bias
    return (loss, summarize(positive, hardest, None, logit_scale, group)) if return_stats else loss


def reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
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
    target = torch.arange(len(logits), device=logits.device)
    by_row = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return 0.5 * (by_row + torch.nn.functional.cross_entropy(logits.T, target, reduction="none"))
