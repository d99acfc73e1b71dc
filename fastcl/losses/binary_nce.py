"""Noise-contrastive estimation in its binary form: is a key the query's own, or was it drawn from the noise?

May import :mod:`fastcl.losses.common` and :mod:`fastcl.losses.sigmoid`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.checks import check_pair, check_row_vector, check_scalar
from fastcl.losses.common import LossStats, Run, check_weight, inverse, normalize_rows, stats_of_pairs
from fastcl.losses.sigmoid import sigmoid_rows
from fastcl.terms import Tags, accumulation_dtype


def binary_nce_loss(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    *,
    noise_ratio: float | None = None,
    log_noise: float | Tensor = 0.0,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Binary noise-contrastive estimation: each pair is a logistic question, "data or noise?".

    A key j comes either from the data, with the unnormalised log-density :math:`\langle z^1_i, z^2_j\rangle / \tau`
    given the query i, or from the noise, with the density :math:`q_j`; there is :math:`\nu` times as much noise as
    data. The posterior of "data" is a sigmoid, and the other keys of the batch are the noise:

    .. math::
        h_{ij} = \sigma\Bigl(\frac{\langle z^1_i, z^2_j\rangle}{\tau} - \log(\nu\, q_j)\Bigr), \qquad
        \ell_i = -\log h_{ii} - \frac{\nu}{B - 1} \sum_{j \ne i} \log(1 - h_{ij})

    With ``noise_ratio=None`` :math:`\nu = B - 1`, the number of other keys, and the sum has no factor. Then the
    optimal similarity is the logarithm of how much likelier the key is under the data than under the noise: pointwise
    mutual information, where the noise is the keys' marginal and ``log_noise`` is 0.

    Args:
        z1, z2: queries and their keys [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        tau: the temperature, a positive float or a 0-d tensor, which may require grad.
        noise_ratio: :math:`\nu`, how many times as much noise as data the model is told to expect; None for B - 1.
        log_noise: :math:`\log q_j`, and the model's log-normaliser if it has one: a float, a 0-d tensor, or [B], one
            for each key; a tensor may require grad (a normaliser that is learned).
        ids: integers [B]: keys of an equal id are left out of a query's noise (duplicates), unless it is its own key.
        weight: [B], a constant factor of a query's loss. The mean still divides by B.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [B].
        return_stats: also return a :class:`fastcl.LossStats`, from one more pass.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty.

    Returns:
        The loss in float32 (float64 for float64 features). A single pair has no noise: its loss is 0, and so is its
        gradient, unless ``noise_ratio`` is given.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 3 * B^2 * D multiply-adds for value and gradients (4 for "none"), O(B) memory beyond features and
    gradients.

    Source: Gutmann and Hyvarinen, Noise-contrastive estimation, AISTATS 2010. With labels, a scale and a bias in place
    of the noise it is :func:`fastcl.siglip_loss`.

    >>> import torch, fastcl
    >>> z = torch.eye(2, 8)
    >>> round(fastcl.binary_nce_loss(z, z, 1.0).item(), 4)  # log(1 + 1 / e) + log 2
    1.0064
    """
    check_scalar("tau", tau, positive=True)
    check_pair("z1", z1, "z2", z2, same_rows=True, may_be_empty=group is not None)
    if noise_ratio is not None:
        check_scalar("noise_ratio", noise_ratio, positive=True)
    if isinstance(log_noise, Tensor) and log_noise.dim() > 0:
        check_row_vector("log_noise", log_noise, z2, integer=False)
    else:
        check_scalar("log_noise", log_noise, positive=False)
    if ids is not None:
        check_row_vector("ids", ids, z1, integer=True)
    check_weight(weight, z1)
    run = Run.checked(
        reduction, backend, group, "auto", loss="binary_nce_loss", normalize=normalize, return_stats=return_stats
    )
    if normalize:
        z1, z2 = normalize_rows(z1), normalize_rows(z2)
    rows = z1.new_ones(len(z1), dtype=accumulation_dtype(z1.dtype))
    others = run.over_ranks(rows.sum(), "sum") - 1
    ratio = others if noise_ratio is None else torch.full_like(others, noise_ratio)
    tags, scale = Tags(ids=ids), inverse(tau, z1)
    loss = run.panels(
        sigmoid_rows,
        z1,
        z2,
        weight,
        scale=scale,
        row_params=(rows * (ratio / others.clamp_min(1)))[None],
        column_params=(rows * ratio.log() + log_noise)[None].to(rows.dtype),
        tags=tags,
        key_tags=tags,
    )
    return (loss, stats_of_pairs(run, z1, z2, scale, ids=ids)) if return_stats else loss


def reference(
    z1: Tensor,
    z2: Tensor,
    tau: float | Tensor,
    *,
    noise_ratio: float | None = None,
    log_noise: float | Tensor = 0.0,
    ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each query, [B]."""
    if normalize:
        z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    others = len(z1) - 1
    ratio = torch.full_like(z1[0, 0], others if noise_ratio is None else noise_ratio)
    logits = z1 @ z2.T / tau - log_noise - ratio.log()
    noise = ~torch.eye(len(z1), dtype=torch.bool, device=z1.device)
    if ids is not None:
        noise &= ids[:, None] != ids
    of_noise = -F.logsigmoid(-logits).masked_fill(~noise, 0.0).sum(dim=1)
    return -F.logsigmoid(logits.diagonal()) + ratio / max(others, 1) * of_noise
