"""InfoNCE, queries against keys. May import the vocabulary and :mod:`fastcl.losses.common`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_pair, check_row_vector, check_scalar, check_target
from fastcl.losses.common import (
    LossStats,
    Run,
    check_options,
    check_weight,
    count_equal,
    exclude,
    false_negative_threshold,
    inverse,
    margin_test,
    normalize_rows,
    row_similarity,
    safe_logsumexp,
    smoothing_share,
    softmax_loss,
    summarize,
    tags_of_pair,
)
from fastcl.losses.sup_con import Labelled, multi_positive_loss
from fastcl.terms import Mask, Reduce, Tags, Term, accumulation_dtype

PairOfTags = Tensor | Sequence[Tensor]


def info_nce(
    query: Tensor,
    key: Tensor,
    tau: float | Tensor,
    *,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    labels: PairOfTags | None = None,
    ids: PairOfTags | None = None,
    label_width: int = 0,
    weight: Tensor | None = None,
    false_negative_margin: float | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The cross entropy of each query's positive key against all keys.

    With :math:`t(i)` the positive key of query i (i itself without ``target``), and rows of unit length where
    ``normalize``,

    .. math:: \ell_i = -\log \frac{\exp(\langle q_i, k_{t(i)}\rangle / \tau)}
                                  {\sum_j \exp(\langle q_i, k_j\rangle / \tau)}

    With explicit ``negatives`` the sum runs over the positive and those negatives only: other queries' keys are not
    negatives, as in the package info-nce-pytorch. MoCo is ``info_nce(q, k.detach(), tau, negatives=queue)``.

    Args:
        query: [N, D], float64, float32, bfloat16 or float16.
        key: [M, D] of the same dtype and device; M must be N unless ``target`` is given.
        tau: the temperature, a positive float or a 0-d tensor, which may require grad; or [N], one for each query,
            without ``return_stats``.
        target: int64 [N], the index of each query's positive key, as in ``cross_entropy``; with a ``group``, its index
            among the keys of all ranks, one rank's after the other's. A negative index marks a query without a
            positive: its loss is 0, it gets no gradient, and the mean still divides by N.
        negatives: [K, D], negatives shared by all queries, or [N, K, D], each query's own, which exclude ``ids``,
            ``group`` and ``backend``. Both exclude ``target``. With a ``group``, shared negatives are shards of one
            queue; where each rank holds the whole queue, or each query its own negatives, no ``group`` is needed.
        labels: integers [N] for queries and keys alike, or a pair of [N] and [M]. All keys with a query's label are
            then its positives, any number of them, and the loss is their mean, as in :func:`fastcl.sup_con_loss`.
            Excludes ``target``, ``negatives`` and ``false_negative_margin``.
        ids: integers [N] or a pair, as ``labels``: keys (or ``negatives``) with a query's id are never its negatives.
        label_width: labels that differ by no more count as equal. With the time of a frame as label, the positives are
            its neighbours in time; frames of another sequence need labels far away.
        weight: [N], a constant factor of a query's loss. The mean still divides by N.
        false_negative_margin: leave out negatives that are more similar than the row's positive by more than this, as
            likely positives that nobody marked; a similarity, before the scale.
        label_smoothing: the share :math:`\varepsilon` of the target that is spread evenly over the candidates A, all
            keys but those that ``ids`` leave out; it adds :math:`\varepsilon (\bar S_P - \bar S_A)` to a query's loss,
            the mean logits of its positive (with ``labels``: positives) and of its candidates. Excludes a margin.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [N].
        return_stats: also return a :class:`fastcl.LossStats` from the same sweep.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty; see Returns.
        exchange: how the ranks' features travel: "ring", "gather", or "auto" by their size (docs/many-ranks.md).

    Returns:
        The loss in float32 (float64 for float64 features). A query without negatives has loss 0 and gradient 0.
        With a ``group``, "mean" and "sum" are over the rows of all ranks, the same on each, and "none" is this rank's
        rows; after the usual mean of gradients over ranks, all gradients are those of the loss of the union.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 3 * N * M * D multiply-adds for value and gradients, 2 * N * M * D where only one side requires grad (4
    and 3 with reduction="none", labels, label_smoothing or a group), O(N + M) memory beyond features and gradients;
    with negatives [N, K, D] N * K logits and, where they are normalised, a copy of them.

    Source: van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018 (arXiv:1807.03748).

    >>> import torch, fastcl
    >>> q = torch.eye(3, 8)
    >>> round(fastcl.info_nce(q, q, 1.0).item(), 4)  # log(1 + 2 / e)
    0.5514
    >>> round(fastcl.info_nce(q, q, 1.0, negatives=-q).item(), 4)  # log(1 + 2 / e + 1 / e^2)
    0.6265
    """
    _check(query, key, tau, target, negatives, labels, group)
    check_weight(weight, query)
    check_options(labels, false_negative_margin, label_smoothing)
    margin = false_negative_margin
    per_query = isinstance(tau, Tensor) and tau.dim() == 1
    if negatives is not None:
        exclude("negatives", target=target, labels=labels)
    if labels is not None:
        exclude("labels", target=target)
    if per_query:
        exclude("tau of shape [N]", return_stats=return_stats or None)
    run = Run.checked(
        reduction, backend, group, exchange, loss="info_nce", normalize=normalize, return_stats=return_stats,
        labels=labels is not None, ids=ids is not None, margin=margin is not None, smoothing=label_smoothing > 0,
        negatives=negatives is not None, tau_per_query=per_query,
    )  # fmt: skip
    scale, norm_bound = inverse(tau, query), None
    if normalize and (per_query or negatives is not None or margin is not None):
        query, key, normalize, norm_bound = normalize_rows(query), normalize_rows(key), False, 1.0
        negatives = None if negatives is None else normalize_rows(negatives)
    threshold = None
    if margin is not None:
        if target is not None:
            exclude("false_negative_margin with target", group=group)
        own = key if target is None else key[target.clamp_min(0)]
        threshold = false_negative_threshold(row_similarity(query, own), margin, scale)
    if per_query:
        # A temperature for each query is a length of each query; the largest bounds the logits.
        query, scale, norm_bound = (query.to(scale.dtype) * scale[:, None]).to(query.dtype), 1.0, None
    if negatives is not None and negatives.dim() == 3:
        exclude("negatives of each query", ids=ids, group=group)
        return _own_negatives(run, query, key, negatives, scale, threshold, weight, label_smoothing, return_stats)
    others = key if negatives is None else negatives
    query_labels, key_labels = tags_of_pair("labels", labels, query, others)
    query_ids, key_ids = tags_of_pair("ids", ids, query, others)
    tags, key_tags = Tags(query_labels, query_ids, threshold), Tags(key_labels, key_ids)
    if labels is not None:
        pairs = Labelled(query, key, tags, key_tags, label_width)
        loss, stats = multi_positive_loss(
            run,
            pairs,
            scale,
            normalize=normalize,
            norm_bound=norm_bound,
            weight=weight,
            label_smoothing=label_smoothing,
            return_stats=return_stats,
        )
        return (loss, stats) if return_stats else loss
    of_negatives = {"id": None if ids is None else False, "above": margin_test(margin)}
    positive, has_positive = None, None if target is None else target >= 0
    if negatives is not None:
        mask, positive = Mask(**of_negatives), row_similarity(query, key) * scale
        terms = []
    else:
        by = "self_pair" if target is None else "target"
        mask = Mask(**{by: False}, **of_negatives)
        terms = [Term(Reduce.SUM, Mask(**{by: True}))]
    left_out = int(negatives is None)
    if label_smoothing and ids is not None:
        left_out = count_equal(run, query_ids, key_ids)
        if negatives is None:
            own = key_ids if target is None else run.gather(key_ids)[target.clamp_min(0)]
            left_out = left_out + (own != query_ids)
    terms += [Term(reduce, mask) for reduce in ((Reduce.LSE, Reduce.MAX) if return_stats else (Reduce.LSE,))]
    loss, values = softmax_loss(
        run,
        query,
        others,
        terms,
        scale,
        normalize=normalize,
        positive=positive,
        has_positive=has_positive,
        weight=weight,
        target=target,
        tags=tags,
        key_tags=key_tags,
        norm_bound=norm_bound,
        label_smoothing=label_smoothing,
        left_out=left_out,
    )
    if not return_stats:
        return loss
    *_, hardest = values
    return loss, summarize(run, values[0] if positive is None else positive, [hardest], has_positive, scale)


def _check(
    query: Tensor,
    key: Tensor,
    tau: float | Tensor,
    target: Tensor | None,
    negatives: Tensor | None,
    labels: PairOfTags | None,
    group: ProcessGroup | None,
) -> None:
    one_each = target is None and (labels is None or negatives is not None)
    check_pair("query", query, "key", key, same_rows=one_each, may_be_empty=group is not None)
    if isinstance(tau, Tensor) and tau.dim() == 1:
        check_row_vector("tau", tau, query, integer=False)
    else:
        hint = ", or [N], one for each query; negatives are passed by name" if isinstance(tau, Tensor) else ""
        check_scalar("tau", tau, positive=True, hint=hint)
    if target is not None:
        check_target("target", target, query, key.shape[0] if group is None else None)
    if negatives is None:
        return
    if isinstance(negatives, Tensor) and negatives.dim() == 3:
        if negatives.shape[0] != query.shape[0]:
            raise ValueError(
                f"negatives of each query must be [N, K, D] with N = {query.shape[0]}, got {tuple(negatives.shape)}"
            )
        negatives = negatives.flatten(0, 1)
    check_pair("query", query, "negatives", negatives, same_rows=False, may_be_empty=group is not None)


def _own_negatives(
    run: Run,
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    scale: float | Tensor,
    threshold: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    return_stats: bool,
) -> Tensor | tuple[Tensor, LossStats]:
    """N * K logits, fewer than the negatives' own numbers: a batched product needs no tiles."""
    if run.backend is not None:
        raise ValueError(
            f"backend must be None with negatives of each query, which no backend tiles; got {run.backend!r}"
        )
    dtype = accumulation_dtype(query.dtype)
    logits = torch.einsum("nd,nkd->nk", query.to(dtype), negatives.to(dtype)) * scale
    if threshold is not None:
        logits = logits.masked_fill(logits > threshold[:, None], -math.inf)
    positive = row_similarity(query, key) * scale
    loss = torch.nn.functional.softplus(safe_logsumexp(logits) - positive, threshold=40.0)
    if label_smoothing:
        count = torch.full_like(positive, logits.shape[1])
        loss = loss + smoothing_share(label_smoothing, positive, logits.sum(dim=1), count)
    loss = run.reduce(loss, weight)
    return (loss, summarize(run, positive, [logits.amax(dim=1)], None, scale)) if return_stats else loss


def reference(
    query: Tensor,
    key: Tensor,
    tau: float | Tensor,
    *,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    ids: tuple[Tensor, Tensor] | None = None,
    label_width: int = 0,
    false_negative_margin: float | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each query, [N]."""
    if normalize:
        query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
        negatives = None if negatives is None else torch.nn.functional.normalize(negatives, dim=-1)
    rows = torch.arange(len(query), device=query.device)
    if negatives is None:
        logits = query @ key.T
        target = rows if target is None else target
    else:
        others = torch.einsum("nd,nkd->nk", query, negatives) if negatives.dim() == 3 else query @ negatives.T
        logits = torch.cat(((query * key).sum(dim=1, keepdim=True), others), dim=1)
        target = torch.zeros_like(rows)
    temperature = tau[:, None] if isinstance(tau, Tensor) and tau.dim() == 1 else tau
    logits = logits / temperature
    if ids is None and false_negative_margin is None and labels is None:
        target = target.where(target >= 0, torch.full_like(target, -100))
        return torch.nn.functional.cross_entropy(
            logits, target, reduction="none", ignore_index=-100, label_smoothing=label_smoothing
        )
    if labels is None:
        positive = torch.zeros_like(logits, dtype=torch.bool)
        positive[rows, target.clamp_min(0)] = target >= 0
    else:
        positive = (labels[0][:, None] - labels[1]).abs() <= label_width
    dropped = torch.zeros_like(positive)
    if ids is not None:
        dropped[:, logits.shape[1] - len(ids[1]) :] = ids[0][:, None] == ids[1]
    if false_negative_margin is not None:
        own = logits.gather(1, target.clamp_min(0)[:, None])
        dropped |= logits > own + false_negative_margin / temperature
    candidate = positive | ~dropped
    log_p = logits.masked_fill(~candidate, float("-inf")).log_softmax(dim=1).masked_fill(~candidate, 0.0)
    of_positives = (log_p * positive).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
    of_all = log_p.sum(dim=1) / candidate.sum(dim=1).clamp_min(1)
    loss = (label_smoothing - 1) * of_positives - label_smoothing * of_all
    return loss.where(positive.any(dim=1), 0.0)
