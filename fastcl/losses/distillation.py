"""Soft-target CLIP: a student whose softmax over the batch follows its teacher's.

May import :mod:`fastcl.losses.common` and the panels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl.checks import check_pair, check_scalar
from fastcl.losses.common import LossStats, Run, check_tags, check_weight, normalize_rows, stats_of_pairs
from fastcl.pairwise import scalar_tensor
from fastcl.panels import Outputs, Panel, Slopes, panel_function
from fastcl.terms import Tags, accumulation_dtype


@panel_function(outputs=1, kernel="soft_targets")
def soft_target_rows(panel: Panel):
    """The cross entropy of each row's softmax with the guide's as target; duplicates are candidates of neither."""
    guide, logits = panel.guide, panel.s
    if panel.tags.ids is not None:
        dropped = (panel.tags.ids[:, None] == panel.key_tags.ids) & ~panel.self_pair
        guide, logits = (x.masked_fill(dropped, -torch.inf) for x in (guide, logits))
    target = guide.softmax(dim=1)
    lse = logits.logsumexp(dim=1)

    def pull_back(incoming: Outputs) -> Slopes:
        slope = (logits - lse[:, None]).exp_().sub_(target)
        return Slopes(slope.mul_(incoming[0][:, None]))

    return ((target * (lse[:, None] - panel.s)).sum(dim=1),), pull_back


def clip_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: float | Tensor,
    *,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""The cross entropy of the student's distributions over images and texts, with the teacher's as targets.

    With :math:`S_{ij} = \text{scale}\,\langle x_i, y_j\rangle` over B pairs, T likewise of the teacher's features, and
    the candidates :math:`C_i`, which are all j, or with ``ids`` i itself and all j of another id,

    .. math:: \ell_i = -\tfrac12 \sum_{j \in C_i} \left(
              \frac{e^{T_{ij}}}{\sum_{k \in C_i} e^{T_{ik}}} \log \frac{e^{S_{ij}}}{\sum_{k \in C_i} e^{S_{ik}}} +
              \frac{e^{T_{ji}}}{\sum_{k \in C_i} e^{T_{ki}}} \log \frac{e^{S_{ji}}}{\sum_{k \in C_i} e^{S_{ki}}}
              \right)

    There are no ``labels``: the teacher's softmax says already how far each pair is a positive. The mean equals the
    ``distill_loss`` of open_clip's ``DistillClipLoss`` on one rank; its ``contrastive_loss`` is
    :func:`fastcl.clip_loss`. The teacher gets no gradient, and the loss is never below the entropy of its softmax.

    Args:
        image_features, text_features: [B, D], in one dtype (float64, float32, bfloat16, float16) and on one device.
        logit_scale: 1 / temperature, a positive float or a 0-d tensor, which may require grad.
        teacher_image_features, teacher_text_features: [B, E], in one dtype and on the student's device.
        teacher_logit_scale: the teacher's, a positive float or a 0-d tensor.
        ids: integers [B]: other pairs of an equal id (duplicates) are left out of both softmaxes, the student's and the
            teacher's.
        weight: [B], a constant factor of a pair's loss. The mean still divides by B.
        normalize: scale each row of all four to unit length first.
        reduction: "mean", "sum", or "none" for [B].
        return_stats: also return a :class:`fastcl.LossStats` of the student, from a sweep of its own.
        backend: insist on one of :func:`fastcl.list_backends`.
        group: a torch.distributed process group: the batch is then the union of its ranks' batches, which may differ in
            length, or be empty. The features of all ranks are gathered.

    Returns:
        The loss in float32 (float64 for float64 features). With a ``group``, "mean" and "sum" are over the pairs of all
        ranks; after the usual mean of gradients over ranks, all gradients are those of the loss of the union.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: 8 * B^2 * D + 4 * B^2 * E multiply-adds for value and gradients, in two sweeps for each direction (by
    "tiled" in one: 6 * B^2 * D + 2 * B^2 * E); twice as many sweeps for "none", and B^2 * D more for ``return_stats``;
    O(B) memory beyond features and gradients.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (arXiv:1503.02531); for CLIP: Wu et al.,
    TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance, 2023 (arXiv:2309.12314).

    >>> import torch, fastcl
    >>> x = torch.eye(3, 8)
    >>> round(fastcl.clip_distillation_loss(x, x, 1.0, x, x, 50.0).item(), 4)  # a teacher who is sure: log(1 + 2 / e)
    0.5514
    """
    check_scalar("logit_scale", logit_scale, positive=True)
    check_scalar("teacher_logit_scale", teacher_logit_scale, positive=True)
    may_be_empty = group is not None
    names = ("image_features", "text_features")
    check_pair(names[0], image_features, names[1], text_features, same_rows=True, may_be_empty=may_be_empty)
    names = ("teacher_image_features", "teacher_text_features")
    teachers = (teacher_image_features, teacher_text_features)
    check_pair(names[0], teachers[0], names[1], teachers[1], same_rows=True, may_be_empty=may_be_empty)
    for name, x in zip(names, teachers, strict=True):
        if (len(x), x.device) != (len(image_features), image_features.device):
            raise ValueError(
                f"{name} must have a row for each of the student's {len(image_features)}, on {image_features.device}, "
                f"got {len(x)} on {x.device}"
            )
    check_tags(image_features, ids=ids)
    check_weight(weight, image_features)
    run = Run.checked(
        reduction, backend, group, "auto", loss="clip_distillation_loss", normalize=normalize, ids=ids is not None,
        return_stats=return_stats,
    )  # fmt: skip
    students = (image_features, text_features)
    if normalize:
        students, teachers = ([normalize_rows(x) for x in pair] for pair in (students, teachers))
    scale = scalar_tensor(teacher_logit_scale, accumulation_dtype(image_features.dtype), image_features.device)
    tags = Tags(ids=ids)
    losses = [
        run.panels(
            soft_target_rows,
            students[k],
            students[1 - k],
            weight,
            scale=logit_scale,
            tags=tags,
            key_tags=tags,
            guide=(teachers[k], teachers[1 - k], scale),
        )
        for k in range(2)
    ]
    loss = 0.5 * (losses[0] + losses[1])
    return (loss, stats_of_pairs(run, *students, logit_scale, ids=ids)) if return_stats else loss


def reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: float | Tensor,
    *,
    ids: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """The textbook formula with the whole similarity matrices: the loss of each pair, [B]."""
    features = (image_features, text_features, teacher_image_features, teacher_text_features)
    if normalize:
        features = tuple(torch.nn.functional.normalize(x, dim=1) for x in features)
    student = logit_scale * features[0] @ features[1].T
    teacher = (teacher_logit_scale * features[2] @ features[3].T).detach()
    if ids is not None:
        dropped = (ids[:, None] == ids).fill_diagonal_(False)
        # As far below the others as makes e^S zero, for whose product with log e^S -inf is no use.
        student, teacher = (x.masked_fill(dropped, -1e4) for x in (student, teacher))
    rows, columns = (-(teacher.softmax(dim) * student.log_softmax(dim)).sum(dim) for dim in (1, 0))
    return 0.5 * (rows + columns)
