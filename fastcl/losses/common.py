"""What the losses share: how one is run and reduced, normalisation, the softmax loss of one positive, its statistics.

May import the primitives, :mod:`fastcl.terms` and :mod:`fastcl.checks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.checks import check_choice, check_group, check_row_vector
from fastcl.cross_entropy import cross_entropy
from fastcl.distributed import EXCHANGES
from fastcl.pairwise import pairwise, scalar_tensor
from fastcl.panels import PanelFunction
from fastcl.panelwise import panel_rows, panel_sum
from fastcl.terms import AXES, NO_TAGS, Axis, Mask, Reduce, Tags, Term, accumulation_dtype, wants_tf32

REDUCTIONS = ("mean", "sum", "none")


class Run(NamedTuple):
    """Where and over which ranks a loss is computed, and how its rows become one number.

    ``call`` says in lines ``name=value`` what all ranks must agree on besides the arguments of a primitive.
    """

    reduction: str
    backend: str | None
    group: ProcessGroup | None
    exchange: str
    call: str

    @classmethod
    def checked(
        cls, reduction: str, backend: str | None, group: ProcessGroup | None, exchange: str, **call: object
    ) -> Run:
        """The same, once it is certain that the options exist."""
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("exchange", exchange, EXCHANGES)
        if group is not None:
            check_group("group", group)
        lines = [f"{name}={value}" for name, value in {**call, "reduction": reduction}.items()]
        return cls(reduction, backend, group, exchange, "\n".join(lines))

    def statistics(
        self,
        a: Tensor,
        b: Tensor | None,
        terms: Sequence[Term],
        scale: float | Tensor,
        *,
        target: Tensor | None = None,
        tags: Tags = NO_TAGS,
        key_tags: Tags = NO_TAGS,
        label_width: int = 0,
        norm_bound: float | None = None,
    ) -> tuple[Tensor, ...]:
        """:func:`fastcl.pairwise` of this backend, over this group."""
        return pairwise(
            a,
            b,
            terms,
            scale,
            target=target,
            tags=tags,
            key_tags=key_tags,
            label_width=label_width,
            norm_bound=norm_bound,
            backend=self.backend,
            group=self.group,
            exchange=self.exchange,
            call=self.call,
        )

    def panels(
        self, function: PanelFunction, a: Tensor, b: Tensor | None, weight: Tensor | None = None, **operands: object
    ) -> Tensor:
        """The loss whose rows are a panel function's only output, of :func:`fastcl.panelwise.panel_sum`'s operands.

        Mean and sum take one sweep over S for value and gradients; the losses of the rows take another for backward.
        """
        operands |= {"group": self.group, "call": self.call, "backend": self.backend}
        if self.reduction == "none":
            (loss,) = panel_rows(function, a, b, **operands)
            return self.reduce(loss, weight)
        weights = None if weight is None else weight.detach()
        (loss,) = panel_sum(function, a, b, weights=weights, **operands)
        both = self.over_ranks(torch.stack((loss, loss.new_full((), a.shape[0]))), "sum")
        return both[0] / both[1] if self.reduction == "mean" else both[0]

    def reduce(self, loss: Tensor, weight: Tensor | None = None, has_say: Tensor | None = None) -> Tensor:
        """The rows' losses [rows] times their weights, with 0 where a row has no say: their mean, sum, or themselves.

        Mean and sum are over the rows of all ranks of the group.
        """
        if weight is not None:
            loss = loss * weight.detach().to(loss.dtype)
        if has_say is not None:
            loss = loss.where(has_say, loss.new_zeros(()))
        if self.reduction == "none":
            return loss
        total, count = self.over_ranks(torch.stack((loss.sum(), loss.new_full((), loss.shape[0]))), "sum").unbind()
        return total / count if self.reduction == "mean" else total

    def over_ranks(self, x: Tensor, operation: str) -> Tensor:
        """The "sum" or "max" over the ranks of the group, if there is one."""
        return over_ranks(x, operation, self.group)

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks of the group; gradients are those of the sum of all ranks' objectives."""
        return x if self.group is None else torch.ops.fastcl.gather_over_ranks(x, self.group.group_name, self.call)[0]


def over_ranks(x: Tensor, operation: str, group: ProcessGroup | None) -> Tensor:
    """The "sum" or "max" over the ranks of the group, if there is one."""
    return x if group is None else torch.ops.fastcl.reduce_over_ranks(x, operation, group.group_name)


class LossStats(NamedTuple):
    """Detached 0-d diagnostics of a batch; reading one is what waits for the device."""

    accuracy: Tensor
    """share of the rows (for CLIP: rows and columns) whose positive is the most similar candidate (acc@1)"""
    positive_similarity: Tensor
    """mean similarity of the positive pairs, before the scale"""
    hardest_negative: Tensor
    """largest similarity of any negative pair, before the scale"""
    scale: Tensor
    """1 / temperature"""


def other_view(batch: int, device: torch.device) -> Tensor:
    """For each row of [z1; z2] the row of the other view of its example, int64 [2 * batch]."""
    return torch.arange(batch, 3 * batch, device=device) % max(1, 2 * batch)


def normalize_rows(x: Tensor) -> Tensor:
    """Rows of unit length, in the dtype of ``x``.

    The norm and the division are in float32 (float64 for float64), so that no half-precision norm overflows and a row
    of zeros stays zeros.
    """
    return F.normalize(x.to(accumulation_dtype(x.dtype)), dim=-1).to(x.dtype)


def inverse(tau: float | Tensor, features: Tensor) -> float | Tensor:
    """The scale that a temperature stands for, in the accumulation dtype of the features."""
    return 1.0 / (tau.to(accumulation_dtype(features.dtype)) if isinstance(tau, Tensor) else tau)


def row_similarity(x: Tensor, y: Tensor) -> Tensor:
    """<x[i], y[i]> for each i, in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    return (x.to(dtype) * y.to(dtype)).sum(dim=-1)


def safe_logsumexp(x: Tensor) -> Tensor:
    """log-sum-exp along the last dimension, whose gradient is 0 and not NaN where everything is -inf."""
    nothing = (x == -math.inf).all(dim=-1)
    found = torch.logsumexp(x.masked_fill(nothing[..., None], 0.0), dim=-1)
    return found.masked_fill(nothing, -math.inf)


def check_tags(rows: Tensor, **tags: Tensor | None) -> None:
    """Raise unless each of the tags is None or holds one integer for each row."""
    for name, tag in tags.items():
        if tag is not None:
            check_row_vector(name, tag, rows, integer=True)


def count_equal(run: Run, own: Tensor, others: Tensor, width: int = 0) -> Tensor:
    """How many of the others' labels, on all ranks, differ from each own one by no more than ``width``."""
    own, ordered = own.to(torch.int64), run.gather(others.to(torch.int64)).sort().values
    return torch.searchsorted(ordered, own + width, right=True) - torch.searchsorted(ordered, own - width)


def count_matches(run: Run, own: Tags, others: Tags, width: int = 0) -> Tensor:
    """How many of the others, on all ranks, have a label that differs from each own one by no more than ``width``, or,
    where ids are given, an equal id.
    """
    if own.ids is None:
        return count_equal(run, own.labels, others.labels, width)
    labels, ids = (run.gather(x.to(torch.int64)) for x in (others.labels, others.ids))
    by_label, by_id = labels.sort().values, ids.sort().values
    lowest = torch.searchsorted(by_label, own.labels.to(torch.int64) - width)
    highest = torch.searchsorted(by_label, own.labels.to(torch.int64) + width, right=True)
    first = torch.searchsorted(by_id, own.ids.to(torch.int64))
    equal_ids = torch.searchsorted(by_id, own.ids.to(torch.int64), right=True) - first
    # A pair of places, of an id and of a label in their orders, is one number.
    base = len(labels) + 1
    both = (torch.searchsorted(by_id, ids) * base + torch.searchsorted(by_label, labels)).sort().values
    equal_both = torch.searchsorted(both, first * base + highest) - torch.searchsorted(both, first * base + lowest)
    return highest - lowest + equal_ids - equal_both * (equal_ids > 0)


def check_weight(weight: Tensor | None, rows: Tensor) -> None:
    """Raise unless ``weight`` is None or holds one number for each row."""
    if weight is not None:
        check_row_vector("weight", weight, rows, integer=False)


def exclude(name: str, **others: object) -> None:
    """Raise if an argument that excludes the argument ``name`` was given, too."""
    for other, value in others.items():
        if value is not None:
            shown = f"{other} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{other}={value!r}"
            raise ValueError(f"{name} and {other} exclude each other, got {shown} besides {name}")


def check_options(labels: object, false_negative_margin: float | None, label_smoothing: float) -> None:
    """Raise unless these options of a softmax loss go together."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    if label_smoothing and false_negative_margin is not None:
        raise ValueError(
            f"label_smoothing must be 0 with a false_negative_margin: its share is spread evenly over the candidates, "
            f"and how many of them a margin leaves is known to no term of a plan; got {label_smoothing} and "
            f"{false_negative_margin}"
        )
    if labels is not None:
        exclude("labels", false_negative_margin=false_negative_margin)


def margin_test(margin: float | None) -> bool | None:
    """What a mask of negatives says of pairs above the threshold of a margin."""
    return None if margin is None else False


def softmax_loss(
    run: Run,
    a: Tensor,
    b: Tensor | None,
    terms: Sequence[Term],
    scale: float | Tensor,
    *,
    normalize: bool,
    positive: Tensor | None = None,
    has_positive: Tensor | None = None,
    weight: Tensor | None = None,
    target: Tensor | None = None,
    tags: Tags = NO_TAGS,
    key_tags: Tags = NO_TAGS,
    norm_bound: float | None = None,
    label_smoothing: float = 0.0,
    left_out: int | Tensor = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-log softmax of each row's positive, averaged over the LSE terms, and the values of all terms.

    The LSE terms admit negatives only: softplus(L - positive) keeps its precision when the positive dominates, where
    the difference of a log-sum-exp over everything and the positive cancels. Rows without negatives (L = -inf) have
    loss 0 and gradient 0, and so have rows where ``has_positive`` is false. The positive is the SUM term unless given.
    ``label_smoothing`` is the share of the target that is spread evenly over the positive and the negatives, which are
    all keys (of all ranks) but ``left_out`` of them.

    A mean or a sum is one operator call for value and gradient. The losses of the single rows, whose weights only
    backward knows, take one for each, and so do those of a group, whose rows are complete only after the exchange.
    """
    if run.reduction != "none" and run.group is None and not label_smoothing:
        dtype = accumulation_dtype(a.dtype)
        weights = None if weight is None else weight.detach().to(dtype)
        if has_positive is not None:
            weights = has_positive.to(dtype) if weights is None else weights * has_positive
        return cross_entropy(
            a,
            b,
            terms,
            scale,
            positive=positive,
            weights=weights,
            reduction=run.reduction,
            normalize=normalize,
            target=target,
            tags=tags,
            key_tags=key_tags,
            norm_bound=norm_bound,
            backend=run.backend,
        )
    if normalize:
        a, b, norm_bound = normalize_rows(a), None if b is None else normalize_rows(b), 1.0
    spread = []
    if label_smoothing:
        spread = [Term(Reduce.SUM, term.mask, term.axis) for term in terms if term.reduce is Reduce.LSE]
    values = run.statistics(
        a, b, [*terms, *spread], scale, target=target, tags=tags, key_tags=key_tags, norm_bound=norm_bound
    )
    values, totals = values[: len(terms)], values[len(terms) :]
    if positive is None:
        positive = next(value for term, value in zip(terms, values, strict=True) if term.reduce is Reduce.SUM)
    negatives = [value for term, value in zip(terms, values, strict=True) if term.reduce is Reduce.LSE]
    loss = sum(F.softplus(value - positive, threshold=40.0) for value in negatives) / len(negatives)
    if label_smoothing:
        count = count_keys(run, a if b is None else b) - left_out
        loss = loss + smoothing_share(label_smoothing, positive, sum(totals) / len(totals), count)
    return run.reduce(loss, weight, has_positive), values


def count_keys(run: Run, keys: Tensor) -> Tensor:
    """The number of keys of all ranks, 0-d."""
    return run.over_ranks(keys.new_full((), len(keys), dtype=accumulation_dtype(keys.dtype)), "sum")


def smoothing_share(
    label_smoothing: float, positive: Tensor, negatives: Tensor, count: Tensor, positives: int | Tensor = 1
) -> Tensor:
    """What label smoothing adds to -log softmax of a positive: a share of how far it is above the candidates' mean.

    These are the positives, whose mean logit is ``positive``, and ``count`` negatives, whose logits' sum is
    ``negatives``.
    """
    return label_smoothing * (positive * count - negatives) / (count + positives).clamp_min(1)


def tags_of_pair(
    name: str, value: Tensor | Sequence[Tensor] | None, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Tags of queries and of keys from one argument, which is the tag of both where there are as many, or a pair."""
    if value is None:
        return None, None
    if isinstance(value, Tensor):
        if len(query) != len(key):
            raise ValueError(
                f"{name} must be a pair, of the queries' and of the keys', where their numbers differ as {len(query)} "
                f"and {len(key)}; got one tensor of shape {tuple(value.shape)}"
            )
        value = value, value
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a tensor or a pair of tensors, got {value!r}")
    check_tags(query, **{f"{name} of the queries": value[0]})
    check_tags(key, **{f"{name} of the keys": value[1]})
    return value[0], value[1]


def false_negative_threshold(positive: Tensor, margin: float, scale: float | Tensor) -> Tensor:
    """The logit above which a pair is taken for a positive that nobody marked: the row's positive plus a margin.

    ``positive`` [N] are similarities. They are computed apart from S, so that exact duplicates of a positive can come
    out above it by rounding: what is within rounding of the threshold stays a negative.
    """
    rounding = 1e-5
    if positive.is_cuda and wants_tf32():
        rounding = 2e-3
    return (positive.detach() + margin + rounding) * (scale.detach() if isinstance(scale, Tensor) else scale)


def summarize(
    run: Run,
    positive: Tensor,
    hardest: Sequence[Tensor],
    has_positive: Tensor | None,
    scale: float | Tensor,
    best: Sequence[Tensor] = (),
) -> LossStats:
    """LossStats from the positives' logits and, for each direction, the largest negative logit of each row.

    Where a row has several positives, ``positive`` is their mean and ``best`` the largest in each direction.
    """
    positive = positive.detach()
    best = [logit.detach() for logit in best] or [positive] * len(hardest)
    hardest = [negative.detach() for negative in hardest]
    scale = scalar_tensor(scale, positive.dtype, positive.device).detach()
    valid = torch.ones_like(positive, dtype=torch.bool) if has_positive is None else has_positive
    sums = [valid.sum(), positive.where(valid, positive.new_zeros(())).sum()]
    sums += [((own > negative) & valid).sum() for own, negative in zip(best, hardest, strict=True)]
    count, similarity, *correct = run.over_ranks(torch.stack([x.to(positive.dtype) for x in sums]), "sum").unbind()
    nothing = positive.new_full((1,), -math.inf)
    largest = torch.cat([nothing, *hardest]).amax()
    count = count.clamp_min(1)
    return LossStats(
        accuracy=torch.stack(correct).mean() / count,
        positive_similarity=similarity / count / scale,
        hardest_negative=run.over_ranks(largest, "max") / scale,
        scale=scale,
    )


def stats_of_pairs(
    run: Run,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    ids: Tensor | None = None,
    axes: Sequence[Axis] = AXES,
) -> LossStats:
    """LossStats of pairs of rows, from a sweep of its own, for a loss whose own sweep can't say them."""
    tags = Tags(ids=ids)
    negatives = Mask(self_pair=False, id=None if ids is None else False)
    terms = [Term(Reduce.SUM, Mask(self_pair=True)), *(Term(Reduce.MAX, negatives, axis) for axis in axes)]
    with torch.no_grad():
        positive, *hardest = run.statistics(a, b, terms, scale, tags=tags, key_tags=tags)
    return summarize(run, positive, hardest, None, scale)
