"""The spectral contrastive loss: quadratic, so that a D x D matrix says all of what B x B similarities would.

May import :mod:`fastcl.losses.common`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_pair, check_scalar
from fastcl.losses.common import (
    LossStats,
    Run,
    check_tags,
    check_weight,
    count_equal,
    normalize_rows,
    row_similarity,
    stats_of_pairs,
)
from fastcl.panels import Outputs, Panel, Slopes, panel_function
from fastcl.terms import Axis, Tags, accumulation_dtype


def spectral_contrastive_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    mu: float | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The loss whose minimisers span the leading eigenvectors of the augmentation graph's adjacency matrix.

    The population loss :math:`-2\,\mathbb{E}\langle f(x), f(x^+)\rangle + \mathbb{E}\langle f(x), f(x^-)\rangle^2`,
    its second expectation taken over the pairs of different examples:

    .. math:: \ell_i = -2 \langle z^1_i, z^2_i\rangle + \frac{1}{B - 1} \sum_{j \ne i} \langle z^1_i, z^2_j\rangle^2

    The norm of the features matters to it: the official code bounds them rather than normalising them, which is ``mu``.

    Args:
        z1, z2: the views' features [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        mu: rows longer than sqrt(mu) are scaled to that length, and the loss is divided by mu, as in the official code.
        ids: integers [B]: pairs of an equal id are left out of the second term (duplicates). They cost the sweep over S
            that the loss does without otherwise.
        weight: [B], a constant factor of a row's loss. The mean still divides by B.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [B].
        return_stats: also return a :class:`fastcl.LossStats` of the features that the loss sees, with a scale of 1;
            they cost a sweep over S that the loss itself does without.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty.

    Returns:
        The loss in float32 (float64 for float64 features). A single pair has no negative: the second term is 0.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: no sweep over S without ``ids``: the squares of row i sum to
    :math:`z^{1\top}_i (Z_2^\top Z_2)\, z^1_i`, so that value and gradients take O(B * D^2) multiply-adds and
    O(B * D + D^2) memory, whatever the number of pairs; ranks add up their D x D matrices and exchange nothing else.
    With ``ids`` 3 * B^2 * D multiply-adds (4 for "none"), O(B) memory beyond features and gradients, and ranks gather
    their features. ``return_stats`` takes B^2 * D more.

    Source: HaoChen et al., Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss, 2021
    (arXiv:2106.04156).

    >>> import torch, fastcl
    >>> z = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    >>> fastcl.spectral_contrastive_loss(z, z, reduction="none").tolist()  # -2 + 1 / 4 and -1 + 1 / 4
    [-1.75, -0.75]
    """
    check_pair("z1", z1, "z2", z2, same_rows=True, may_be_empty=group is not None)
    if mu is not None:
        check_scalar("mu", mu, positive=True)
    check_tags(z1, ids=ids)
    check_weight(weight, z1)
    run = Run.checked(
        reduction, None, group, "auto", loss="spectral_contrastive_loss", ids=ids is not None, return_stats=return_stats
    )
    if normalize:
        z1, z2 = normalize_rows(z1), normalize_rows(z2)
    dtype = accumulation_dtype(z1.dtype)
    with torch.autocast(z1.device.type, enabled=False):
        a, b = (x.to(dtype) if mu is None else _bounded(x.to(dtype), mu) for x in (z1, z2))
        positive, factor = row_similarity(a, b), 1.0 if mu is None else 1.0 / mu
        if ids is not None:
            tags, weights = Tags(ids=ids), factor / _others(run, positive, ids)
            weights = weights if weight is None else weights * weight
            squares = run.panels(squares_of_others, a, b, weights, tags=tags, key_tags=tags)
            loss = squares - run.reduce(2 * factor * positive, weight)
        else:
            gram = b.mT @ b
            if group is not None:
                gram = torch.ops.fastcl.add_over_ranks(gram, group.group_name)
            squares = row_similarity(a @ gram, a) - positive.square()
            loss = run.reduce((squares / _others(run, positive, None) - 2 * positive) * factor, weight)
        return (loss, stats_of_pairs(run, a, b, 1.0, ids=ids, axes=(Axis.ROW,))) if return_stats else loss


@panel_function(outputs=1, kernel="squares")
def squares_of_others(panel: Panel):
    """The sum of S squared over the keys of other ids."""
    kept = panel.s.masked_fill(panel.tags.ids[:, None] == panel.key_tags.ids, 0.0)

    def pull_back(incoming: Outputs) -> Slopes:
        return Slopes(2 * kept * incoming[0][:, None])

    return (kept.square().sum(dim=1),), pull_back


def _others(run: Run, like: Tensor, ids: Tensor | None) -> Tensor:
    """How many negatives each row has among those of all ranks, at least 1."""
    rows = run.over_ranks(like.new_full((), like.shape[0]), "sum")
    return (rows - (1 if ids is None else count_equal(run, ids, ids))).clamp_min(1)


def _bounded(x: Tensor, mu: float) -> Tensor:
    """The rows, those longer than sqrt(mu) scaled to that length."""
    return x * (mu / x.square().sum(dim=1, keepdim=True).clamp_min(mu)).sqrt()


def reference(
    z1: Tensor, z2: Tensor, *, mu: float | None = None, ids: Tensor | None = None, normalize: bool = False
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each row, [B]."""
    if normalize:
        z1, z2 = (x / x.norm(dim=1, keepdim=True) for x in (z1, z2))
    if mu is not None:
        z1, z2 = (x * (mu**0.5 / x.norm(dim=1, keepdim=True)).clamp(max=1) for x in (z1, z2))
    similarity = z1 @ z2.T
    same = torch.eye(len(z1), dtype=torch.bool, device=z1.device) if ids is None else ids[:, None] == ids
    squares = similarity.square().masked_fill(same, 0.0).sum(dim=1) / (~same).sum(dim=1).clamp_min(1)
    return (squares - 2 * similarity.diagonal()) / (mu or 1.0)
