"""What the losses of distances between labelled rows share: the distance itself, and the average over active pairs.

May import :mod:`fastcl.losses.common` and the panels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_choice, check_matrix, check_row_vector, check_scalar
from fastcl.losses.common import LossStats, Run, check_weight, normalize_rows, row_similarity, summarize
from fastcl.panels import Panel, PanelFunction, Slopes, panel_function
from fastcl.panelwise import panel_rows, panel_sum
from fastcl.terms import Tags, accumulation_dtype

DISTANCES = ("euclidean", "cosine")


class LabelledRows(NamedTuple):
    """The rows of a batch, what is known of each, and how the loss of each is weighted."""

    z: Tensor
    tags: Tags
    squares: Tensor | None
    """[1, N], squared norms; None where the distance is 1 - S"""
    weight: Tensor | None

    @classmethod
    def checked(
        cls,
        z: Tensor,
        labels: Tensor,
        ids: Tensor | None,
        weight: Tensor | None,
        *,
        distance: str,
        normalize: bool,
        group: ProcessGroup | None,
    ) -> LabelledRows:
        """The same, once it is certain that the arguments fit."""
        check_choice("distance", distance, DISTANCES)
        check_matrix("z", z, may_be_empty=group is not None)
        check_row_vector("labels", labels, z, integer=True)
        if ids is not None:
            check_row_vector("ids", ids, z, integer=True)
        check_weight(weight, z)
        if normalize:
            # Not rounded again: the smallest difference may decide which pair is the hardest.
            z = normalize_rows(z.to(accumulation_dtype(z.dtype)))
        squares = None
        if distance == "euclidean":
            squares = row_similarity(z, z)[None]
            squares = squares.detach() if normalize else squares
        return cls(z, Tags(labels, ids), squares, weight)

    def operands(self, numbers: tuple[float, ...], params: Tensor | None = None) -> dict[str, object]:
        """Operands of a panel function; ``params`` [P, N] are parameters of rows and columns, before the squares."""
        given = [x for x in (params, self.squares) if x is not None]
        both = torch.cat(given) if given else None
        return {"tags": self.tags, "row_params": both, "column_params": both, "numbers": numbers}


def check_margin(name: str, value: float) -> float:
    """Raise unless the margin is a number."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}")
    check_scalar(name, value, positive=False)
    return float(value)


def distances(panel: Panel, first: int = 0) -> tuple[Tensor, Callable[..., Slopes]]:
    """The distances of a panel, and the slopes that a gradient with respect to them stands for.

    Parameter ``first`` of rows and columns, if there is one, are squared norms, and the distance is Euclidean; else it
    is 1 - S. At a distance of 0 the slope is 0. The slopes with respect to the parameters before are passed on.
    """
    if len(panel.row_params) == first:

        def of_cosine(gradient: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Slopes:
            return Slopes(gradient.neg(), rows, columns)

        return 1 - panel.s, of_cosine

    squared = panel.row_params[first][:, None] + panel.column_params[first]
    distance = squared.sub_(panel.s, alpha=2).clamp_(min=0).sqrt_()

    def of_euclidean(gradient: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Slopes:
        of_squared = (gradient / distance).masked_fill_(distance == 0, 0.0).mul_(0.5)
        own, others = of_squared.sum(dim=1)[None], of_squared.sum(dim=0)[None]
        return Slopes(
            of_squared.mul_(-2),
            own if rows is None else torch.cat((rows, own)),
            others if columns is None else torch.cat((columns, others)),
        )

    return distance, of_euclidean


def distance_of_rows(x: Tensor, y: Tensor, *, euclidean: bool) -> Tensor:
    """The distance of x[i] and y[i] for each i, whose slope is 0 at a distance of 0."""
    if not euclidean:
        return 1 - row_similarity(x, y)
    dtype = accumulation_dtype(x.dtype)
    squared = (x.to(dtype) - y.to(dtype)).square().sum(dim=1)
    nothing = squared == 0
    return squared.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)


def positives_and_negatives(panel: Panel) -> tuple[Tensor, Tensor]:
    """Bool [rows, columns]: the other rows of an equal label, and those of another label (and another id)."""
    same = panel.same_label
    negative = ~same
    if panel.tags.ids is not None:
        negative &= panel.tags.ids[:, None] != panel.key_tags.ids
    return same & ~panel.self_pair, negative


def average(
    run: Run,
    function: PanelFunction,
    rows: LabelledRows,
    numbers: tuple[float, ...] = (),
    params: Tensor | None = None,
) -> Tensor:
    """The sum over the function's pairs of outputs, a sum and a count for each row: all rows' sums over all counts.

    The rows' own losses are such that their mean is that. With one pair of outputs it takes one sweep for value and
    gradients; with more, the counts must be known before the gradients, which take another one.
    """
    operands = rows.operands(numbers, params) | {"group": run.group, "call": run.call, "backend": run.backend}
    if function.outputs == 2 and run.reduction != "none":
        weight = None if rows.weight is None else rows.weight.detach()
        total, count = panel_sum(function, rows.z, None, weights=weight, **operands)
        totals = torch.stack((total, count, count.new_full((), rows.z.shape[0])))
        total, count, everything = run.over_ranks(totals, "sum").unbind()
        mean = total / count.detach().clamp_min(1)
        return mean if run.reduction == "mean" else mean * everything.detach()
    outputs = panel_rows(function, rows.z, None, **operands)
    return average_of_rows(run, rows, outputs[::2], outputs[1::2])


def average_of_rows(run: Run, rows: LabelledRows, sums: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """The same, given sums and counts for each row."""
    everything = counts[0].new_full((), rows.z.shape[0])
    totals = torch.stack((*(count.detach().sum() for count in counts), everything))
    *totals, everything = run.over_ranks(totals, "sum").unbind()
    loss = sum(x * (everything / total.clamp_min(1)) for x, total in zip(sums, totals, strict=True))
    return run.reduce(loss, rows.weight)


@panel_function(outputs=4, kernel="similarities")
def similarities(panel: Panel):
    """Of each row the largest similarity of a positive and of a negative, the positives' sum, and their number.

    1 minus half the squared distance where it is Euclidean, else 1 minus the distance: cosines for unit rows, both.
    """
    distance, _ = distances(panel)
    similarity = 1 - (distance.square() / 2 if len(panel.row_params) else distance)
    positive, negative = positives_and_negatives(panel)
    best, hardest = (similarity.masked_fill(~mask, -torch.inf).amax(dim=1) for mask in (positive, negative))
    total, count = (similarity * positive).sum(dim=1), positive.sum(dim=1).to(similarity.dtype)
    return (best, hardest, total, count), lambda incoming: Slopes(torch.zeros_like(panel.s))


def stats_of_rows(run: Run, rows: LabelledRows) -> LossStats:
    """LossStats of labelled rows, from a sweep of their own: of each row with a positive, and of its nearest rows."""
    with torch.no_grad():
        operands = rows.operands(()) | {"group": run.group, "call": run.call, "backend": run.backend}
        best, hardest, total, count = panel_rows(similarities, rows.z, None, **operands)
    return summarize(run, total / count.clamp_min(1), [hardest], count > 0, 1.0, [best])
