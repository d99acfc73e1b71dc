"""What a batch and its loss say about the representation: retrieval, entropy, mutual information, geometry, bounds.

May import :mod:`fastcl.losses.common`, the primitives and below. None of it holds the similarity matrix. Over a
``group`` gradients are as those of the losses: after the usual mean over ranks, those of the union.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_count, check_group, check_matrix, check_pair, check_row_vector, check_scalar
from fastcl.losses.common import inverse, normalize_rows, over_ranks
from fastcl.pairwise import pairwise
from fastcl.panels import Outputs, Panel, Slopes, panel_function
from fastcl.panelwise import panel_rows
from fastcl.terms import Mask, Reduce, Tags, Term, accumulation_dtype


class RetrievalAccuracy(NamedTuple):
    """Shares of the rows whose own counterpart is among the k most similar, [len(k)] each, without gradient."""

    query_to_key: Tensor
    key_to_query: Tensor


@panel_function(outputs=1)
def _no_worse_negatives(panel: Panel):
    """How many other keys are at least as similar to each row as its own; duplicates don't count."""
    own = panel.s.gather(1, panel.self_column[:, None])
    rivals = (panel.s >= own) & ~panel.self_pair
    if panel.tags.ids is not None:
        rivals &= panel.tags.ids[:, None] != panel.key_tags.ids
    return (rivals.sum(dim=1).to(own.dtype),), lambda incoming: Slopes(torch.zeros_like(panel.s))


@torch.no_grad()
def retrieval_accuracy(
    query: Tensor,
    key: Tensor,
    k: Sequence[int] = (1, 5, 10),
    *,
    ids: Tensor | None = None,
    normalize: bool = True,
    group: ProcessGroup | None = None,
) -> RetrievalAccuracy:
    r"""In-batch retrieval both ways: is a query's own key among its k most similar keys, and the reverse?

    .. math:: \text{acc@}k = \frac{1}{N} \#\bigl\{i : \#\{j \ne i : S_{ij} \ge S_{ii}\} < k\bigr\}

    A tie is a miss, so that features that have collapsed to a point retrieve nothing (but where rounding tells them
    apart).

    Args:
        query, key: [N, D], row i of one belongs to row i of the other.
        k: the sizes of the shortlist.
        ids: integers [N]: keys of an equal id are duplicates, which are no rivals of each other.
        normalize: scale each row to unit length first.
        group: a torch.distributed process group: the rows are those of all its ranks, which may differ in number, or be
            none; rivals are the keys of all of them, and the shares are those of all queries.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 2 * N^2 * D multiply-adds, whatever k is; O(N) memory, and a panel.

    >>> import torch
    >>> from fastcl.diagnostics import retrieval_accuracy
    >>> query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> retrieval_accuracy(query, query.flip(0), k=[1, 2]).query_to_key.tolist()
    [0.0, 1.0]
    """
    check_pair("query", query, "key", key, same_rows=True, may_be_empty=_may_be_empty(group))
    for size in k:
        check_count("k", size)
    if ids is not None:
        check_row_vector("ids", ids, query, integer=True)
    if normalize:
        query, key = normalize_rows(query), normalize_rows(key)
    tags = Tags(ids=ids)
    sizes = torch.tensor(list(k), device=query.device)
    call = f"function=retrieval_accuracy\nk={list(k)}\nids={ids is not None}\nnormalize={normalize}"
    accuracies = []
    for a, b in ((query, key), (key, query)):
        (rivals,) = panel_rows(
            _no_worse_negatives, a, b, tags=tags, key_tags=tags, group=group, call=call, backend="tiled"
        )
        accuracies.append(_mean((rivals[:, None] < sizes).to(rivals.dtype), group))
    return RetrievalAccuracy(*accuracies)


def _may_be_empty(group: ProcessGroup | None) -> bool:
    """Whether this rank's share may be: with a group, which is checked."""
    if group is not None:
        check_group("group", group)
    return group is not None


def _mean(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """The mean over the rows of all ranks."""
    return over_ranks(rows.sum(dim=0), "sum", group) / over_ranks(rows.new_full((), len(rows)), "sum", group)


@panel_function(outputs=1)
def _entropies(panel: Panel):
    log_p = panel.s.log_softmax(dim=1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=1)

    def pull_back(incoming: Outputs) -> Slopes:
        return Slopes((log_p + entropy[:, None]).mul_(p).mul_(-incoming[0][:, None]))

    return (entropy,), pull_back


def softmax_entropy(
    query: Tensor,
    key: Tensor,
    tau: float | Tensor,
    *,
    normalize: bool = True,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""The entropy of each query's softmax over the keys, in nats: from 0 to log M.

    .. math:: H_i = -\sum_j p_{ij} \log p_{ij}, \qquad p_{ij} = \text{softmax}_j(\langle q_i, k_j\rangle / \tau)

    Args:
        query, key: [N, D] and [M, D].
        tau: the temperature, a positive float or a 0-d tensor.
        normalize: scale each row to unit length first.
        group: a torch.distributed process group: the rows are those of all its ranks, which may differ in number, or be
            none; the softmax is over the keys of all of them.

    Returns:
        [N] of this rank's queries, differentiable.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: N * M * D multiply-adds, 3 more for gradients; O(N + M) memory, and a panel.

    >>> import torch
    >>> from fastcl.diagnostics import softmax_entropy
    >>> softmax_entropy(torch.ones(1, 2), torch.ones(4, 2), 0.1).exp().round().tolist()  # as if among 4 keys
    [4.0]
    """
    check_pair("query", query, "key", key, same_rows=False, may_be_empty=_may_be_empty(group))
    check_scalar("tau", tau, positive=True)
    if normalize:
        query, key = normalize_rows(query), normalize_rows(key)
    call = f"function=softmax_entropy\nnormalize={normalize}"
    return panel_rows(_entropies, query, key, scale=inverse(tau, query), group=group, call=call, backend="tiled")[0]


def hardest_negative(
    query: Tensor,
    key: Tensor,
    *,
    normalize: bool = True,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""The largest similarity of each query to another row's key, :math:`\max_{j \ne i} \langle q_i, k_j\rangle`.

    Args:
        query, key: [N, D] and [M, D]; key i is query i's own.
        normalize: scale each row to unit length first.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the rows are those of all its ranks, which may differ in number, or be
            none; the negatives are the keys of all of them. Each rank needs as many queries as keys then.

    Returns:
        [N] of this rank's queries, without gradient; -inf where there is no other key.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: N * M * D multiply-adds, O(N + M) memory.

    >>> import torch
    >>> from fastcl.diagnostics import hardest_negative
    >>> hardest_negative(torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])).tolist()
    [0.6000000238418579, 0.0]
    """
    # Over ranks a query and its own key must have the same place in the union.
    check_pair("query", query, "key", key, same_rows=group is not None, may_be_empty=_may_be_empty(group))
    if normalize:
        query, key = normalize_rows(query), normalize_rows(key)
    terms = [Term(Reduce.MAX, Mask(self_pair=False))]
    with torch.no_grad():
        return pairwise(query, key, terms, backend=backend, group=group, call="function=hardest_negative")[0]


class MutualInformation(NamedTuple):
    """In nats: what InfoNCE says of the mutual information of the views, and what it can say at most."""

    lower_bound: Tensor | float
    ceiling: float


def mutual_information(loss: Tensor | float, candidates: int) -> MutualInformation:
    r"""InfoNCE's lower bound of the mutual information between the views, :math:`I \ge \log N - \ell`.

    The bound can't exceed :math:`\log N`: near this ceiling it says that there are too few negatives to tell.

    Args:
        loss: the mean InfoNCE loss, in nats; over many ranks that of their union (``group=`` of the loss).
        candidates: N, the keys that a query chooses among, of all ranks: its own and the negatives; 2B - 1 for NT-Xent.

    Raises:
        ValueError: ``candidates`` is no positive integer.

    Source: van den Oord, Li and Vinyals, Contrastive Predictive Coding, 2018 (arXiv:1807.03748); Poole et al., On
    Variational Bounds of Mutual Information, 2019 (arXiv:1905.06922).

    >>> from fastcl.diagnostics import mutual_information
    >>> [round(x, 4) for x in mutual_information(1.0, 256)]
    [4.5452, 5.5452]
    """
    check_count("candidates", candidates)
    ceiling = math.log(candidates)
    return MutualInformation(ceiling - loss, ceiling)


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, group: ProcessGroup | None = None) -> Tensor:
    r"""How far the two views of an example are apart, :math:`\frac{1}{N} \sum_i \lVert x_i - y_i\rVert^\alpha`.

    Args:
        x, y: [N, D]; rows are scaled to unit length first.
        alpha: the exponent.
        group: a torch.distributed process group: the rows are those of all its ranks, which may differ in number, or be
            none; the mean is over all of them.

    Returns:
        A 0-d tensor, differentiable; the smaller, the better aligned.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Source: Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere, 2020 (arXiv:2005.10242).

    >>> import torch
    >>> from fastcl.diagnostics import alignment
    >>> round(alignment(torch.eye(2), torch.eye(2).flip(0)).item(), 4)
    2.0
    """
    check_pair("x", x, "y", y, same_rows=True, may_be_empty=_may_be_empty(group))
    check_scalar("alpha", alpha, positive=True)
    dtype = accumulation_dtype(x.dtype)
    squared = (normalize_rows(x.to(dtype)) - normalize_rows(y.to(dtype))).square().sum(dim=1)
    # Equal views have no slope, rather than the NaN of a root at 0.
    apart = squared > 0
    powers = squared.where(apart, squared.new_ones(())).pow(alpha / 2).where(apart, squared.new_zeros(()))
    return _mean(powers, group)


def uniformity(z: Tensor, *, t: float = 2.0, backend: str | None = None, group: ProcessGroup | None = None) -> Tensor:
    r"""How evenly the rows cover the sphere, the logarithm of their mean Gaussian potential.

    .. math:: \log \frac{1}{N (N - 1)} \sum_{i \ne j} e^{-t \lVert z_i - z_j\rVert^2}

    Args:
        z: [N, D], at least two rows; they are scaled to unit length first.
        t: the sharpness of the potential.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the rows are those of all its ranks, which may differ in number, or be
            none; the pairs are those of the union, which has at least two rows.

    Returns:
        A 0-d tensor, differentiable; the smaller, the more uniform. At most 0.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: N^2 * D / 2 multiply-adds, 3 / 2 for gradients; O(N) memory. The potential of unit vectors is
    :math:`e^{2t \langle z_i, z_j\rangle - 2t}`, so that it is a log-sum-exp of :func:`fastcl.pairwise`.

    Source: Wang and Isola, 2020 (arXiv:2005.10242).

    >>> import torch
    >>> from fastcl.diagnostics import uniformity
    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item(), 4)  # -2 * 2^2
    -8.0
    """
    check_matrix("z", z, may_be_empty=_may_be_empty(group))
    check_scalar("t", t, positive=True)
    if group is None and z.shape[0] < 2:
        raise ValueError(f"z must have at least 2 rows to be apart, got shape {tuple(z.shape)}")
    (rows,) = pairwise(
        normalize_rows(z),
        None,
        [Term(Reduce.LSE, Mask(self_pair=False))],
        2 * t,
        norm_bound=1.0,
        backend=backend,
        group=group,
        call="function=uniformity",
    )
    largest = over_ranks(torch.cat((rows.detach(), rows.new_full((1,), -math.inf))).amax(), "max", group)
    total = over_ranks((rows - largest).exp().sum(), "sum", group)
    count = over_ranks(rows.new_full((), len(rows)), "sum", group)
    return total.log() + largest - (count * (count - 1)).log() - 2 * t


class SurrogateBounds(NamedTuple):
    """What the contrastive loss says of the downstream loss of the mean classifier."""

    lower: Tensor | float
    upper: Tensor | float


def surrogate_bounds(
    loss: Tensor | float,
    negatives: int,
    classes: int,
    *,
    priors: Sequence[float] | None = None,
    norm: float = 1.0,
) -> SurrogateBounds:
    r"""Bounds of the downstream classification loss, given the contrastive loss and the number of negatives.

    The downstream loss is the cross entropy of the mean classifier, whose logits are the inner products with the
    classes' mean features. With K negatives, C classes of priors :math:`\pi` and features of norm at most b,

    .. math::
        R_\text{cont} + \Delta_L \le R_{\mu\text{-supv}} \le R_\text{cont} + \Delta_U, \qquad
        \Delta_U = \log \frac{\pi_\text{max}\, C^2 \cosh^2(b^2)}{K}, \qquad
        \Delta_L = H(\pi) + \log \frac{K}{(K + 1)^2} - 2 \log \cosh(b^2)

    The contrastive loss grows as log K and the constants fall as fast. What is left between the two bounds is, for
    equal priors, :math:`2 \log(1 + 1/K) + 4 \log \cosh(b^2)`: more negatives bring them closer, quickly at first.

    The setting is the paper's: a positive is another example of the anchor's class, negatives come from all classes
    (the anchor's, too), and the logits are inner products. A temperature belongs to the features:
    ``norm=tau**-0.5`` for unit vectors.

    Args:
        loss: the mean contrastive loss, in nats, with K negatives for each anchor.
        negatives: K.
        classes: C, at least 2.
        priors: of the classes, C numbers that sum to 1; None for equal ones.
        norm: b.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Source: Bao, Nagano and Nozawa, On the Surrogate Gap between Contrastive and Supervised Losses, ICML 2022
    (arXiv:2110.02501), theorem 3 (upper bound) and theorem 4 (lower bound).

    >>> from fastcl.diagnostics import surrogate_bounds
    >>> [round(x, 4) for x in surrogate_bounds(2.0, negatives=64, classes=10)]
    [-0.7549, 1.0113]
    """
    check_count("negatives", negatives)
    check_count("classes", classes)
    check_scalar("norm", norm, positive=True)
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    priors = [1 / classes] * classes if priors is None else [float(p) for p in priors]
    if len(priors) != classes or min(priors) < 0 or abs(sum(priors) - 1) > 1e-6:
        raise ValueError(f"priors must be {classes} numbers of at least 0 that sum to 1, got {priors}")
    entropy = -sum(p * math.log(p) for p in priors if p > 0)
    spread = 2 * (norm**2 + math.log1p(math.exp(-2 * norm**2)) - math.log(2))
    """2 log cosh(b^2)"""
    upper = math.log(max(priors) * classes**2 / negatives) + spread
    lower = entropy + math.log(negatives) - 2 * math.log1p(negatives) - spread
    return SurrogateBounds(loss + lower, loss + upper)
