"""Alpha-CL: contrastive losses as an energy of distances under a pairwise importance that is held constant.

May import :mod:`fastcl.losses.common` and the panels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_between, check_choice, check_pair, check_row_vector, check_scalar
from fastcl.losses.common import (
    LossStats,
    Run,
    check_weight,
    inverse,
    normalize_rows,
    other_view,
    row_similarity,
    summarize,
)
from fastcl.panels import Outputs, Panel, Slopes, panel_function
from fastcl.panelwise import panel_rows
from fastcl.terms import Tags


def alpha_cl_loss(
    z1: Tensor,
    z2: Tensor,
    tau: float,
    *,
    importance: str = "softmax",
    power: float = 4.0,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The energy of pairs whose importance is computed from the batch and then held constant.

    With :math:`z = [z_1; z_2]` of 2B rows (of unit length where ``normalize``), :math:`p(i)` the row of the other view
    of the same example, and :math:`d_{ij}^2 = \tfrac12 |z_i - z_j|^2`,

    .. math:: \ell_i = \sum_{j \ne i, p(i)} \alpha_{ij} \bigl(d_{ip(i)}^2 - d_{ij}^2\bigr)

    where no gradient reaches the importance

    - "softmax": :math:`\alpha_{ij} = e^{-d_{ij}^2/\tau} \big/ \bigl(e^{-d_{ip(i)}^2/\tau} + \sum_k
      e^{-d_{ik}^2/\tau}\bigr)`, that of InfoNCE: the gradient is tau times that of :func:`fastcl.nt_xent`;
    - "uniform": :math:`\alpha_{ij} = 1 / (2B - 2)`, under which a linear encoder ends at the principal components;
    - "power": :math:`\alpha_{ij} = e^{-d_{ij}^p/\tau} \big/ \sum_k e^{-d_{ik}^p/\tau}` with p the ``power``, the direct
      choice of the paper (for p = 2 that of :func:`fastcl.dcl_loss`).

    Args:
        z1, z2: the views [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        tau: the temperature of the importance, a positive float; "uniform" has none.
        importance: "softmax", "uniform" or "power".
        power: the exponent of the distances for "power".
        ids: integers [B]: rows with an equal id are never negatives of each other.
        weight: [B], a constant factor of the losses of both views of an example. The mean still divides by 2B.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [2B]: the rows of ``z1``, then those of ``z2``.
        return_stats: also return a :class:`fastcl.LossStats`, from a sweep of its own. The similarity is
            :math:`1 - d_{ij}^2`, the cosine of rows of unit length.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty. The features of all ranks are gathered.

    Returns:
        The loss in float32 (float64 for float64 features), of either sign: what it says is its gradient. A row without
        negatives has loss 0 and gradient 0. With a ``group``, "mean" and "sum" are over the rows of all ranks.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 4 * (2B)^2 * D multiply-adds for value and gradient, 5 for "none" (by "tiled" 3, and 4), (2B)^2 * D more
    for ``return_stats``; O(B) memory beyond features and gradients.

    Source: Tian, Understanding Deep Contrastive Learning via Coordinate-wise Optimization, 2022 (arXiv:2201.12680).

    >>> import torch, fastcl
    >>> z = torch.eye(4, 8)
    >>> round(fastcl.alpha_cl_loss(z, z, 1.0, importance="uniform").item(), 4)  # negatives at squared distance 2
    -1.0
    >>> round(fastcl.alpha_cl_loss(z, z, 1.0).item(), 4)  # -6 / (6 + e)
    -0.6882
    """
    check_between("tau", tau, 0.0, float("inf"))
    check_scalar("tau", tau, positive=True)
    check_choice("importance", importance, tuple(RULES))
    check_scalar("power", power, positive=True)
    check_pair("z1", z1, "z2", z2, same_rows=True, may_be_empty=group is not None)
    check_weight(weight, z1)
    if ids is not None:
        check_row_vector("ids", ids, z1, integer=True)
    run = Run.checked(
        reduction, backend, group, "auto", loss="alpha_cl_loss", importance=importance, return_stats=return_stats
    )
    z = torch.cat((z1, z2))
    ids, weight = (None if x is None else torch.cat((x, x)) for x in (ids, weight))
    if normalize:
        z = normalize_rows(z)
    squares = row_similarity(z, z)
    other = other_view(len(z1), z.device)
    to_positive = 0.5 * (squares + squares[other]) - row_similarity(z, z[other])
    tags = Tags(_examples(run, z1).repeat(2), ids)
    operands = {
        "row_params": torch.stack((squares, to_positive)),
        "column_params": squares[None],
        "tags": tags,
        "numbers": (tau, power),
    }
    loss = run.panels(RULES[importance], z, None, weight, **operands)
    if not return_stats:
        return loss
    with torch.no_grad():
        positive, nearest = panel_rows(
            distances_of_rows, z, None, group=group, call=run.call, backend=backend, **operands
        )
    scale = inverse(tau, z)
    return loss, summarize(run, scale * (1 - positive), [scale * (1 - nearest)], None, scale)


def _examples(run: Run, z: Tensor) -> Tensor:
    """A number for each example of this rank that no example of another rank has."""
    own = torch.arange(len(z), device=z.device)
    if run.group is None:
        return own
    return own + run.gather(own.new_full((1,), len(z)))[: run.group.rank()].sum()


class _Distances:
    """The squared distances of a panel, halved: to all keys, to the positive, and which keys are negatives."""

    def __init__(self, panel: Panel) -> None:
        squares, self.to_positive = panel.row_params[0, :, None], panel.row_params[1, :, None]
        self.squared = (0.5 * (squares + panel.column_params[0]) - panel.s).clamp_min_(0.0)
        self.negative = ~panel.same_label
        if panel.tags.ids is not None:
            self.negative &= panel.tags.ids[:, None] != panel.key_tags.ids

    def energy(self, alpha: Tensor):
        """The outputs of a panel function, and its slopes, under an importance that is 0 but for negatives."""
        total = alpha.sum(dim=1)

        def pull_back(incoming: Outputs) -> Slopes:
            slope = alpha * incoming[0][:, None]
            of_row = slope.sum(dim=1)
            return Slopes(slope, torch.stack((-0.5 * of_row, of_row)), -0.5 * slope.sum(dim=0, keepdim=True))

        return (total * self.to_positive[:, 0] - (alpha * self.squared).sum(dim=1),), pull_back


@panel_function(outputs=1, kernel="energy_softmax")
def softmax_rows(panel: Panel):
    """The energy under InfoNCE's importance."""
    pairs, (tau, _) = _Distances(panel), panel.numbers
    logits = (-pairs.squared / tau).masked_fill_(~pairs.negative, -torch.inf)
    everything = torch.cat((logits, -pairs.to_positive / tau), dim=1).logsumexp(dim=1, keepdim=True)
    return pairs.energy((logits - everything).exp_())


@panel_function(outputs=1, kernel="energy_uniform")
def uniform_rows(panel: Panel):
    """The energy under an importance that is the same for all negatives."""
    pairs = _Distances(panel)
    alpha = pairs.negative.to(panel.s.dtype)
    return pairs.energy(alpha / alpha.sum(dim=1, keepdim=True).clamp_min(1))


@panel_function(outputs=1, kernel="energy_power")
def power_rows(panel: Panel):
    """The energy under an importance that falls with a power of the distance."""
    pairs, (tau, power) = _Distances(panel), panel.numbers
    logits = (-(pairs.squared ** (power / 2)) / tau).masked_fill_(~pairs.negative, -torch.inf)
    return pairs.energy(logits.softmax(dim=1).masked_fill_(~pairs.negative, 0.0))


@panel_function(outputs=2, kernel="nearest")
def distances_of_rows(panel: Panel):
    """The halved squared distances of the positive and of the nearest negative, infinite where there is none."""
    pairs = _Distances(panel)
    positive = (pairs.squared * (panel.same_label & ~panel.self_pair)).sum(dim=1)
    nearest = pairs.squared.masked_fill(~pairs.negative, torch.inf).amin(dim=1)
    return (positive, nearest), lambda incoming: Slopes(torch.zeros_like(panel.s))


RULES = {"softmax": softmax_rows, "uniform": uniform_rows, "power": power_rows}


def reference(
    z1: Tensor,
    z2: Tensor,
    tau: float,
    *,
    importance: str = "softmax",
    power: float = 4.0,
    ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole matrix of distances: the loss of each row, [2B]."""
    z = torch.cat((z1, z2))
    if normalize:
        z = torch.nn.functional.normalize(z, dim=1)
    squares = z.square().sum(dim=1)
    distances = (0.5 * (squares[:, None] + squares) - z @ z.T).clamp_min(0.0)
    example = torch.arange(len(z1), device=z.device).repeat(2)
    negative = example[:, None] != example
    if ids is not None:
        negative &= ids.repeat(2)[:, None] != ids.repeat(2)
    to_positive = distances.diagonal(len(z1)).repeat(2)[:, None]
    raised = distances.detach() ** (power / 2 if importance == "power" else 1.0)
    weights = negative * (torch.ones_like(raised) if importance == "uniform" else (-raised / tau).exp())
    total = weights.sum(dim=1, keepdim=True)
    if importance == "softmax":
        total = total + (-to_positive.detach() / tau).exp()
    alpha = weights / total.where(total > 0, 1.0)
    return (alpha * (to_positive - distances)).sum(dim=1)
