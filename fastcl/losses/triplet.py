"""The triplet loss: a positive should be closer than a negative, by a margin; over all triplets, or those mined.

May import :mod:`fastcl.losses.common`, :mod:`fastcl.losses.distances` and the panels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.checks import check_choice
from fastcl.losses.common import LossStats, Run
from fastcl.losses.distances import (
    LabelledRows,
    average,
    average_of_rows,
    check_margin,
    distance_of_rows,
    distances,
    positives_and_negatives,
    stats_of_rows,
)
from fastcl.panels import Outputs, Panel, Slopes, panel_function
from fastcl.panelwise import panel_rows

MINING = ("all", "semihard", "hard")


@panel_function(outputs=2, kernel="triplets")
def all_triplets(panel: Panel):
    """Of each row as the anchor, the hinges of all its triplets, and how many are active.

    A positive's active negatives are the nearest ones, so that a row is sorted once and prefix sums give their hinges.
    A second number that isn't 0 leaves out the negatives that are no farther than the positive.
    """
    margin, semihard = panel.numbers
    distance, slopes = distances(panel)
    positive, negative = positives_and_negatives(panel)
    reach = (distance + margin).masked_fill_(~positive, -torch.inf)
    nearest = distance.masked_fill(~negative, torch.inf).sort(dim=1).values
    active = torch.searchsorted(nearest, reach, out_int32=True)
    # Where the slope looks from a negative: the positives that reach beyond it.
    own = distance.masked_fill(~positive, torch.inf) if semihard else None
    closer = None if own is None else torch.searchsorted(nearest, own, right=True, out_int32=True)
    if closer is not None:
        closer.masked_fill_(~positive, 0)
    # A hinge is small beside the sums that it is a difference of.
    wide = distance.dtype if distance.device.type == "mps" else torch.float64
    prefix = F.pad(nearest.masked_fill_(nearest == torch.inf, 0.0).cumsum(dim=1, dtype=wide), (1, 0))
    count = active if closer is None else active - closer
    total = (count * reach.masked_fill(~positive, 0.0)).sum(dim=1, dtype=wide)
    total -= prefix.gather(1, active.long()).sum(dim=1)
    if closer is not None:
        total += prefix.gather(1, closer.long()).sum(dim=1)

    def pull_back(incoming: Outputs) -> Slopes:
        width = distance.shape[1]
        reached = width - torch.searchsorted(reach.sort(dim=1).values, distance, right=True, out_int32=True)
        if own is not None:
            reached -= width - torch.searchsorted(own.sort(dim=1).values, distance, out_int32=True)
            # Positives that are no closer than the negative, without those places that hold no positive.
            reached += (~positive).sum(dim=1, dtype=torch.int32)[:, None]
        return slopes((count - reached * negative) * incoming[0][:, None])

    return (total.to(distance.dtype), count.sum(dim=1).to(distance.dtype)), pull_back


@panel_function(outputs=2, kernel="hardest")
def hardest_rows(panel: Panel):
    """Of each row the columns of its farthest positive and nearest negative, -1 for both where one is missing.

    As numbers of the accumulation dtype, in which those of 2^24 rows are exact.
    """
    distance, _ = distances(panel)
    positive, negative = positives_and_negatives(panel)
    farthest = distance.masked_fill(~positive, -torch.inf).max(dim=1)
    nearest = distance.masked_fill(~negative, torch.inf).min(dim=1)
    complete = (farthest.values > -torch.inf) & (nearest.values < torch.inf)
    columns = (x.indices.where(complete, -1).to(distance.dtype) for x in (farthest, nearest))
    return tuple(columns), lambda incoming: Slopes(torch.zeros_like(panel.s))


def triplet_loss(
    z: Tensor,
    labels: Tensor,
    margin: float = 0.05,
    mining: str = "all",
    *,
    swap: bool = False,
    smooth_loss: bool = False,
    distance: str = "euclidean",
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The triplet loss of a labelled batch, averaged over the triplets that are active.

    A triplet is an anchor a, another row p of its label and a row n of a different one; with the distances d,

    .. math:: \frac{1}{\lvert\mathcal{T}^+\rvert} \sum_{(a, p, n) \in \mathcal{T}} [d_{ap} - d_{an} + m]_+

    where + marks the triplets whose hinge isn't 0; without any the loss is 0. ``mining`` chooses the triplets:

    - "all" of them (batch-all);
    - "semihard", those with :math:`d_{ap} < d_{an} < d_{ap} + m`;
    - "hard", for each anchor its farthest positive and its nearest negative (batch-hard).

    With ``swap`` the distance of a mined negative is :math:`\min(d_{an}, d_{pn})`, that to the nearer end of the pair.
    The loss of a row is the sum of its triplets as the anchor, over the average number of active ones.

    Args:
        z: features [N, D] in float64, float32, bfloat16 or float16.
        labels: integers [N].
        margin: by how much a negative should be farther than a positive; at least 0.
        mining: "all", "semihard" or "hard".
        swap: take the negative's distance from the positive where that is smaller (anchor swap), for "hard" mining
            only: over all triplets it takes time cubic in N.
        smooth_loss: softplus in place of the hinge, for "hard" mining only: the sum over all triplets takes time
            cubic in N without a hinge.
        distance: "euclidean", or "cosine" for 1 minus the similarity.
        ids: integers [N]: rows with an equal id are never negatives of each other; equal labels stay positives.
        weight: [N], a constant factor of an anchor's loss; the count is that without weights.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum" (N times the mean), or "none" for [N].
        return_stats: also return a :class:`fastcl.LossStats` from a sweep of its own: how often an anchor's nearest row
            has its label, the mean similarity of positive pairs, and the hardest negative's. It is the cosine of unit
            rows; of others :math:`1 - |x - y|^2 / 2`, or 1 minus the distance where that is "cosine".
        backend: insist on one of :func:`fastcl.list_backends`; "all" and "semihard" sort rows, which "tiled" and
            "dense" alone do.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty; labels and ids mean the same on all of them.

    Returns:
        The loss in float32 (float64 for float64 features). An anchor without a positive or a negative has loss 0 and
        no gradient; pairs at distance 0 have gradient 0.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: for "hard" N^2 * D multiply-adds to mine, and O(N * D) time and memory for the triplets that were mined;
    else 3 * N^2 * D multiply-adds for value and gradient (4 for "none"), O(N^2 log N) to sort each row once, whatever
    the number of triplets, and O(N) memory beyond features and gradients. N^2 * D more for ``return_stats``.

    Source: Schroff, Kalenichenko and Philbin, FaceNet, 2015 (arXiv:1503.03832); Hermans, Beyer and Leibe, In Defense of
    the Triplet Loss, 2017 (arXiv:1703.07737); anchor swap: Balntas et al., Learning local feature descriptors with
    triplets and shallow convolutional neural networks, BMVC 2016. Equals pytorch-metric-learning's
    ``TripletMarginLoss``, by itself, with ``TripletMarginMiner(margin, "semihard")``, and with ``BatchHardMiner``.

    >>> import torch, fastcl
    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> round(fastcl.triplet_loss(z, torch.tensor([0, 0, 1]), 0.1).item(), 4)  # 0.1, and sqrt(2) + 0.1
    0.8071
    """
    check_choice("mining", mining, MINING)
    if smooth_loss and mining != "hard":
        raise ValueError(
            f"smooth_loss must be False with mining={mining!r}: without a hinge every triplet counts, and the sum over "
            f"all of them takes time cubic in the batch; mining='hard' has it"
        )
    if swap and mining != "hard":
        raise ValueError(
            f"swap must be False with mining={mining!r}: which of two distances is smaller is a question to each "
            f"triplet, and to ask all of them takes time cubic in the batch; mining='hard' has it"
        )
    margin = check_margin("margin", margin)
    if margin < 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    rows = LabelledRows.checked(z, labels, ids, weight, distance=distance, normalize=normalize, group=group)
    run = Run.checked(
        reduction, backend, group, "auto", loss="triplet_loss", mining=mining, swap=swap, return_stats=return_stats
    )
    if mining == "hard":
        loss = _hardest(run, rows, margin, swap, smooth_loss)
    else:
        loss = average(run, all_triplets, rows, (margin, float(mining == "semihard")))
    return (loss, stats_of_rows(run, rows)) if return_stats else loss


def _hardest(run: Run, rows: LabelledRows, margin: float, swap: bool, smooth_loss: bool) -> Tensor:
    """The loss of the hardest triplets, of which only their columns come from a sweep."""
    with torch.no_grad():
        operands = rows.operands(()) | {"group": run.group, "call": run.call, "backend": run.backend}
        found = panel_rows(hardest_rows, rows.z, None, **operands)
    complete = found[0] >= 0
    everything = run.gather(rows.z)
    positive, negative = (everything[column.clamp_min(0).long()] for column in found)
    to = functools.partial(distance_of_rows, euclidean=rows.squares is not None)
    to_negative = to(rows.z, negative)
    if swap:
        to_negative = torch.minimum(to_negative, to(positive, negative))
    violation = to(rows.z, positive) - to_negative + margin
    loss = F.softplus(violation, threshold=40.0) if smooth_loss else violation.relu()
    loss = loss.where(complete, 0.0)
    return average_of_rows(run, rows, [loss], [(loss > 0).to(loss.dtype)])


def reference(
    z: Tensor,
    labels: Tensor,
    margin: float = 0.05,
    mining: str = "all",
    *,
    swap: bool = False,
    smooth_loss: bool = False,
    distance: str = "euclidean",
    ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with every triplet, as [pairs of anchor and positive, negatives]: the loss of each row."""
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
    if mining == "hard":
        complete = positive.any(dim=1) & negative.any(dim=1)
        farthest = d.masked_fill(~positive, -1e4).max(dim=1)
        nearest = d.masked_fill(~negative, 1e4).min(dim=1)
        to_negative = nearest.values
        if swap:
            to_negative = torch.minimum(to_negative, d[farthest.indices, nearest.indices])
        violation = farthest.values - to_negative + margin
        loss = (F.softplus(violation) if smooth_loss else violation.relu()).masked_fill(~complete, 0.0)
        return len(z) * loss / (loss > 0).sum().clamp_min(1)
    anchor, other = positive.nonzero(as_tuple=True)
    to_positive, to_negative = d[anchor, other][:, None], d[anchor]
    chosen = negative[anchor]
    if mining == "semihard":
        chosen &= to_negative > to_positive
    hinges = (to_positive - to_negative + margin).relu().masked_fill(~chosen, 0.0)
    rows = hinges.new_zeros(len(z)).index_add(0, anchor, hinges.sum(dim=1))
    return len(z) * rows / (hinges > 0).sum().clamp_min(1)
