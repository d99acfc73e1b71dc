"""Multiple negatives ranking: queries, documents and hard negatives, each against each.

May import the vocabulary and :mod:`fastcl.losses.common`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.checks import check_between, check_choice, check_pair, check_row_vector, check_scalar
from fastcl.losses.common import (
    LossStats,
    Run,
    check_weight,
    inverse,
    normalize_rows,
    row_similarity,
    safe_logsumexp,
    softmax_loss,
    summarize,
)
from fastcl.terms import AXES, Axis, Mask, Reduce, Tags, Term

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")


def multiple_negatives_ranking_loss(
    query: Tensor,
    document: Tensor,
    tau: float | Tensor,
    *,
    negatives: Sequence[Tensor] = (),
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The cross entropy of each query's document against other documents and queries.

    With rows of unit length where ``normalize`` and :math:`S(x, y) = \langle x, y\rangle / \tau`,

    .. math:: \ell_i = \log Z_i - S(q_i, d_i), \qquad Z_i = \sum_{\text{directions}} Z^{\text{direction}}_i

    where the directions sum :math:`e^S` over

    - "query_to_doc": :math:`q_i` and all documents, the hard negatives of all queries among them;
    - "doc_to_query": :math:`d_i` and all queries;
    - "query_to_query": :math:`q_i` and all other queries;
    - "doc_to_doc": :math:`d_i` and all documents of other queries, hard negatives among them.

    With ``partition_mode="per_direction"`` it is the mean over directions of
    :math:`\log Z^{\text{direction}}_i - S(q_i, d_i)`. The mean over queries equals sentence-transformers'
    ``MultipleNegativesRankingLoss`` with ``scale=1 / tau``; several directions in one sum are the loss of GTE.

    Args:
        query, document: [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        tau: the temperature, a positive float or a 0-d tensor, which may require grad.
        negatives: hard negatives: one matrix [B, D] with the first of each query, one with the second, and so on, in
            the order in which sentence-transformers has its columns; or all of them as one tensor [K, B, D].
        directions: some of the four, "query_to_doc" among them.
        partition_mode: "joint" or "per_direction"; the latter for "query_to_doc" and "doc_to_query" only, because the
            others don't hold the positive pair, so that their losses would have no lower bound.
        hardness_mode: which negatives of "query_to_doc" get a penalty added to their logit: documents of other queries
            ("in_batch_negatives"), a query's own hard negatives ("hard_negatives"), or both ("all_negatives").
        hardness_strength: the penalty is this times the similarity, before the temperature and without a gradient.
        ids: integers [B]: no document of a query is a negative of another query of the same id, in any direction.
        weight: [B], a constant factor of a query's loss. The mean still divides by B.
        normalize: scale each row to unit length first.
        reduction: "mean", "sum", or "none" for [B].
        return_stats: also return a :class:`fastcl.LossStats` from the same sweeps: of all candidates in one sum, or
            averaged over directions where each has a sum of its own. Similarities are those without a penalty.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty. All ranks must have as many ``negatives`` of each query.
        exchange: how the ranks' features travel: "ring", "gather", or "auto" by their size (docs/many-ranks.md).

    Returns:
        The loss in float32 (float64 for float64 features). A query without negatives has the loss 0 (log 2 where the
        sum holds its positive in two directions) and gradient 0. With a ``group``, "mean" and "sum" are over the
        queries of all ranks, the same on each, and "none" is this rank's.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: in units of B^2 * D multiply-adds, for value and gradients: 4 for both directions between queries and
    documents together (3 for "query_to_doc" alone, without negatives), 2 for each of the others, and 4 for each matrix
    of hard negatives in each direction; "doc_to_query" takes 4 of its own beside a ``hardness_mode``. O(B) memory
    beyond features and gradients.

    Source: Henderson et al., Efficient Natural Language Response Suggestion for Smart Reply, 2017 (arXiv:1705.00652);
    Li et al., Towards General Text Embeddings with Multi-stage Contrastive Learning, 2023 (arXiv:2308.03281); the
    penalty: Lan et al., LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive Learning,
    2025 (arXiv:2503.04812).

    >>> import torch, fastcl
    >>> x = torch.eye(3, 8)
    >>> round(fastcl.multiple_negatives_ranking_loss(x, x, 1.0).item(), 4)  # log(1 + 2 / e)
    0.5514
    >>> both = ("query_to_doc", "doc_to_query")
    >>> round(fastcl.multiple_negatives_ranking_loss(x, x, 1.0, directions=both).item(), 4)  # log(2 + 4 / e)
    1.2446
    """
    negatives, directions = list(negatives), set(directions)
    _check(query, document, tau, negatives, directions, partition_mode, hardness_mode, hardness_strength, group)
    if ids is not None:
        check_row_vector("ids", ids, query, integer=True)
    check_weight(weight, query)
    run = Run.checked(
        reduction, backend, group, exchange, loss="multiple_negatives_ranking_loss", normalize=normalize,
        negatives=len(negatives), directions=sorted(directions), partition_mode=partition_mode,
        hardness_mode=hardness_mode, hardness_strength=hardness_strength or None, ids=ids is not None,
        return_stats=return_stats,
    )  # fmt: skip
    scale, tags = inverse(tau, query), Tags(None, ids)
    mask = Mask(self_pair=False, id=None if ids is None else False)
    back = "doc_to_query" in directions
    kinds = (Reduce.LSE, Reduce.MAX) if return_stats else (Reduce.LSE,)
    if not negatives and hardness_mode is None and (partition_mode == "per_direction" or len(directions) == 1):
        axes = AXES if back else (Axis.ROW,)
        terms = [
            Term(Reduce.SUM, Mask(self_pair=True)),
            *(Term(reduce, mask, axis) for reduce in kinds for axis in axes),
        ]
        loss, (positive, *values) = softmax_loss(
            run, query, document, terms, scale, normalize=normalize, weight=weight, tags=tags, key_tags=tags
        )
        return (loss, summarize(run, positive, values[len(axes) :], None, scale)) if return_stats else loss
    if normalize:
        query, document, *negatives = (normalize_rows(x) for x in (query, document, *negatives))

    def others(
        a: Tensor, b: Tensor | None, penalty: float = 0.0, axes: tuple[Axis, ...] = (Axis.ROW,)
    ) -> list[_Candidates]:
        """The rows of other examples, whose logits a penalty raises, along each axis."""
        factor, share = scale + penalty, 1.0
        if penalty:
            share = scale / factor
            share = share.detach() if isinstance(share, Tensor) else share
            a, b = (_with_gradient_times(share, x) for x in (a, b))
        terms = [Term(reduce, mask, axis) for axis in axes for reduce in kinds]
        bound = 1.0 if normalize else None
        values = run.statistics(a, b, terms, factor, tags=tags, key_tags=tags, norm_bound=bound)
        if not return_stats:
            return [_Candidates(value) for value in values]
        return [_Candidates(lse, largest * share) for lse, largest in zip(values[::2], values[1::2], strict=True)]

    positive = row_similarity(query, document) * scale
    of_others = hardness_strength if hardness_mode in ("in_batch_negatives", "all_negatives") else 0.0
    of_own = hardness_strength if hardness_mode in ("hard_negatives", "all_negatives") else 0.0
    own = [row_similarity(query, x) for x in negatives]
    of_query = [_Candidates(x * scale + of_own * x.detach(), (x * scale).detach()) for x in own]
    of_query += [others(query, x, of_others)[0] for x in negatives]
    if back and not of_others:
        towards, of_document = others(query, document, axes=AXES)
        sums = [[*of_query, towards], [of_document]]
    else:
        sums = [[*of_query, *others(query, document, of_others)]]
        sums += [others(document, query)] if back else []
    if "query_to_query" in directions:
        sums.append(others(query, None))
    if "doc_to_doc" in directions:
        sums.append([others(document, x)[0] for x in (None, *negatives)])
    # The sums are over negatives; how often the positive stands beside them is the constant.
    log_positives = 0.0
    if partition_mode == "joint":
        sums, log_positives = [[x for found in sums for x in found]], math.log(1 + back)
    pulled = positive + log_positives
    logits = (safe_logsumexp(torch.stack([x.lse for x in found], dim=-1)) for found in sums)
    losses = [F.softplus(lse - pulled, threshold=40.0) for lse in logits]
    loss = run.reduce(sum(losses) / len(losses) + log_positives, weight)
    if not return_stats:
        return loss
    hardest = [torch.stack([x.largest for x in found]).amax(dim=0) for found in sums]
    return loss, summarize(run, positive, hardest, None, scale)


class _Candidates(NamedTuple):
    """Of each query, some of its negatives: the log-sum-exp of their logits and, without a penalty, the largest."""

    lse: Tensor
    largest: Tensor | None = None


def _with_gradient_times(factor: float | Tensor, x: Tensor) -> Tensor:
    """``x``, whose gradient is multiplied on its way back."""
    return x.detach() + factor * (x - x.detach())


def _check(
    query: Tensor,
    document: Tensor,
    tau: float | Tensor,
    negatives: Sequence[Tensor],
    directions: set[str],
    partition_mode: str,
    hardness_mode: str | None,
    hardness_strength: float,
    group: ProcessGroup | None,
) -> None:
    check_scalar("tau", tau, positive=True)
    check_pair("query", query, "document", document, same_rows=True, may_be_empty=group is not None)
    for k, x in enumerate(negatives):
        check_pair("query", query, f"negatives[{k}]", x, same_rows=True, may_be_empty=group is not None)
    for direction in directions:
        check_choice("directions", direction, DIRECTIONS)
    if "query_to_doc" not in directions:
        raise ValueError(f"directions must hold 'query_to_doc', that of the positive pair, got {sorted(directions)}")
    check_choice("partition_mode", partition_mode, PARTITION_MODES)
    without_positive = directions & {"query_to_query", "doc_to_doc"}
    if partition_mode == "per_direction" and without_positive:
        raise ValueError(
            f"partition_mode must be 'joint' with {' and '.join(sorted(without_positive))}, which don't hold the "
            f"positive pair, so that a loss of their own has no lower bound; got 'per_direction'"
        )
    if hardness_mode is not None:
        check_choice("hardness_mode", hardness_mode, HARDNESS_MODES)
    check_between("hardness_strength", hardness_strength, 0.0, math.inf)
    if bool(hardness_strength) is (hardness_mode is None):
        raise ValueError(
            f"hardness_strength must be positive with a hardness_mode, and 0 without, got {hardness_strength} and "
            f"{hardness_mode!r}"
        )


def reference(
    query: Tensor,
    document: Tensor,
    tau: float | Tensor,
    *,
    negatives: Sequence[Tensor] = (),
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The textbook formula with the whole similarity matrices: the loss of each query, [B]."""
    documents = torch.cat((document, *negatives))
    if normalize:
        query, documents = F.normalize(query, dim=1), F.normalize(documents, dim=1)
    batch, blocks = len(query), 1 + len(negatives)
    document = documents[:batch]
    itself = torch.eye(batch, dtype=torch.bool, device=query.device)
    duplicate = torch.zeros_like(itself) if ids is None else (ids[:, None] == ids) & ~itself
    own, duplicates = itself.repeat(1, blocks), duplicate.repeat(1, blocks)
    first = torch.arange(batch * blocks, device=query.device) < batch
    to_documents = query @ documents.T
    penalized = {
        None: torch.zeros_like(own),
        "in_batch_negatives": ~own,
        "hard_negatives": own & ~first,
        "all_negatives": ~(own & first),
    }[hardness_mode]
    logits = {
        "query_to_doc": (to_documents / tau + hardness_strength * penalized * to_documents.detach(), duplicates),
        "doc_to_query": (document @ query.T / tau, duplicate),
        "query_to_query": (query @ query.T / tau, duplicate | itself),
        "doc_to_doc": (document @ documents.T / tau, duplicates | own),
    }
    chosen = [logits[name][0].masked_fill(logits[name][1], float("-inf")) for name in sorted(set(directions))]
    if partition_mode == "joint":
        chosen = [torch.cat(chosen, dim=1)]
    log_z = sum(x.logsumexp(dim=1) for x in chosen) / len(chosen)
    return log_z - (query * document).sum(dim=1) / tau
