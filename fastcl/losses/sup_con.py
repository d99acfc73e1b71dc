"""SupCon: the softmax loss of rows with any number of positives, which is also what `labels=` of other losses means.

May import the vocabulary and :mod:`fastcl.losses.common`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.checks import check_choice, check_matrix, check_scalar
from fastcl.losses.common import (
    LossStats,
    Run,
    check_options,
    check_tags,
    check_weight,
    count_equal,
    count_keys,
    count_matches,
    inverse,
    normalize_rows,
    smoothing_share,
    summarize,
)
from fastcl.terms import AXES, NO_TAGS, Axis, Mask, Reduce, Tags, Term

FORMS = ("out", "in")


def sup_con_loss(
    z: Tensor,
    labels: Tensor | None,
    tau: float | Tensor,
    *,
    form: str = "out",
    ids: Tensor | None = None,
    label_width: int = 0,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The supervised contrastive loss: all rows of an equal label are positives of each other.

    With :math:`S_{ij} = \langle z_i, z_j\rangle / \tau` (rows of unit length where ``normalize``), the positives
    :math:`P(i)`, which are the other rows of i's label, and :math:`A(i)`, the positives and negatives of i,

    .. math::
        \ell^{\text{out}}_i = \frac{-1}{|P(i)|} \sum_{p \in P(i)} \log \frac{e^{S_{ip}}}{\sum_{a \in A(i)} e^{S_{ia}}}
        \qquad
        \ell^{\text{in}}_i = -\log \frac{1}{|P(i)|} \sum_{p \in P(i)} \frac{e^{S_{ip}}}{\sum_{a \in A(i)} e^{S_{ia}}}

    The mean over all rows of the "out" form equals SupContrast's ``SupConLoss`` with ``base_temperature=temperature``
    (another base temperature is a factor tau / base_temperature), and pytorch-metric-learning's where every row has a
    positive.

    Args:
        z: [N, D], or several views of each example [B, V, D], in float64, float32, bfloat16 or float16.
        labels: integers [N], or [B] for views; None makes each example a class of its own, so that its views are the
            positives (SimCLR for two of them).
        tau: the temperature, a positive float or a 0-d tensor, which may require grad.
        form: "out" or "in", where the mean over positives stands with respect to the logarithm.
        ids: as ``labels``: rows with an equal id are never negatives of each other; equal labels stay positives.
        label_width: labels that differ by no more count as equal. With the time of a frame as label, the positives are
            its neighbours in time; frames of another sequence need labels far away.
        weight: [N], or [B] for views, a constant factor of a row's loss. The mean still divides by the number of rows.
        label_smoothing: the share :math:`\varepsilon` of the target that is spread evenly over :math:`A(i)`; it adds
            :math:`\varepsilon\,(\bar S_{P(i)} - \bar S_{A(i)})` to a row's loss, the mean logits of the two. For the
            "out" form only, whose target is a distribution.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [N], or [B, V].
        return_stats: also return a :class:`fastcl.LossStats` from the same sweep.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty; labels and ids mean the same on all of them.
        exchange: how the ranks' features travel: "ring", "gather", or "auto" by their size (docs/many-ranks.md).

    Returns:
        The loss in float32 (float64 for float64 features). A row without a positive has loss 0 and gradient 0, and
        counts in the mean.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 2 * N^2 * D multiply-adds for value and gradient, O(N) memory beyond features and gradients.

    Source: Khosla et al., Supervised Contrastive Learning, 2020 (arXiv:2004.11362).

    >>> import torch, fastcl
    >>> z = torch.eye(2, 8).repeat(2, 1)  # two classes of two equal rows
    >>> round(fastcl.sup_con_loss(z, torch.tensor([0, 1, 0, 1]), 1.0).item(), 4)  # log(1 + 2 / e)
    0.5514
    """
    check_scalar("tau", tau, positive=True)
    check_choice("form", form, FORMS)
    check_options(labels, None, label_smoothing)
    if label_smoothing and form == "in":
        raise ValueError(
            f"label_smoothing must be 0 with form='in', whose target is no distribution; got {label_smoothing}"
        )
    views = z.shape[1] if isinstance(z, Tensor) and z.dim() == 3 else None
    examples = z if views is None else z[:, 0]
    check_matrix("z", examples, may_be_empty=group is not None)
    if labels is None:
        if views is None:
            raise ValueError("labels must be given unless z holds several views [B, V, D], got None")
        if group is not None:
            raise ValueError("labels must be given with a group, whose ranks' examples need different ones; got None")
        labels = torch.arange(len(examples), device=z.device)
    check_tags(examples, labels=labels, ids=ids)
    check_weight(weight, examples)
    run = Run.checked(
        reduction, backend, group, exchange, loss="sup_con_loss", normalize=normalize, form=form,
        return_stats=return_stats, ids=ids is not None, label_width=label_width, smoothing=label_smoothing > 0,
    )  # fmt: skip
    if views is not None:
        labels, ids, weight = (None if x is None else x.repeat_interleave(views) for x in (labels, ids, weight))
    rows = Labelled(z if views is None else z.flatten(0, 1), None, Tags(labels, ids), NO_TAGS, label_width)
    loss, stats = multi_positive_loss(
        run,
        rows,
        inverse(tau, z),
        inside=form == "in",
        normalize=normalize,
        weight=weight,
        label_smoothing=label_smoothing,
        return_stats=return_stats,
    )
    if reduction == "none" and views is not None:
        loss = loss.unflatten(0, (-1, views))
    return (loss, stats) if return_stats else loss


class Labelled(NamedTuple):
    """Rows of ``a`` against those of ``b``, or of ``a`` itself where b is None, with what is known of each."""

    a: Tensor
    b: Tensor | None
    tags: Tags
    key_tags: Tags
    label_width: int = 0

    def normalized(self) -> Labelled:
        return self._replace(a=normalize_rows(self.a), b=None if self.b is None else normalize_rows(self.b))

    def along(self, axis: Axis) -> tuple[Tags, Tags]:
        """The tags of the rows and of what they are compared with, or of the columns."""
        both = self.tags, self.tags if self.b is None else self.key_tags
        return both if axis is Axis.ROW else both[::-1]

    def masks(self) -> tuple[Mask, Mask]:
        """The positives: equal labels, but not the row itself. The negatives: other labels and, if given, other ids."""
        differs = None if self.tags.ids is None else False
        return Mask(label=True, self_pair=False if self.b is None else None), Mask(label=False, id=differs)


def multi_positive_loss(
    run: Run,
    pairs: Labelled,
    scale: float | Tensor,
    *,
    inside: bool = False,
    both_axes: bool = False,
    normalize: bool = True,
    norm_bound: float | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    return_stats: bool = False,
) -> tuple[Tensor, LossStats | None]:
    r"""The loss of Khosla et al., averaged over rows and columns where ``both_axes``.

    .. math:: \ell_i = \frac{-1}{|P(i)|} \sum_{p \in P(i)} \log \frac{e^{S_{ip}}}{\sum_a e^{S_{ia}}}
              \quad\text{or, inside,}\quad
              -\log \frac{1}{|P(i)|} \sum_{p \in P(i)} \frac{e^{S_{ip}}}{\sum_a e^{S_{ia}}}

    with a over positives and negatives. Both are softplus(L_neg - L_pos) and a rest that doesn't cancel with it: L_pos
    minus the mean over P(i), or log |P(i)|. A row without a positive has loss 0 and gradient 0. ``label_smoothing`` is
    the share of the target that is spread evenly over positives and negatives.
    """
    if normalize:
        pairs, norm_bound = pairs.normalized(), 1.0
    positives, negatives = pairs.masks()
    axes = AXES if both_axes else (Axis.ROW,)
    kinds = [(Reduce.LSE, negatives), (Reduce.LSE, positives), (Reduce.SUM, positives)]
    if label_smoothing:
        kinds.append((Reduce.SUM, negatives))
    if return_stats:
        kinds += [(Reduce.MAX, negatives), (Reduce.MAX, positives)]
    terms = [Term(reduce, mask, axis) for axis in axes for reduce, mask in kinds]
    values = run.statistics(
        pairs.a,
        pairs.b,
        terms,
        scale,
        tags=pairs.tags,
        key_tags=pairs.key_tags,
        label_width=pairs.label_width,
        norm_bound=norm_bound,
    )
    losses, means, hardest, best = [], [], [], []
    for k, axis in enumerate(axes):
        of_negatives, of_positives, total, *others = values[k * len(kinds) : (k + 1) * len(kinds)]
        count = _positives(run, pairs, axis)
        has_positive = count > 0
        # The places of rows without a positive are filled before anything is subtracted from -inf.
        of_positives = of_positives.masked_fill(~has_positive, 0.0)
        mean = total / count.clamp_min(1)
        rest = count.clamp_min(1).to(mean.dtype).log() if inside else of_positives - mean
        loss = F.softplus(of_negatives - of_positives, threshold=40.0) + rest
        if label_smoothing:
            of_all_negatives, *others = others
            loss = loss + smoothing_share(label_smoothing, mean, of_all_negatives, _negatives(run, pairs, axis), count)
        losses.append(loss.where(has_positive, loss.new_zeros(())))
        means.append(mean)
        hardest += others[:1]
        best += others[1:]
    loss = run.reduce(sum(losses) / len(losses), weight)
    if not return_stats:
        return loss, None
    return loss, summarize(run, sum(means) / len(means), hardest, has_positive, scale, best)


def _positives(run: Run, pairs: Labelled, axis: Axis) -> Tensor:
    """How many positives each row (or column) has among the keys (or rows) of all ranks."""
    own, others = pairs.along(axis)
    return count_equal(run, own.labels, others.labels, pairs.label_width) - int(pairs.b is None)


def _negatives(run: Run, pairs: Labelled, axis: Axis) -> Tensor:
    """How many negatives each row (or column) has among the keys (or rows) of all ranks."""
    keys = pairs.a if pairs.b is None or axis is Axis.COLUMN else pairs.b
    return count_keys(run, keys) - count_matches(run, *pairs.along(axis), pairs.label_width)


def reference(
    z: Tensor,
    labels: Tensor,
    tau: float | Tensor,
    *,
    form: str = "out",
    ids: Tensor | None = None,
    label_width: int = 0,
    label_smoothing: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each row, [N]."""
    if normalize:
        z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = ((labels[:, None] - labels).abs() <= label_width) & ~itself
    candidate = ~itself if ids is None else positive | ((ids[:, None] != ids) & ~itself)
    candidate |= ~candidate.any(dim=1, keepdim=True)
    logits = z @ z.T / tau
    log_p = logits - logits.masked_fill(~candidate, float("-inf")).logsumexp(dim=1, keepdim=True)
    count = positive.sum(dim=1)
    if form == "out":
        loss = -log_p.masked_fill(~positive, 0.0).sum(dim=1) / count.clamp_min(1)
        if label_smoothing:
            of_all = -log_p.masked_fill(~candidate, 0.0).sum(dim=1) / candidate.sum(dim=1)
            loss = (1 - label_smoothing) * loss + label_smoothing * of_all
    else:
        loss = count.clamp_min(1).to(log_p.dtype).log() - log_p.masked_fill(
            ~positive & (count > 0)[:, None], float("-inf")
        ).logsumexp(dim=1)
    return loss.where(count > 0, 0.0)
