"""Losses of the same field that compare no pair with another: BYOL and SimSiam, SwAV, Barlow Twins, Sentence-BERT.

Plain PyTorch, each a textbook formula of N rows: nothing here has an N x M matrix, so nothing needs the engine. May
import :mod:`fastcl.checks` and :mod:`fastcl.losses.common`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fastcl.checks import check_choice, check_count, check_group, check_matrix, check_pair, check_scalar, check_target
from fastcl.losses.common import REDUCTIONS, over_ranks
from fastcl.terms import accumulation_dtype


def negative_cosine_similarity(p: Tensor, z: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""How far predictions are from their targets, in angle: the loss of SimSiam and, up to a constant, of BYOL.

    .. math:: \ell_i = -\frac{\langle p_i, z_i\rangle}{\lVert p_i\rVert\,\lVert z_i\rVert}

    Nothing is detached inside. SimSiam stops the gradient of its targets, ``0.5 * (f(p1, z2.detach()) + f(p2,
    z1.detach()))``; without that the encoder collapses. BYOL's targets come from a
    :class:`fastcl.memory.MomentumEncoder`, which gives them without a gradient, and its loss is :math:`2 + 2\ell`,
    summed over both directions.

    Args:
        p: the predictor's outputs [B, D], float64, float32, bfloat16 or float16.
        z: the targets, of the same shape, dtype and device.
        reduction: "mean", "sum", or "none" for [B].

    Returns:
        The loss in float32 (float64 for float64 inputs), from -1 to 1. A row of zeros has similarity 0.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: O(B * D).

    Source: Grill et al., Bootstrap Your Own Latent, 2020 (arXiv:2006.07733); Chen and He, Exploring Simple Siamese
    Representation Learning, 2021 (arXiv:2011.10566). The mean equals lightly's ``NegativeCosineSimilarity``.

    >>> import torch, fastcl
    >>> p, z = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> fastcl.negative_cosine_similarity(p, z, reduction="none").tolist()
    [-1.0, -0.0]
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_pair("p", p, "z", z, same_rows=True)
    return _reduced(-_cosine(p, z), reduction)


@torch.no_grad()
def sinkhorn(
    scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3, group: ProcessGroup | None = None
) -> Tensor:
    r"""Soft assignments of a batch to prototypes that use all prototypes equally often.

    The assignments :math:`Q \propto \exp(\text{scores} / \epsilon)` are scaled in turn until each prototype has the
    same share of the batch, and each row sums to 1 (in this order: after the last iteration only the second is exact).
    Computed on logarithms, so that no score overflows and no prototype is divided by zero.

    Args:
        scores: [B, K], the similarity of each row to each prototype.
        epsilon: the smaller, the harder the assignments.
        iterations: at least 1.
        group: a torch.distributed process group: the batch is then the union of its ranks' rows.

    Returns:
        [B, K] in float32 (float64 for float64 scores), without a gradient.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: O(iterations * B * K); with a group, two reductions of K numbers an iteration.

    Source: Cuturi, Sinkhorn Distances, 2013 (arXiv:1306.0895), as used by Caron et al., 2020 (arXiv:2006.09882).

    >>> import torch, fastcl
    >>> fastcl.sinkhorn(torch.tensor([[2.0, 1.0], [2.0, 0.0]]), epsilon=0.5, iterations=20)  # both prefer the first
    tensor([[0.2689, 0.7311],
            [0.7311, 0.2689]])
    """
    check_matrix("scores", scores, may_be_empty=group is not None)
    check_scalar("epsilon", epsilon, positive=True)
    check_count("iterations", iterations)
    if group is not None:
        check_group("group", group)
    log_q = scores.to(accumulation_dtype(scores.dtype)) / epsilon
    for _ in range(iterations):
        lowest = log_q.new_full((1, log_q.shape[1]), torch.finfo(log_q.dtype).min)
        largest = over_ranks(torch.cat((log_q, lowest)).amax(dim=0), "max", group)
        log_q = log_q - largest - over_ranks((log_q - largest).exp().sum(dim=0), "sum", group).log()
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp()


def swav_loss(
    high_resolution_outputs: Sequence[Tensor],
    low_resolution_outputs: Sequence[Tensor] = (),
    queue_outputs: Sequence[Tensor] | None = None,
    *,
    tau: float | Tensor,
    sinkhorn_epsilon: float = 0.05,
    sinkhorn_iterations: int = 3,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""The swapped prediction of SwAV: each view predicts to which prototypes the other views are assigned.

    With scores :math:`s_v` of view v, [B, K], and assignments :math:`q_u` = :func:`sinkhorn` of the scores of the
    high-resolution view u (without gradient), U of which are among all V views,

    .. math:: \ell = -\frac1U \sum_u \frac{1}{V - 1} \sum_{v \ne u} \frac1B \sum_{i,k}
              q_{u,ik} \log \text{softmax}_k(s_{v,i} / \tau)

    Args:
        high_resolution_outputs: scores [B, K] of each high-resolution view: unit-length features times unit-length
            prototypes. One dtype and device; there must be 2 views in all.
        low_resolution_outputs: scores [B, K] of each low-resolution view, which is predicted from but not assigned.
        queue_outputs: for each high-resolution view, scores [Q, K] of features of earlier batches (such as those of a
            :class:`fastcl.memory.Queue`), which take part in the assignment only.
        tau: the temperature of the predictions, a positive float or a 0-d tensor; SwAV's is 0.1.
        sinkhorn_epsilon, sinkhorn_iterations: see :func:`sinkhorn`.
        group: a torch.distributed process group: assignments and the mean are those of the union of its ranks' batches,
            and after the usual mean of gradients over ranks, so are all gradients.

    Returns:
        The loss in float32 (float64 for float64 scores), 0-d.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: O(U * V * B * K).

    Source: Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, 2020
    (arXiv:2006.09882). Equals lightly's ``SwaVLoss``, with a group its ``sinkhorn_gather_distributed`` (whose loss is
    then each rank's own mean).

    >>> import torch, fastcl
    >>> scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(fastcl.swav_loss([scores, scores], tau=1.0).item(), 4)  # log(1 + 1 / e)
    0.3133
    """
    check_scalar("tau", tau, positive=True)
    views = [*high_resolution_outputs, *low_resolution_outputs]
    if not len(high_resolution_outputs) or len(views) < 2:
        raise ValueError(
            "high_resolution_outputs and low_resolution_outputs must be at least 2 views, one of them of high "
            f"resolution, got {len(high_resolution_outputs)} and {len(low_resolution_outputs)}"
        )
    may_be_empty = group is not None
    for name, outputs in (("high", high_resolution_outputs), ("low", low_resolution_outputs)):
        for i, output in enumerate(outputs):
            check_pair(
                f"{name}_resolution_outputs[{i}]",
                output,
                "high_resolution_outputs[0]",
                views[0],
                same_rows=True,
                may_be_empty=may_be_empty,
            )
    queues = [views[0][:0]] * len(high_resolution_outputs) if queue_outputs is None else queue_outputs
    if len(queues) != len(high_resolution_outputs):
        raise ValueError(
            f"queue_outputs must be one for each of {len(high_resolution_outputs)} high-resolution views, "
            f"got {len(queues)}"
        )
    for i, queue in enumerate(queues):
        check_pair(
            f"queue_outputs[{i}]", queue, "high_resolution_outputs[0]", views[0], same_rows=False, may_be_empty=True
        )

    dtype, rows = accumulation_dtype(views[0].dtype), len(views[0])
    log_p = [(view.to(dtype) / tau).log_softmax(dim=1) for view in views]
    total = log_p[0].new_zeros(())
    for u, (view, queue) in enumerate(zip(high_resolution_outputs, queues, strict=True)):
        q = sinkhorn(torch.cat((view, queue)), epsilon=sinkhorn_epsilon, iterations=sinkhorn_iterations, group=group)[
            :rows
        ]
        total = total - (q * sum(log_p[v] for v in range(len(views)) if v != u)).sum()
    total, count = over_ranks(torch.stack((total, total.new_full((), rows))), "sum", group).unbind()
    return total / count / (len(views) - 1) / len(high_resolution_outputs)


def barlow_twins_loss(
    z_a: Tensor, z_b: Tensor, *, lambda_param: float = 5e-3, group: ProcessGroup | None = None
) -> Tensor:
    r"""Features of two views should agree with themselves and with no other feature.

    With the columns of :math:`z_a` and :math:`z_b` brought to mean 0 and variance 1 over the batch (plus 1e-5, as
    BatchNorm does), and their cross-correlation :math:`C = z_a^\top z_b / B`,

    .. math:: \ell = \sum_d (1 - C_{dd})^2 + \lambda \sum_d \sum_{e \ne d} C_{de}^2

    Args:
        z_a, z_b: the views [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device; B must be at
            least 2.
        lambda_param: the weight of the second sum.
        group: a torch.distributed process group: mean, variance and cross-correlation are those of the union of its
            ranks' batches, which may differ in length; after the usual mean of gradients over ranks, so are all
            gradients.

    Returns:
        The loss in float32 (float64 for float64 inputs), 0-d. A feature that is constant over the batch correlates with
        nothing.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: O(B * D^2) time, O(D^2) memory.

    Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021 (arXiv:2103.03230).
    Equals lightly's ``BarlowTwinsLoss`` on one rank. With ``gather_distributed`` lightly normalises each rank's batch
    by itself; here, and in the paper's code with its synchronised BatchNorm, the whole batch is.

    >>> import torch, fastcl
    >>> z = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    >>> round(fastcl.barlow_twins_loss(z, z).item(), 4), round(fastcl.barlow_twins_loss(z, -z).item(), 4)
    (0.0, 7.9999)
    """
    check_scalar("lambda_param", lambda_param, positive=False)
    check_pair("z_a", z_a, "z_b", z_b, same_rows=True, may_be_empty=group is not None)
    if group is not None:
        check_group("group", group)
    elif len(z_a) < 2:
        raise ValueError(f"z_a and z_b must have at least 2 rows to vary, got shape {tuple(z_a.shape)}")
    dim, dtype = z_a.shape[1], accumulation_dtype(z_a.dtype)
    z = torch.cat((z_a, z_b), dim=1).to(dtype)
    # The sum of squares and products is stationary in the mean: no gradient flows through it.
    sums = torch.cat((z.detach().sum(dim=0), z.new_full((1,), len(z))))
    total, count = over_ranks(sums, "sum", group).split((2 * dim, 1))
    z = z - total / count
    a, b = z.split(dim, dim=1)
    products = over_ranks(torch.cat((z.square().sum(dim=0).view(2, dim), a.T @ b)), "sum", group) / count
    variance, correlation = products.split((2, dim))
    inverse = (variance + 1e-5).rsqrt()
    correlation = correlation * inverse[0, :, None] * inverse[1]
    diagonal = correlation.diagonal()
    off_diagonal = correlation - torch.diag(diagonal)
    return (1 - diagonal).square().sum() + lambda_param * off_diagonal.square().sum()


def softmax_classification_loss(
    u: Tensor,
    v: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    concatenation_sent_rep: bool = True,
    concatenation_sent_difference: bool = True,
    concatenation_sent_multiplication: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""Sentence-BERT's classification objective: which relation holds between two sentences.

    .. math:: \ell_i = -\log \text{softmax}(W\,[u_i, v_i, \lvert u_i - v_i\rvert] + b)_{y_i}

    Args:
        u, v: the sentences' embeddings [B, D], in one dtype and on one device.
        labels: int64 [B], the class of each pair.
        weight: of the classifier, [C, F] in the embeddings' dtype, with F = D for each of the vectors concatenated.
        bias: [C].
        concatenation_sent_rep, concatenation_sent_difference, concatenation_sent_multiplication: whether (u, v),
            \|u - v| and u * v are among them, in this order; F is 3 * D by default.
        reduction: "mean", "sum", or "none" for [B].

    Returns:
        The loss, in the embeddings' dtype.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: O(B * C * F).

    Source: Reimers and Gurevych, Sentence-BERT, 2019 (arXiv:1908.10084). Equals sentence-transformers' ``SoftmaxLoss``.

    >>> import torch, fastcl
    >>> u, v, labels = torch.eye(2), torch.ones(2, 2), torch.tensor([0, 2])
    >>> round(fastcl.softmax_classification_loss(u, v, labels, weight=torch.zeros(3, 6)).item(), 4)  # log(3)
    1.0986
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_pair("u", u, "v", v, same_rows=True)
    vectors = [u, v] if concatenation_sent_rep else []
    vectors += [(u - v).abs()] if concatenation_sent_difference else []
    vectors += [u * v] if concatenation_sent_multiplication else []
    if not vectors:
        raise ValueError("concatenation_sent_rep, _difference and _multiplication must not all be false")
    check_matrix("weight", weight)
    if weight.shape[1] != len(vectors) * u.shape[1]:
        raise ValueError(
            f"weight must have shape [classes, {len(vectors) * u.shape[1]}], {len(vectors)} vectors of "
            f"{u.shape[1]}, got {tuple(weight.shape)}"
        )
    if weight.dtype != u.dtype or weight.device != u.device:
        raise ValueError(f"weight must be {u.dtype} on {u.device} like u, got {weight.dtype} on {weight.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), one for each class, got {tuple(bias.shape)}")
    check_target("labels", labels, u, weight.shape[0])
    return F.cross_entropy(F.linear(torch.cat(vectors, dim=1), weight, bias), labels.long(), reduction=reduction)


def cosine_similarity_loss(u: Tensor, v: Tensor, scores: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Sentence-BERT's regression objective: the cosine of two sentences should be their annotated similarity.

    .. math:: \ell_i = (\cos(u_i, v_i) - y_i)^2

    Args:
        u, v: the sentences' embeddings [B, D], in one dtype and on one device.
        scores: [B], a floating-point tensor, each from -1 to 1.
        reduction: "mean", "sum", or "none" for [B].

    Returns:
        The loss in float32 (float64 for float64 embeddings).

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: O(B * D).

    Source: Reimers and Gurevych, Sentence-BERT, 2019 (arXiv:1908.10084). Equals sentence-transformers'
    ``CosineSimilarityLoss``.

    >>> import torch, fastcl
    >>> u = torch.eye(2)
    >>> fastcl.cosine_similarity_loss(u, u, torch.tensor([1.0, 0.5])).item()
    0.125
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_pair("u", u, "v", v, same_rows=True)
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(
            f"scores must be a floating-point tensor, got {getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if scores.shape != u.shape[:1] or scores.device != u.device:
        raise ValueError(
            f"scores must have shape ({u.shape[0]},) on {u.device}, one for each pair, got {tuple(scores.shape)} on "
            f"{scores.device}"
        )
    cosine = _cosine(u, v)
    return _reduced((cosine - scores.to(cosine.dtype)).square(), reduction)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    return F.cosine_similarity(x.to(dtype), y.to(dtype), dim=1)


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
