"""The losses as modules, with the names and arguments that lightly, pytorch-metric-learning, open_clip and
sentence-transformers use.

May import :mod:`fastcl.losses`. A learnable temperature is stored as the logarithm of its inverse, ``logit_scale``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastcl.checks import check_scalar
from fastcl.losses.alpha_cl import alpha_cl_loss
from fastcl.losses.clip import clip_loss
from fastcl.losses.contrastive import contrastive_loss
from fastcl.losses.dcl import dcl_loss
from fastcl.losses.debiased import debiased_loss, hard_negative_loss
from fastcl.losses.distillation import clip_distillation_loss
from fastcl.losses.info_nce import PairOfTags, info_nce
from fastcl.losses.lifted_structure import lifted_structure_loss
from fastcl.losses.macl import macl_loss
from fastcl.losses.multiple_negatives import multiple_negatives_ranking_loss
from fastcl.losses.nt_xent import nt_xent
from fastcl.losses.siglip import siglip_loss
from fastcl.losses.sup_con import sup_con_loss
from fastcl.losses.triplet import triplet_loss
from fastcl.losses.without_pairs import (
    barlow_twins_loss,
    cosine_similarity_loss,
    negative_cosine_similarity,
    softmax_classification_loss,
    swav_loss,
)


def _log_scale(temperature: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(-math.log(temperature)))


def _bounded_scale(log_scale: Tensor, max_scale: float) -> Tensor:
    # The bound holds the value but passes the gradient: a plain clamp would freeze a scale that ever exceeded it.
    scale = log_scale.exp()
    return scale - (scale - scale.clamp(max=max_scale)).detach()


class _TemperatureLoss(nn.Module):
    """Holds a temperature, fixed or learnable, and the options that every call of the loss takes."""

    def __init__(
        self,
        temperature: float,
        *,
        learnable: bool = False,
        max_scale: float = 100.0,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__()
        check_scalar("temperature", temperature, positive=True)
        check_scalar("max_scale", max_scale, positive=True)
        self.max_scale = max_scale
        self.fixed_temperature = None if learnable else float(temperature)
        self.logit_scale = _log_scale(temperature) if learnable else None
        self.options = {
            "normalize": normalize,
            "reduction": reduction,
            "backend": backend,
            "group": group,
            "exchange": exchange,
        }

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use; where it is learnable, a 0-d tensor with its gradient."""
        if self.logit_scale is None:
            return self.fixed_temperature
        return 1.0 / _bounded_scale(self.logit_scale, self.max_scale)

    def extra_repr(self) -> str:
        learnable = "" if self.logit_scale is None else f", learnable=True, max_scale={self.max_scale}"
        return f"temperature={torch.as_tensor(self.temperature).item():.4g}{learnable}"


class NTXentLoss(_TemperatureLoss):
    """:func:`fastcl.nt_xent` as a module: ``NTXentLoss(0.5)(z1, z2)``.

    ``learnable=True`` trains the temperature, as the parameter ``logit_scale = log(1 / temperature)``, with 1 /
    temperature held at or below ``max_scale``.

    >>> import torch, fastcl
    >>> criterion = fastcl.nn.NTXentLoss(0.5, learnable=True)
    >>> criterion(torch.eye(4, 8), torch.eye(4, 8)).backward()
    >>> round(criterion.logit_scale.grad.item(), 3)
    -0.896
    """

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return nt_xent(z1, z2, self.temperature, labels=labels, ids=ids, weight=weight, **self.options)


class InfoNCELoss(_TemperatureLoss):
    """:func:`fastcl.info_nce` as a module: ``InfoNCELoss(0.1)(query, key, negatives=queue)``.

    ``learnable`` and ``max_scale`` are as in :class:`NTXentLoss`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        target: Tensor | None = None,
        negatives: Tensor | None = None,
        labels: PairOfTags | None = None,
        ids: PairOfTags | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return info_nce(
            query,
            key,
            self.temperature,
            target=target,
            negatives=negatives,
            labels=labels,
            ids=ids,
            weight=weight,
            **self.options,
        )


class SupConLoss(_TemperatureLoss):
    """:func:`fastcl.sup_con_loss` as a module: ``SupConLoss(0.1)(z, labels)``, z as [N, D] or as views [B, V, D].

    ``learnable`` and ``max_scale`` are as in :class:`NTXentLoss`. SupContrast's ``base_temperature`` is a constant
    factor temperature / base_temperature of the loss, 1 where both are equal, as here.
    """

    def __init__(self, temperature: float, *, form: str = "out", **options: object) -> None:
        super().__init__(temperature, **options)
        self.options["form"] = form

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return sup_con_loss(z, labels, self.temperature, ids=ids, weight=weight, **self.options)


class DCLLoss(_TemperatureLoss):
    """:func:`fastcl.dcl_loss` as a module: ``DCLLoss(0.1)(z1, z2)``.

    ``learnable`` and ``max_scale`` are as in :class:`NTXentLoss`.
    """

    def __init__(self, temperature: float = 0.1, **options: object) -> None:
        super().__init__(temperature, **options)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return dcl_loss(z1, z2, self.temperature, **self.options)


class DCLWLoss(_TemperatureLoss):
    """:func:`fastcl.dcl_loss` with weights of the positives as a module: ``DCLWLoss(0.1, sigma=0.5)(z1, z2)``."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, **options: object) -> None:
        super().__init__(temperature, **options)
        check_scalar("sigma", sigma, positive=True)
        self.sigma = sigma

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return dcl_loss(z1, z2, self.temperature, sigma=self.sigma, **self.options)


class DebiasedLoss(_TemperatureLoss):
    """:func:`fastcl.debiased_loss` as a module: ``DebiasedLoss(0.5, tau_plus=0.1)(z1, z2)``.

    ``learnable`` and ``max_scale`` are as in :class:`NTXentLoss`.
    """

    def __init__(self, temperature: float = 0.5, tau_plus: float = 0.1, **options: object) -> None:
        super().__init__(temperature, **options)
        self.tau_plus = tau_plus

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return debiased_loss(z1, z2, self.temperature, self.tau_plus, **self.options)


class HardNegativeLoss(_TemperatureLoss):
    """:func:`fastcl.hard_negative_loss` as a module: ``HardNegativeLoss(0.5, tau_plus=0.1, beta=1.0)(z1, z2)``."""

    def __init__(self, temperature: float = 0.5, tau_plus: float = 0.1, beta: float = 1.0, **options: object) -> None:
        super().__init__(temperature, **options)
        self.tau_plus, self.beta = tau_plus, beta

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return hard_negative_loss(z1, z2, self.temperature, self.tau_plus, self.beta, **self.options)


class ClipLoss(nn.Module):
    """:func:`fastcl.clip_loss` as a module, called as open_clip calls its own.

    ``forward(image_features, text_features, logit_scale, logit_bias=None, output_dict=False)``; with ``output_dict``
    the result is ``{"contrastive_loss": loss}``. Given a ``temperature``, the module owns a ``logit_scale`` parameter
    (the logarithm), trains it and needs none in the call.

    >>> import torch, fastcl
    >>> x = torch.eye(3, 8)
    >>> round(fastcl.nn.ClipLoss()(x, x, 1.0, output_dict=True)["contrastive_loss"].item(), 4)
    0.5514
    """

    def __init__(
        self,
        temperature: float | None = None,
        *,
        max_scale: float = 100.0,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__()
        if temperature is not None:
            check_scalar("temperature", temperature, positive=True)
        check_scalar("max_scale", max_scale, positive=True)
        self.max_scale = max_scale
        self.logit_scale = None if temperature is None else _log_scale(temperature)
        self.options = {
            "normalize": normalize,
            "reduction": reduction,
            "backend": backend,
            "group": group,
            "exchange": exchange,
        }

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.logit_scale is not None:
            if logit_scale is not None:
                raise ValueError(f"logit_scale must be None where ClipLoss learns its own, got {logit_scale!r}")
            logit_scale = _bounded_scale(self.logit_scale, self.max_scale)
        elif logit_scale is None:
            raise ValueError("logit_scale must be given, or learned by ClipLoss(temperature=...); got None")
        loss = clip_loss(image_features, text_features, logit_scale, logit_bias, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """:func:`fastcl.siglip_loss` as a module, called as open_clip calls its own.

    ``forward(image_features, text_features, logit_scale, logit_bias, output_dict=False)``; with ``output_dict`` the
    result is ``{"contrastive_loss": loss}``. Given a ``temperature``, the module owns and trains ``logit_scale`` (the
    logarithm) and ``logit_bias``, and needs neither in the call; SigLIP starts from 0.1 and -10.

    >>> import torch, fastcl
    >>> x = torch.eye(2, 8)
    >>> round(fastcl.nn.SigLipLoss()(x, x, 1.0, 0.0, output_dict=True)["contrastive_loss"].item(), 4)
    1.0064
    """

    def __init__(
        self,
        temperature: float | None = None,
        logit_bias: float = -10.0,
        *,
        max_scale: float = 100.0,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_scalar("max_scale", max_scale, positive=True)
        self.max_scale = max_scale
        self.logit_scale = self.logit_bias = None
        if temperature is not None:
            check_scalar("temperature", temperature, positive=True)
            self.logit_scale, self.logit_bias = _log_scale(temperature), nn.Parameter(torch.tensor(float(logit_bias)))
        self.options = {"normalize": normalize, "reduction": reduction, "backend": backend, "group": group}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.logit_scale is not None:
            if logit_scale is not None or logit_bias is not None:
                raise ValueError(
                    f"logit_scale and logit_bias must be None where SigLipLoss learns its own, got {logit_scale!r} and "
                    f"{logit_bias!r}"
                )
            logit_scale, logit_bias = _bounded_scale(self.logit_scale, self.max_scale), self.logit_bias
        elif logit_scale is None or logit_bias is None:
            raise ValueError(
                f"logit_scale and logit_bias must be given, or learned by SigLipLoss(temperature=...); got "
                f"{logit_scale!r} and {logit_bias!r}"
            )
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss


class ContrastiveLoss(nn.Module):
    """:func:`fastcl.contrastive_loss` as a module: ``ContrastiveLoss(pos_margin=0, neg_margin=1)(embeddings, labels)``.

    ``options`` are those of the function, such as ``distance`` and ``normalize``.
    """

    def __init__(self, pos_margin: float = 0.0, neg_margin: float = 1.0, **options: object) -> None:
        super().__init__()
        self.options = {"pos_margin": pos_margin, "neg_margin": neg_margin, **options}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return contrastive_loss(embeddings, labels, **self.options)


class TripletMarginLoss(nn.Module):
    """:func:`fastcl.triplet_loss` as a module: ``TripletMarginLoss(margin=0.05)(embeddings, labels)``.

    ``mining`` stands for the miner, and the other ``options`` are those of the function.
    """

    def __init__(
        self, margin: float = 0.05, smooth_loss: bool = False, *, mining: str = "all", **options: object
    ) -> None:
        super().__init__()
        self.options = {"margin": margin, "smooth_loss": smooth_loss, "mining": mining, **options}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return triplet_loss(embeddings, labels, **self.options)


class LiftedStructureLoss(nn.Module):
    """:func:`fastcl.lifted_structure_loss` as a module: ``LiftedStructureLoss(neg_margin=1, pos_margin=0)``.

    ``options`` are those of the function, such as ``distance`` and ``normalize``.
    """

    def __init__(self, neg_margin: float = 1.0, pos_margin: float = 0.0, **options: object) -> None:
        super().__init__()
        self.options = {"neg_margin": neg_margin, "pos_margin": pos_margin, **options}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return lifted_structure_loss(embeddings, labels, **self.options)


class AlphaCLLoss(nn.Module):
    """:func:`fastcl.alpha_cl_loss` as a module: ``AlphaCLLoss(0.5, importance="power", power=4.0)(z1, z2)``."""

    def __init__(
        self,
        temperature: float = 0.5,
        importance: str = "softmax",
        power: float = 4.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "tau": temperature,
            "importance": importance,
            "power": power,
            "normalize": normalize,
            "reduction": reduction,
            "group": group,
        }

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return alpha_cl_loss(z1, z2, **self.options)


class MACLLoss(nn.Module):
    """:func:`fastcl.macl_loss` as a module, with lightly's arguments: ``MACLLoss(0.1, alpha=0.5, A_0=0.0)(z1, z2)``."""

    def __init__(
        self,
        temperature: float = 0.1,
        alpha: float = 0.5,
        A_0: float = 0.0,  # noqa: N803  lightly's name
        *,
        reduction: str = "mean",
        backend: str | None = None,
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__()
        self.options = {
            "tau": temperature,
            "alpha": alpha,
            "initial_alignment": A_0,
            "reduction": reduction,
            "backend": backend,
            "group": group,
            "exchange": exchange,
        }

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return macl_loss(z1, z2, **self.options)


class DistillClipLoss(nn.Module):
    """:func:`fastcl.clip_loss` and :func:`fastcl.clip_distillation_loss` as a module, called as open_clip's own.

    The result is the tuple ``(contrastive_loss, distill_loss)``, or with ``output_dict`` a dictionary of both.

    >>> import torch, fastcl
    >>> x = torch.eye(3, 8)
    >>> [round(loss.item(), 4) for loss in fastcl.nn.DistillClipLoss()(x, x, 1.0, x, x, 50.0)]
    [0.5514, 0.5514]
    """

    def __init__(self, *, normalize: bool = False, reduction: str = "mean", group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.options = {"normalize": normalize, "reduction": reduction, "group": group}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        student, teacher = (image_features, text_features, logit_scale), (dist_image_features, dist_text_features)
        contrastive = clip_loss(*student, **self.options)
        distilled = clip_distillation_loss(*student, *teacher, dist_logit_scale, **self.options)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distilled}
        return contrastive, distilled


class MultipleNegativesRankingLoss(nn.Module):
    """:func:`fastcl.multiple_negatives_ranking_loss` as a module, with sentence-transformers' arguments.

    The embeddings come in place of a model and its texts: ``criterion(query, document, negatives=(first, second))``.
    ``group`` stands for its ``gather_across_devices``, ``normalize`` for its ``similarity_fct``.
    """

    def __init__(
        self,
        scale: float = 20.0,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__()
        check_scalar("scale", scale, positive=True)
        self.options = {
            "tau": 1.0 / scale,
            "directions": directions,
            "partition_mode": partition_mode,
            "hardness_mode": hardness_mode,
            "hardness_strength": hardness_strength,
            "normalize": normalize,
            "reduction": reduction,
            "backend": backend,
            "group": group,
            "exchange": exchange,
        }

    def forward(self, query: Tensor, document: Tensor, negatives: Sequence[Tensor] = ()) -> Tensor:
        return multiple_negatives_ranking_loss(query, document, negatives=negatives, **self.options)


class NegativeCosineSimilarity(nn.Module):
    """:func:`fastcl.negative_cosine_similarity` as a module, for BYOL and SimSiam: ``criterion(p1, z2.detach())``."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        return negative_cosine_similarity(p, z, reduction=self.reduction)


class SwaVLoss(nn.Module):
    """:func:`fastcl.swav_loss` as a module, with lightly's arguments; ``group`` stands for its
    ``sinkhorn_gather_distributed``.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_scalar("temperature", temperature, positive=True)
        self.options = {
            "tau": temperature,
            "sinkhorn_iterations": sinkhorn_iterations,
            "sinkhorn_epsilon": sinkhorn_epsilon,
            "group": group,
        }

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor] = (),
        queue_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return swav_loss(high_resolution_outputs, low_resolution_outputs, queue_outputs, **self.options)


class BarlowTwinsLoss(nn.Module):
    """:func:`fastcl.barlow_twins_loss` as a module: ``BarlowTwinsLoss()(z_a, z_b)``."""

    def __init__(self, lambda_param: float = 5e-3, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.lambda_param, self.group = lambda_param, group

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return barlow_twins_loss(z_a, z_b, lambda_param=self.lambda_param, group=self.group)


class SoftmaxLoss(nn.Module):
    """:func:`fastcl.softmax_classification_loss` with its classifier, as in sentence-transformers.

    The embeddings come in place of a model and its texts: ``criterion(u, v, labels)``. ``classifier`` is the linear
    layer that is trained with the encoder.
    """

    def __init__(
        self,
        embedding_dimension: int,
        num_labels: int,
        concatenation_sent_rep: bool = True,
        concatenation_sent_difference: bool = True,
        concatenation_sent_multiplication: bool = False,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        vectors = 2 * concatenation_sent_rep + concatenation_sent_difference + concatenation_sent_multiplication
        self.classifier = nn.Linear(vectors * embedding_dimension, num_labels)
        self.options = {
            "concatenation_sent_rep": concatenation_sent_rep,
            "concatenation_sent_difference": concatenation_sent_difference,
            "concatenation_sent_multiplication": concatenation_sent_multiplication,
            "reduction": reduction,
        }

    def forward(self, u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        return softmax_classification_loss(u, v, labels, self.classifier.weight, self.classifier.bias, **self.options)


class CosineSimilarityLoss(nn.Module):
    """:func:`fastcl.cosine_similarity_loss` as a module, given embeddings: ``criterion(u, v, scores)``."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, u: Tensor, v: Tensor, scores: Tensor) -> Tensor:
        return cosine_similarity_loss(u, v, scores, reduction=self.reduction)
