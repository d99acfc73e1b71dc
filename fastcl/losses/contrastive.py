"""The contrastive loss of pairs: equal labels are pulled together, different ones pushed apart up to a margin.

May import :mod:`fastcl.losses.common`, :mod:`fastcl.losses.distances` and the panels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.losses.common import LossStats, Run
from fastcl.losses.distances import (
    LabelledRows,
    average,
    check_margin,
    distances,
    positives_and_negatives,
    stats_of_rows,
)
from fastcl.panels import Outputs, Panel, Slopes, panel_function


@panel_function(outputs=4, kernel="contrastive")
def contrastive_rows(panel: Panel):
    """Of each row, the hinges of its positives, how many are active, and the same of its negatives."""
    pos_margin, neg_margin = panel.numbers
    distance, slopes = distances(panel)
    positive, negative = positives_and_negatives(panel)
    too_far, too_close = positive & (distance > pos_margin), negative & (distance < neg_margin)
    outputs = (
        (distance - pos_margin).mul_(too_far).sum(dim=1),
        too_far.sum(dim=1).to(distance.dtype),
        (neg_margin - distance).mul_(too_close).sum(dim=1),
        too_close.sum(dim=1).to(distance.dtype),
    )

    def pull_back(incoming: Outputs) -> Slopes:
        pulled, _, pushed, _ = incoming
        return slopes((pulled[:, None] * too_far).sub_(pushed[:, None] * too_close))

    return outputs, pull_back


def contrastive_loss(
    z: Tensor,
    labels: Tensor,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    *,
    distance: str = "euclidean",
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The contrastive loss of all pairs of a labelled batch, averaged over the pairs that are active.

    With the distances :math:`d_{ij}`, the pairs of equal labels :math:`\mathcal{P}` and those of different labels
    :math:`\mathcal{N}` (ordered, without self-pairs),

    .. math::
        \frac{1}{\lvert\mathcal{P}^+\rvert} \sum_{(i,j) \in \mathcal{P}} [d_{ij} - m_\text{pos}]_+
        + \frac{1}{\lvert\mathcal{N}^+\rvert} \sum_{(i,j) \in \mathcal{N}} [m_\text{neg} - d_{ij}]_+

    where + marks the pairs whose hinge isn't 0. An average without such pairs is 0. The loss of a row is its share of
    both averages, times the number of rows.

    Args:
        z: features [N, D] in float64, float32, bfloat16 or float16.
        labels: integers [N].
        pos_margin: a distance up to which positives are close enough.
        neg_margin: a distance from which on negatives are far enough.
        distance: "euclidean", or "cosine" for 1 minus the similarity.
        ids: integers [N]: rows with an equal id are never negatives of each other; equal labels stay positives.
        weight: [N], a constant factor of a row's loss; the counts are those without weights.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum" (N times the mean), or "none" for [N].
        return_stats: also return a :class:`fastcl.LossStats` from a sweep of its own: how often an anchor's nearest row
            has its label, the mean similarity of positive pairs, and the hardest negative's. It is the cosine of unit
            rows; of others :math:`1 - |x - y|^2 / 2`, or 1 minus the distance where that is "cosine".
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty; labels and ids mean the same on all of them.

    Returns:
        The loss in float32 (float64 for float64 features). Pairs at distance 0 have gradient 0.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 4 * N^2 * D multiply-adds for value and gradient, N^2 * D more for ``return_stats``; O(N) memory beyond
    features and gradients.

    Source: Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR 2006. Equals
    pytorch-metric-learning's ``ContrastiveLoss``; its margins under ``CosineSimilarity`` are 1 minus these.

    >>> import torch, fastcl
    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> round(fastcl.contrastive_loss(z, torch.tensor([0, 0, 1])).item(), 4)  # sqrt(2), and 1 for the equal rows
    2.4142
    """
    numbers = check_margin("pos_margin", pos_margin), check_margin("neg_margin", neg_margin)
    rows = LabelledRows.checked(z, labels, ids, weight, distance=distance, normalize=normalize, group=group)
    run = Run.checked(reduction, backend, group, "auto", loss="contrastive_loss", return_stats=return_stats)
    loss = average(run, contrastive_rows, rows, numbers)
    return (loss, stats_of_rows(run, rows)) if return_stats else loss


def reference(
    z: Tensor,
    labels: Tensor,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    *,
    distance: str = "euclidean",
    ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole matrix of distances: the loss of each row, [N]."""
    if normalize:
        z = F.normalize(z, dim=1)
    similarity = z @ z.T
    d = 1 - similarity
    if distance == "euclidean":
        norms = similarity.diagonal()
        squared = norms[:, None] + norms - 2 * similarity
        nothing = squared <= 0
        d = squared.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)
    same = labels[:, None] == labels
    negative = ~same if ids is None else ~same & (ids[:, None] != ids)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    pulled = (d - pos_margin).relu().masked_fill(~same | itself, 0.0)
    pushed = (neg_margin - d).relu().masked_fill(~negative, 0.0)
    return sum(len(z) * x.sum(dim=1) / (x > 0).sum().clamp_min(1) for x in (pulled, pushed))
