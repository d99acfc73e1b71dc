"""Softmax losses of views, queries and labelled rows as modules. May import :mod:`fastcl.losses`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastcl.checks import check_scalar
from fastcl.losses.alpha_cl import alpha_cl_loss
from fastcl.losses.dcl import dcl_loss
from fastcl.losses.debiased import debiased_loss, hard_negative_loss
from fastcl.losses.info_nce import PairOfTags, info_nce
from fastcl.losses.macl import macl_loss
from fastcl.losses.multiple_negatives import multiple_negatives_ranking_loss
from fastcl.losses.nt_xent import nt_xent
from fastcl.losses.sup_con import sup_con_loss
from fastcl.nn.temperature import TemperatureLoss


class _SoftmaxLoss(TemperatureLoss):
    """A loss of which some candidates can be left out, and over all of which the target can be smoothed."""

    def __init__(
        self,
        temperature: float,
        *,
        label_smoothing: float = 0.0,
        false_negative_margin: float | None = None,
        **options: object,
    ) -> None:
        super().__init__(temperature, **options)
        self.options |= {"label_smoothing": label_smoothing, "false_negative_margin": false_negative_margin}


class NTXentLoss(_SoftmaxLoss):
    """:func:`fastcl.nt_xent` as a module: ``NTXentLoss(0.5)(z1, z2)``.

    ``learnable=True`` trains the temperature, as the parameter ``logit_scale = log(1 / temperature)``, with 1 /
    temperature held at or below ``max_scale``. ``label_smoothing`` and ``false_negative_margin`` are the function's.

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


class InfoNCELoss(_SoftmaxLoss):
    """:func:`fastcl.info_nce` as a module: ``InfoNCELoss(0.1)(query, key, negatives=queue)``.

    The options are those of :class:`NTXentLoss`, and the function's ``label_width``.
    """

    def __init__(self, temperature: float, *, label_width: int = 0, **options: object) -> None:
        super().__init__(temperature, **options)
        self.options |= {"label_width": label_width}

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


class SupConLoss(TemperatureLoss):
    """:func:`fastcl.sup_con_loss` as a module: ``SupConLoss(0.1)(z, labels)``, z as [N, D] or as views [B, V, D].

    ``learnable`` and ``max_scale`` are as in :class:`NTXentLoss`. SupContrast's ``base_temperature`` is a constant
    factor temperature / base_temperature of the loss, 1 where both are equal, as here.
    """

    def __init__(
        self,
        temperature: float,
        *,
        form: str = "out",
        label_width: int = 0,
        label_smoothing: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__(temperature, **options)
        self.options |= {"form": form, "label_width": label_width, "label_smoothing": label_smoothing}

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return sup_con_loss(z, labels, self.temperature, ids=ids, weight=weight, **self.options)


class DCLLoss(TemperatureLoss):
    """:func:`fastcl.dcl_loss` as a module: ``DCLLoss(0.1)(z1, z2)``.

    ``learnable`` and ``max_scale`` are as in :class:`NTXentLoss`.
    """

    def __init__(self, temperature: float = 0.1, **options: object) -> None:
        super().__init__(temperature, **options)

    def forward(self, z1: Tensor, z2: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return dcl_loss(z1, z2, self.temperature, ids=ids, weight=weight, **self.options)


class DCLWLoss(TemperatureLoss):
    """:func:`fastcl.dcl_loss` with weights of the positives as a module: ``DCLWLoss(0.1, sigma=0.5)(z1, z2)``."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, **options: object) -> None:
        super().__init__(temperature, **options)
        check_scalar("sigma", sigma, positive=True)
        self.sigma = sigma

    def forward(self, z1: Tensor, z2: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return dcl_loss(z1, z2, self.temperature, sigma=self.sigma, ids=ids, weight=weight, **self.options)


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

    def forward(self, z1: Tensor, z2: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return macl_loss(z1, z2, ids=ids, weight=weight, **self.options)


class DebiasedLoss(TemperatureLoss):
    """:func:`fastcl.debiased_loss` as a module: ``DebiasedLoss(0.5, tau_plus=0.1)(z1, z2)``.

    ``learnable`` and ``max_scale`` are as in :class:`NTXentLoss`.
    """

    def __init__(self, temperature: float = 0.5, tau_plus: float = 0.1, **options: object) -> None:
        super().__init__(temperature, **options)
        self.tau_plus = tau_plus

    def forward(self, z1: Tensor, z2: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return debiased_loss(z1, z2, self.temperature, self.tau_plus, ids=ids, weight=weight, **self.options)


class HardNegativeLoss(TemperatureLoss):
    """:func:`fastcl.hard_negative_loss` as a module: ``HardNegativeLoss(0.5, tau_plus=0.1, beta=1.0)(z1, z2)``."""

    def __init__(self, temperature: float = 0.5, tau_plus: float = 0.1, beta: float = 1.0, **options: object) -> None:
        super().__init__(temperature, **options)
        self.tau_plus, self.beta = tau_plus, beta

    def forward(self, z1: Tensor, z2: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return hard_negative_loss(
            z1, z2, self.temperature, self.tau_plus, self.beta, ids=ids, weight=weight, **self.options
        )


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
        backend: str | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "tau": temperature,
            "importance": importance,
            "power": power,
            "normalize": normalize,
            "reduction": reduction,
            "backend": backend,
            "group": group,
        }

    def forward(self, z1: Tensor, z2: Tensor, *, ids: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return alpha_cl_loss(z1, z2, ids=ids, weight=weight, **self.options)


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

    def forward(
        self,
        query: Tensor,
        document: Tensor,
        negatives: Sequence[Tensor] = (),
        *,
        ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return multiple_negatives_ranking_loss(
            query, document, negatives=negatives, ids=ids, weight=weight, **self.options
        )
