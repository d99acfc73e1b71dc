"""InfoNCE, queries against keys. May import the vocabulary and :mod:`fastcl.losses.common`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_choice, check_pair, check_scalar, check_target
from fastcl.losses.common import (
    REDUCTIONS,
    LossStats,
    inverse,
    normalize_rows,
    softmax_loss,
    summarize,
)
from fastcl.terms import Mask, Reduce, Term, accumulation_dtype


def _terms(negatives: Mask, positive: Mask) -> tuple[Term, ...]:
    return Term(Reduce.LSE, negatives), Term(Reduce.SUM, positive), Term(Reduce.MAX, negatives)


# The last term of each is what return_stats adds.
_SAME_INDEX = _terms(Mask(self_pair=False), Mask(self_pair=True))
_BY_TARGET = _terms(Mask(target=False), Mask(target=True))
_EXPLICIT = (Term(Reduce.LSE), Term(Reduce.MAX))


def info_nce(
    query: Tensor,
    key: Tensor,
    tau: float | Tensor,
    *,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
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
        tau: the temperature, a positive float or a 0-d tensor, which may require grad.
        target: int64 [N], the index of each query's positive key, as in ``cross_entropy``; with a ``group``, its index
            among the keys of all ranks, one rank's after the other's. A negative index marks a query without a
            positive: its loss is 0, it gets no gradient, and the mean still divides by N.
        negatives: [K, D], negatives shared by all queries. Excludes ``target``. With a ``group``, the ranks' negatives
            are shards of one queue; where each rank holds the whole queue, no ``group`` is needed.
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
    and 3 with reduction="none" or a group), O(N + M) memory beyond features and gradients.

    Source: van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018 (arXiv:1807.03748).

    >>> import torch, fastcl
    >>> q = torch.eye(3, 8)
    >>> round(fastcl.info_nce(q, q, 1.0).item(), 4)  # log(1 + 2 / e)
    0.5514
    >>> round(fastcl.info_nce(q, q, 1.0, negatives=-q).item(), 4)  # log(1 + 2 / e + 1 / e^2)
    0.6265
    """
    hint = "; pass negatives with negatives=..." if isinstance(tau, Tensor) and tau.dim() == 2 else ""
    check_scalar("tau", tau, positive=True, hint=hint)
    check_choice("reduction", reduction, REDUCTIONS)
    check_pair("query", query, "key", key, same_rows=target is None, may_be_empty=group is not None)
    if target is not None:
        check_target("target", target, query, key.shape[0] if group is None else None)
    if negatives is not None:
        if target is not None:
            raise ValueError("target and negatives exclude each other: with negatives, query i's positive is key i")
        check_pair("query", query, "negatives", negatives, same_rows=False, may_be_empty=group is not None)
    scale = inverse(tau, query)
    has_positive = None if target is None else target >= 0
    options = {
        "reduction": reduction,
        "backend": backend,
        "group": group,
        "exchange": exchange,
        "call": f"loss=info_nce\nreturn_stats={return_stats}",
    }
    if negatives is None:
        terms = (_SAME_INDEX if target is None else _BY_TARGET)[: 3 if return_stats else 2]
        loss, (_, positive, *hardest) = softmax_loss(
            query, key, terms, scale, normalize=normalize, has_positive=has_positive, target=target, **options
        )
    else:
        if normalize:
            query, key, negatives = (normalize_rows(x) for x in (query, key, negatives))
            options["norm_bound"] = 1.0
        dtype = accumulation_dtype(query.dtype)
        positive = (query.to(dtype) * key.to(dtype)).sum(dim=1) * scale
        terms = _EXPLICIT[: 2 if return_stats else 1]
        loss, (_, *hardest) = softmax_loss(
            query, negatives, terms, scale, normalize=False, positive=positive, **options
        )
    return (loss, summarize(positive, hardest, has_positive, scale, group)) if return_stats else loss


def reference(
    query: Tensor,
    key: Tensor,
    tau: float | Tensor,
    *,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole similarity matrix: the loss of each query, [N]."""
    if normalize:
        query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
        negatives = None if negatives is None else torch.nn.functional.normalize(negatives, dim=1)
    if negatives is None:
        logits = query @ key.T / tau
        target = torch.arange(len(query), device=query.device) if target is None else target
    else:
        positive = (query * key).sum(dim=1, keepdim=True)
        logits = torch.cat((positive, query @ negatives.T), dim=1) / tau
        target = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    target = target.where(target >= 0, torch.full_like(target, -100))
    return torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=-100)
