"""The losses of single pairs as modules, those of margins with pytorch-metric-learning's names.

May import :mod:`fastcl.losses`.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastcl.losses.binary_nce import binary_nce_loss
from fastcl.losses.contrastive import contrastive_loss
from fastcl.losses.lifted_structure import lifted_structure_loss
from fastcl.losses.spectral import spectral_contrastive_loss
from fastcl.losses.triplet import triplet_loss


class ContrastiveLoss(nn.Module):
    """:func:`fastcl.contrastive_loss` as a module: ``ContrastiveLoss(pos_margin=0, neg_margin=1)(embeddings, labels)``.

    ``options`` are those of the function, such as ``distance`` and ``normalize``.
    """

    def __init__(self, pos_margin: float = 0.0, neg_margin: float = 1.0, **options: object) -> None:
        super().__init__()
        self.options = {"pos_margin": pos_margin, "neg_margin": neg_margin, **options}

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return contrastive_loss(embeddings, labels, ids=ids, weight=weight, **self.options)


class TripletMarginLoss(nn.Module):
    """:func:`fastcl.triplet_loss` as a module: ``TripletMarginLoss(margin=0.05)(embeddings, labels)``.

    ``mining`` stands for the miner, and the other ``options`` are those of the function.
    """

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        *,
        mining: str = "all",
        **options: object,
    ) -> None:
        super().__init__()
        self.options = {"margin": margin, "swap": swap, "smooth_loss": smooth_loss, "mining": mining, **options}

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return triplet_loss(embeddings, labels, ids=ids, weight=weight, **self.options)


class LiftedStructureLoss(nn.Module):
    """:func:`fastcl.lifted_structure_loss` as a module: ``LiftedStructureLoss(neg_margin=1, pos_margin=0)``.

    ``options`` are those of the function, such as ``distance`` and ``normalize``.
    """

    def __init__(self, neg_margin: float = 1.0, pos_margin: float = 0.0, **options: object) -> None:
        super().__init__()
        self.options = {"neg_margin": neg_margin, "pos_margin": pos_margin, **options}

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return lifted_structure_loss(embeddings, labels, ids=ids, weight=weight, **self.options)


class BinaryNCELoss(nn.Module):
    """:func:`fastcl.binary_nce_loss` as a module: ``BinaryNCELoss(0.1)(z1, z2)``; ``options`` are the function's."""

    def __init__(self, temperature: float, **options: object) -> None:
        super().__init__()
        self.options = {"tau": temperature, **options}

    def forward(self, z1: Tensor, z2: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return binary_nce_loss(z1, z2, ids=ids, weight=weight, **self.options)


class SpectralContrastiveLoss(nn.Module):
    """:func:`fastcl.spectral_contrastive_loss` as a module; ``options`` are those of the function.

    >>> import torch, fastcl
    >>> z = torch.eye(4, 8)
    >>> fastcl.nn.SpectralContrastiveLoss()(z, z).item() == fastcl.spectral_contrastive_loss(z, z).item()
    True
    """

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, z1: Tensor, z2: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return spectral_contrastive_loss(z1, z2, ids=ids, weight=weight, **self.options)
