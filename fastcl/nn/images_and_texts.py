"""The losses of images and texts as modules, called as open_clip calls its own. May import :mod:`fastcl.losses`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastcl.checks import check_scalar
from fastcl.losses.clip import clip_loss
from fastcl.losses.distillation import clip_distillation_loss
from fastcl.losses.siglip import siglip_loss
from fastcl.nn.temperature import bounded_scale, log_scale


class ClipLoss(nn.Module):
    """:func:`fastcl.clip_loss` as a module, called as open_clip calls its own.

    ``forward(image_features, text_features, logit_scale, logit_bias=None, output_dict=False)``; with ``output_dict``
    the result is ``{"contrastive_loss": loss}``. Given a ``temperature``, the module owns a ``logit_scale`` parameter
    (the logarithm), trains it and needs none in the call. ``labels``, ``ids`` and ``weight`` of the pairs go by name.

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
        label_smoothing: float = 0.0,
        false_negative_margin: float | None = None,
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
        self.logit_scale = None if temperature is None else log_scale(temperature)
        self.options = {
            "label_smoothing": label_smoothing,
            "false_negative_margin": false_negative_margin,
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
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        if self.logit_scale is not None:
            if logit_scale is not None:
                raise ValueError(f"logit_scale must be None where ClipLoss learns its own, got {logit_scale!r}")
            logit_scale = bounded_scale(self.logit_scale, self.max_scale)
        elif logit_scale is None:
            raise ValueError("logit_scale must be given, or learned by ClipLoss(temperature=...); got None")
        loss = clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            labels=labels,
            ids=ids,
            weight=weight,
            **self.options,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class DistillClipLoss(nn.Module):
    """:func:`fastcl.clip_loss` and :func:`fastcl.clip_distillation_loss` as a module, called as open_clip's own.

    The result is the tuple ``(contrastive_loss, distill_loss)``, or with ``output_dict`` a dictionary of both. ``ids``
    and ``weight`` of the pairs, by name, go to both.

    >>> import torch, fastcl
    >>> x = torch.eye(3, 8)
    >>> [round(loss.item(), 4) for loss in fastcl.nn.DistillClipLoss()(x, x, 1.0, x, x, 50.0)]
    [0.5514, 0.5514]
    """

    def __init__(
        self,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.options = {"normalize": normalize, "reduction": reduction, "backend": backend, "group": group}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        student, teacher = (image_features, text_features, logit_scale), (dist_image_features, dist_text_features)
        options = self.options | {"ids": ids, "weight": weight}
        contrastive = clip_loss(*student, **options)
        distilled = clip_distillation_loss(*student, *teacher, dist_logit_scale, **options)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distilled}
        return contrastive, distilled


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
            self.logit_scale, self.logit_bias = log_scale(temperature), nn.Parameter(torch.tensor(float(logit_bias)))
        self.options = {"normalize": normalize, "reduction": reduction, "backend": backend, "group": group}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        if self.logit_scale is not None:
            if logit_scale is not None or logit_bias is not None:
                raise ValueError(
                    f"logit_scale and logit_bias must be None where SigLipLoss learns its own, got {logit_scale!r} and "
                    f"{logit_bias!r}"
                )
            logit_scale, logit_bias = bounded_scale(self.logit_scale, self.max_scale), self.logit_bias
        elif logit_scale is None or logit_bias is None:
            raise ValueError(
                f"logit_scale and logit_bias must be given, or learned by SigLipLoss(temperature=...); got "
                f"{logit_scale!r} and {logit_bias!r}"
            )
        options = self.options | {"labels": labels, "ids": ids, "weight": weight}
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, **options)
        return {"contrastive_loss": loss} if output_dict else loss
