"""The lifted structure loss: each positive pair against all negatives of both of its rows.

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
from fastcl.panelwise import panel_rows


@panel_function(outputs=1, kernel="negatives")
def lse_of_negatives(panel: Panel):
    """Of each row, the log-sum-exp of a margin minus its negatives' distances; -inf without negatives."""
    (neg_margin,) = panel.numbers
    distance, slopes = distances(panel)
    _, negative = positives_and_negatives(panel)
    closeness = (neg_margin - distance).masked_fill_(~negative, -torch.inf)
    lse = closeness.logsumexp(dim=1)

    def pull_back(incoming: Outputs) -> Slopes:
        shift = lse.masked_fill(lse == -torch.inf, 0.0)
        return slopes((closeness - shift[:, None]).exp_().mul_(-incoming[0][:, None]))

    return (lse,), pull_back


@panel_function(outputs=2, kernel="lifted")
def positive_pairs(panel: Panel):
    """Of each row, half the squared hinges of its positive pairs, and how many pairs there are.

    The first parameter of rows and columns is what :func:`lse_of_negatives` makes of them.
    """
    (pos_margin,) = panel.numbers
    distance, slopes = distances(panel, first=1)
    positive, _ = positives_and_negatives(panel)
    own, others = panel.row_params[0][:, None], panel.column_params[0]
    both = torch.logaddexp(own, others)
    hinge = (both + (distance - pos_margin)).relu_().masked_fill_(~positive, 0.0)

    def pull_back(incoming: Outputs) -> Slopes:
        gradient = hinge * incoming[0][:, None]
        of_own, of_others = ((x - both).exp_().masked_fill_(gradient == 0, 0.0) for x in (own, others))
        rows, columns = (of_own * gradient).sum(dim=1), (of_others * gradient).sum(dim=0)
        return slopes(gradient, rows[None], columns[None])

    return (hinge.square().sum(dim=1).mul_(0.5), positive.sum(dim=1).to(hinge.dtype)), pull_back


def lifted_structure_loss(
    z: Tensor,
    labels: Tensor,
    neg_margin: float = 1.0,
    pos_margin: float = 0.0,
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
    r"""The lifted structure loss of a labelled batch, averaged over the positive pairs.

    With the distances :math:`d_{ij}`, the ordered pairs of equal labels :math:`\mathcal{P}` (without self-pairs) and
    the rows of other labels :math:`N(i)`,

    .. math::
        \frac{1}{2 \lvert\mathcal{P}\rvert} \sum_{(i,j) \in \mathcal{P}} \Bigl[\,\log\Bigl(
        \sum_{n \in N(i)} e^{m_\text{neg} - d_{in}} + \sum_{n \in N(j)} e^{m_\text{neg} - d_{jn}}\Bigr)
        + d_{ij} - m_\text{pos}\Bigr]_+^2

    The loss of a row is the sum of its own pairs, over the average number of them.

    Args:
        z: features [N, D] in float64, float32, bfloat16 or float16.
        labels: integers [N].
        neg_margin, pos_margin: the margins of negatives and positives.
        distance: "euclidean", or "cosine" for 1 minus the similarity.
        ids: integers [N]: rows with an equal id are never negatives of each other; equal labels stay positives.
        weight: [N], a constant factor of a row's loss; the number of pairs is that without weights.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum" (N times the mean), or "none" for [N].
        return_stats: also return a :class:`fastcl.LossStats` from a sweep of its own: how often an anchor's nearest row
            has its label, the mean similarity of positive pairs, and the hardest negative's. It is the cosine of unit
            rows; of others :math:`1 - |x - y|^2 / 2`, or 1 minus the distance where that is "cosine".
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty; labels and ids mean the same on all of them.

    Returns:
        The loss in float32 (float64 for float64 features). A pair without negatives has loss 0 and gradient 0, and
        counts; without positive pairs the loss is 0. Pairs at distance 0 have gradient 0.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: two sweeps over S, for the rows' negatives and for the pairs, and their gradients: 7 * N^2 * D
    multiply-adds (8 for "none"), N^2 * D more for ``return_stats``; O(N) memory beyond features and gradients.

    Source: Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, 2016 (arXiv:1511.06452). Equals
    pytorch-metric-learning's ``LiftedStructureLoss``; its margins under ``CosineSimilarity`` are 1 minus these.

    >>> import torch, fastcl
    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(fastcl.lifted_structure_loss(z, torch.tensor([0, 0, 1])).item(), 4)  # (log 2 + 1 - sqrt(2))^2 / 2
    0.0389
    """
    neg_margin, pos_margin = check_margin("neg_margin", neg_margin), check_margin("pos_margin", pos_margin)
    rows = LabelledRows.checked(z, labels, ids, weight, distance=distance, normalize=normalize, group=group)
    run = Run.checked(reduction, backend, group, "auto", loss="lifted_structure_loss", return_stats=return_stats)
    operands = rows.operands((neg_margin,)) | {"group": group, "call": run.call, "backend": backend}
    (negatives,) = panel_rows(lse_of_negatives, rows.z, None, **operands)
    loss = average(run, positive_pairs, rows, (pos_margin,), negatives[None])
    return (loss, stats_of_rows(run, rows)) if return_stats else loss


def reference(
    z: Tensor,
    labels: Tensor,
    neg_margin: float = 1.0,
    pos_margin: float = 0.0,
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
    positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    closeness = (neg_margin - d).exp().masked_fill(~negative, 0.0).sum(dim=1)
    sums = closeness[:, None] + closeness
    nothing = ~positive | (sums == 0)
    hinge = (sums.masked_fill(nothing, 1.0).log() + d - pos_margin).masked_fill(nothing, 0.0).relu()
    return len(z) * (hinge.square() / 2).sum(dim=1) / positive.sum().clamp_min(1)
