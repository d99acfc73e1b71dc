"""The one table of losses that the tests and the benchmarks iterate.

A :class:`Loss` pairs a public call with its textbook formula on the same inputs; a new loss is a new row of ``LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastcl
from fastcl.losses.alpha_cl import reference as alpha_cl_reference
from fastcl.losses.binary_nce import reference as binary_nce_reference
from fastcl.losses.clip import reference as clip_reference
from fastcl.losses.contrastive import reference as contrastive_reference
from fastcl.losses.dcl import reference as dcl_reference
from fastcl.losses.debiased import reference as debiased_reference
from fastcl.losses.distillation import reference as distillation_reference
from fastcl.losses.info_nce import reference as info_nce_reference
from fastcl.losses.lifted_structure import reference as lifted_structure_reference
from fastcl.losses.macl import reference as macl_reference
from fastcl.losses.multiple_negatives import reference as ranking_reference
from fastcl.losses.nt_xent import reference as nt_xent_reference
from fastcl.losses.siglip import reference as siglip_reference
from fastcl.losses.spectral import reference as spectral_reference
from fastcl.losses.sup_con import reference as sup_con_reference
from fastcl.losses.triplet import reference as triplet_reference

EVERY_BACKEND = ("dense", "tiled", "cpu", "triton", "cuda")
SORTED = ("dense", "tiled")
"""of a loss that sorts each row of S, in plain PyTorch"""
PLAIN = ("tiled",)
"""of a loss without a sweep"""


@dataclass(frozen=True)
class Loss:
    """One way to call a loss: ``call(features, tau, backend=...)`` and ``reference`` give one number for each row.

    ``call`` takes the loss's own options too; with ``reduction="mean"`` it gives their mean.
    """

    name: str
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    features: tuple[str, ...]
    passes: float
    """sweeps of N * M * D multiply-adds that the mean takes, value and gradients"""
    passes_of_rows: tuple[float, float]
    """the same for the losses of the single rows, forward and backward"""
    frozen_passes: float
    """the same as ``passes`` where only the first of the features requires grad"""

    one_operator: bool
    """whether the mean is computed with its gradients, in an operator that torch.func understands"""
    detached: bool
    """whether the loss holds a part of itself constant, so that its gradient is not that of its value"""

    sweeps: int
    """how often S is looked at for the value of the rows"""

    by_panels: bool
    """whether it is a function of every single pair, over panels of S; references of some take N * N * N memory"""
    thorough: bool
    """whether it has kernels of its own, which all shapes go through"""

    backends: tuple[str | None, ...]
    """those that may compute it, or None alone where there is nothing to choose"""

    def lengths(self, pairs: int) -> tuple[int, ...]:
        """The rows of each of the features."""
        return tuple(pairs + pairs // 2 + 1 if name.startswith("longer") else pairs for name in self.features)

    @property
    def variant(self) -> bool:
        """Whether the loss is another one with an option, which changes no shape."""
        return self.name.endswith(("_ids", "_per_query", "_own_negatives"))

    @property
    def temperature_cancels(self) -> bool:
        """Whether the temperature's gradient is a difference, of sweeps or within a query, that nearly cancels."""
        return self.name.startswith(
            ("ranking_both_directions", "clip_distillation", "info_nce_tau_per_query", "info_nce_own_negatives")
        )

    @property
    def symmetric(self) -> bool:
        """Whether the loss looks at half of S."""
        return self.passes_of_rows[0] == 0.5 * self.sweeps


def _shuffled(n: int, m: int, device: torch.device) -> Tensor:
    """A target for each of n queries that is neither the identity nor an involution."""
    return (torch.arange(n, device=device) * 7 + 3) % m


def tag(rows: int, kinds: int, like: Tensor, shift: int = 0) -> Tensor:
    """Labels or ids that repeat at an uneven distance; the last is its row's alone."""
    tags = ((torch.arange(rows, device=like.device) + shift) * 5 // 3) % kinds
    tags[-1] = 10**12 + shift
    return tags


def _row(
    name: str,
    call: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    features: tuple[str, ...],
    passes: tuple[float, tuple[float, float], float],
    given: Callable[[list[Tensor]], dict[str, object]] = lambda features: {},
    one_operator: bool = True,
    detached: bool = False,
    sweeps: int = 1,
    by_panels: bool = False,
    thorough: bool | None = None,
    backends: tuple[str | None, ...] = EVERY_BACKEND,
) -> Loss:
    """A loss whose options ``given`` makes of the features, for call and reference alike."""
    return Loss(
        name,
        lambda features, tau, **options: call(*features, tau, **({"reduction": "none"} | given(features) | options)),
        lambda features, tau: reference(*features, tau, **given(features)),
        features,
        *passes,
        one_operator,
        detached,
        sweeps,
        by_panels,
        one_operator if thorough is None else thorough,
        backends,
    )


def _clip(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, y, tau, **options: call(x, y, 1 / tau, normalize=True, **options)


def _siglip(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, y, tau, **options: call(x, y, 1 / tau, -10.0, normalize=True, **options)


def _mild(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """At higher temperatures, where corrected negatives are not all at their bound."""
    return lambda z1, z2, tau, **options: call(z1, z2, torch.as_tensor(tau).double() + 0.3, **options)


def _negatives(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, key, negatives, tau, **options: call(query, key, tau, negatives=negatives, **options)


def _distillation(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With a teacher that depends on nothing but the shape."""

    def with_teacher(x: Tensor, y: Tensor, tau: Tensor, **options: object) -> Tensor:
        angles = 1.0 + torch.arange(x.numel(), device=x.device, dtype=torch.float64).reshape(x.shape)
        teacher = ((0.7 * angles).sin().to(x.dtype), (0.7 * angles + 0.9 * angles.cos()).sin().to(x.dtype))
        return call(x, y, 1 / tau, *teacher, 4.0, normalize=True, **options)

    return with_teacher


def _over_tau(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The energy of a constant temperature, divided by the one that is differentiated."""
    return lambda z1, z2, tau, **options: call(z1, z2, 0.5, **options) / tau


def _two_hard_negatives(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, document, first, second, tau, **options: call(
        query, document, tau, negatives=(first, second), **options
    )


def _own_negatives(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def with_two_each(query: Tensor, key: Tensor, negatives: Tensor, tau: Tensor, **options: object) -> Tensor:
        own = torch.stack((negatives[: len(query)], negatives[: len(query)].roll(1, 0)), dim=1)
        return call(query, key, tau, negatives=own, **options)

    return with_two_each


def _tau_per_query(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, key, tau, **options: call(
        query,
        key,
        torch.as_tensor(tau).double() * torch.linspace(1, 2, len(query), device=query.device).double(),
        **options,
    )


def _without_tau(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss that has no temperature: its values are divided by one."""

    def divided(*arguments: object, **options: object) -> Tensor:
        *features, tau = arguments
        return call(*features, **options) / tau

    return divided


def _without_backends(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def plain(*arguments: object, backend: str | None = None, **options: object) -> Tensor:
        if backend not in (None, "tiled"):
            raise ValueError("backend must be None: the loss is plain PyTorch")
        return call(*arguments, **options)

    return plain


def _pair_of_tags(kinds: int) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
    return lambda x: (tag(len(x[0]), kinds, x[0]), tag(len(x[-1]), kinds, x[-1], shift=1))


def _labelled(
    name: str,
    call: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    passes: tuple[float, tuple[float, float], float],
    backends: tuple[str | None, ...] = EVERY_BACKEND,
    **options: object,
) -> Loss:
    """A loss of the distances between rows of a few rows each, some of which are duplicates."""

    def with_labels(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return _without_tau(lambda z, labels, **others: loss(z, labels, **options, **others))

    return _row(
        name,
        with_labels(call),
        with_labels(reference),
        ("z",),
        passes,
        lambda x: {"labels": tag(len(x[0]), len(x[0]) // 4 + 2, x[0]), "ids": tag(len(x[0]), 5, x[0], shift=2)},
        one_operator=False,
        by_panels=True,
        backends=backends,
    )


_VIEWS, _QUERIES, _CLIP = ("z1", "z2"), ("query", "key"), ("image_features", "text_features")
_LONGER = ("query", "longer key")
_HALF = 2, (0.5, 1.5), 2
"""the passes of a plan over half of S"""
_ROWS, _ROWS_IN_TWO = (3, (1.0, 3.0), 2), (4, (1.0, 3.0), 3)
"""the passes of rows only: in one sweep, or two"""
_BOTH = 4, (1.0, 3.0), 3
"""the passes of rows and columns"""
_UNEVEN = 0, (0, 0), 0
"""the passes of a loss that makes several plans, which are counted in a test of its own"""
_EVERY_DIRECTION = {"directions": ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")}
_ONE_SWEEP, _ROWS_OF_TWO, _TWO_STAGES = (3, (1.0, 3.0), 3), (4, (1.0, 3.0), 4), (7, (2.0, 6.0), 7)
"""of rows against themselves, by panels: one average, two, or one that needs the rows' sums first"""
_ids, _labels = _pair_of_tags(4), _pair_of_tags(6)

LOSSES = (
    _row("nt_xent", fastcl.nt_xent, nt_xent_reference, _VIEWS, _HALF),
    _row("nt_xent_ids", fastcl.nt_xent, nt_xent_reference, _VIEWS, _HALF, lambda x: {"ids": tag(len(x[0]), 4, x[0])}),
    _row(
        "nt_xent_smoothing",
        fastcl.nt_xent,
        nt_xent_reference,
        _VIEWS,
        _HALF,
        lambda x: {"label_smoothing": 0.1},
        one_operator=False,
    ),
    _row("info_nce", fastcl.info_nce, info_nce_reference, _QUERIES, _ROWS),
    _row(
        "info_nce_target",
        fastcl.info_nce,
        info_nce_reference,
        _LONGER,
        _ROWS,
        lambda x: {"target": _shuffled(len(x[0]), len(x[1]), x[0].device)},
    ),
    _row(
        "info_nce_negatives",
        _negatives(fastcl.info_nce),
        _negatives(info_nce_reference),
        ("query", "key", "longer negatives"),
        _ROWS,
    ),
    _row(
        "info_nce_negatives_ids",
        _negatives(fastcl.info_nce),
        _negatives(info_nce_reference),
        ("query", "key", "longer negatives"),
        _ROWS,
        lambda x: {"ids": _ids(x)},
    ),
    _row(
        "info_nce_own_negatives",
        _own_negatives(fastcl.info_nce),
        _own_negatives(info_nce_reference),
        ("query", "key", "longer negatives"),
        (0, (0, 0), 0),
        backends=(None,),
    ),
    _row(
        "info_nce_labels",
        fastcl.info_nce,
        info_nce_reference,
        _LONGER,
        _ROWS_IN_TWO,
        lambda x: {"labels": _labels(x)},
        one_operator=False,
    ),
    _row(
        "info_nce_neighbours",
        fastcl.info_nce,
        info_nce_reference,
        _QUERIES,
        _ROWS_IN_TWO,
        lambda x: {
            "labels": (torch.arange(len(x[0]), device=x[0].device),) * 2,
            "label_width": 2,
            "ids": _ids(x),
            "label_smoothing": 0.1,
        },
        one_operator=False,
    ),
    _row(
        "info_nce_smoothing",
        fastcl.info_nce,
        info_nce_reference,
        _LONGER,
        _ROWS_IN_TWO,
        lambda x: {
            "label_smoothing": 0.1,
            "ids": _ids(x),
            "target": _shuffled(len(x[0]), len(x[1]), x[0].device),
        },
        one_operator=False,
    ),
    _row(
        "info_nce_tau_per_query", _tau_per_query(fastcl.info_nce), _tau_per_query(info_nce_reference), _QUERIES, _ROWS
    ),
    _row("clip", _clip(fastcl.clip_loss), _clip(clip_reference), _CLIP, _BOTH),
    _row(
        "clip_labels",
        _clip(fastcl.clip_loss),
        _clip(clip_reference),
        _CLIP,
        _BOTH,
        lambda x: {
            "labels": tag(len(x[0]), 7, x[0]),
            "ids": tag(len(x[0]), 5, x[0], shift=2),
            "label_smoothing": 0.2,
        },
        one_operator=False,
    ),
    _row(
        "clip_smoothing",
        _clip(fastcl.clip_loss),
        _clip(clip_reference),
        _CLIP,
        _BOTH,
        lambda x: {"label_smoothing": 0.2},
        one_operator=False,
    ),
    _row("dcl", fastcl.dcl_loss, dcl_reference, _VIEWS, _HALF, one_operator=False),
    _row(
        "dcl_ids",
        fastcl.dcl_loss,
        dcl_reference,
        _VIEWS,
        _HALF,
        lambda x: {"ids": tag(len(x[0]), 4, x[0])},
        one_operator=False,
    ),
    _row(
        "dclw",
        fastcl.dcl_loss,
        dcl_reference,
        _VIEWS,
        _HALF,
        lambda x: {"sigma": 0.5},
        one_operator=False,
        detached=True,
    ),
    _row(
        "debiased",
        _mild(fastcl.debiased_loss),
        _mild(debiased_reference),
        _VIEWS,
        _HALF,
        lambda x: {"tau_plus": 0.1},
        one_operator=False,
    ),
    _row(
        "hard_negative",
        _mild(fastcl.hard_negative_loss),
        _mild(debiased_reference),
        _VIEWS,
        (4, (1.0, 3.0), 4),
        lambda x: {"tau_plus": 0.1, "beta": 0.8},
        one_operator=False,
        sweeps=2,
    ),
    _row(
        "hard_negative_ids",
        _mild(fastcl.hard_negative_loss),
        _mild(debiased_reference),
        _VIEWS,
        (4, (1.0, 3.0), 4),
        lambda x: {"tau_plus": 0.05, "beta": 0.5, "ids": tag(len(x[0]), 4, x[0])},
        one_operator=False,
        sweeps=2,
    ),
    _row(
        "macl",
        fastcl.macl_loss,
        macl_reference,
        _VIEWS,
        _HALF,
        lambda x: {"alpha": 0.7, "initial_alignment": 0.1},
        one_operator=False,
        detached=True,
    ),
    _row("ranking", fastcl.multiple_negatives_ranking_loss, ranking_reference, _QUERIES, _ROWS),
    _row(
        "ranking_both_directions",
        fastcl.multiple_negatives_ranking_loss,
        ranking_reference,
        _QUERIES,
        _BOTH,
        lambda x: {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    ),
    _row(
        "ranking_every_direction",
        _two_hard_negatives(fastcl.multiple_negatives_ranking_loss),
        _two_hard_negatives(ranking_reference),
        ("query", "document", "first negative", "second negative"),
        _UNEVEN,
        lambda x: _EVERY_DIRECTION,
        one_operator=False,
    ),
    _row(
        "ranking_penalized",
        _two_hard_negatives(fastcl.multiple_negatives_ranking_loss),
        _two_hard_negatives(ranking_reference),
        ("query", "document", "first negative", "second negative"),
        _UNEVEN,
        lambda x: _EVERY_DIRECTION | {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
        one_operator=False,
        detached=True,
    ),
    _row(
        "clip_distillation",
        _distillation(fastcl.clip_distillation_loss),
        _distillation(distillation_reference),
        _CLIP,
        (8, (4.0, 8.0), 6),
        one_operator=False,
        sweeps=2,
        by_panels=True,
    ),
    _row(
        "clip_distillation_ids",
        _distillation(fastcl.clip_distillation_loss),
        _distillation(distillation_reference),
        _CLIP,
        (8, (4.0, 8.0), 6),
        lambda x: {"ids": tag(len(x[0]), 5, x[0])},
        one_operator=False,
        sweeps=2,
        by_panels=True,
    ),
    *(
        _row(
            f"alpha_cl_{rule}",
            _over_tau(fastcl.alpha_cl_loss),
            _over_tau(alpha_cl_reference),
            _VIEWS,
            (3, (1.0, 3.0), 3),
            lambda x, rule=rule: {"importance": rule},
            one_operator=False,
            detached=rule != "uniform",
            by_panels=True,
        )
        for rule in ("softmax", "uniform", "power")
    ),
    _row(
        "siglip",
        _siglip(fastcl.siglip_loss),
        _siglip(siglip_reference),
        _CLIP,
        _ROWS,
        one_operator=False,
        thorough=True,
    ),
    _row(
        "siglip_labels",
        _siglip(fastcl.siglip_loss),
        _siglip(siglip_reference),
        _CLIP,
        _ROWS,
        lambda x: {"labels": tag(len(x[0]), 7, x[0]), "ids": tag(len(x[0]), 5, x[0], shift=2)},
        one_operator=False,
        thorough=True,
    ),
    _row(
        "binary_nce",
        fastcl.binary_nce_loss,
        binary_nce_reference,
        _VIEWS,
        _ROWS,
        one_operator=False,
        thorough=True,
    ),
    _row(
        "binary_nce_ratio",
        fastcl.binary_nce_loss,
        binary_nce_reference,
        _VIEWS,
        _ROWS,
        lambda x: {
            "noise_ratio": 3.0,
            "log_noise": torch.linspace(-2, 0, len(x[0]), device=x[0].device).double(),
            "ids": tag(len(x[0]), 5, x[0]),
        },
        one_operator=False,
        thorough=True,
    ),
    *(
        _row(
            name,
            _without_tau(_without_backends(fastcl.spectral_contrastive_loss)),
            _without_tau(spectral_reference),
            _VIEWS,
            (0, (0, 0), 0),
            lambda x, options=options: options,
            one_operator=False,
            backends=PLAIN,
        )
        for name, options in (("spectral", {"normalize": True}), ("spectral_mu", {"mu": 3.0}))
    ),
    _row(
        "spectral_duplicates",
        _without_tau(_without_backends(fastcl.spectral_contrastive_loss)),
        _without_tau(spectral_reference),
        _VIEWS,
        _ROWS,
        lambda x: {"mu": 3.0, "ids": tag(len(x[0]), 5, x[0])},
        one_operator=False,
        backends=PLAIN,
    ),
    _labelled("contrastive", fastcl.contrastive_loss, contrastive_reference, _ROWS_OF_TWO, pos_margin=0.1),
    _labelled("contrastive_cosine", fastcl.contrastive_loss, contrastive_reference, _ROWS_OF_TWO, distance="cosine"),
    _labelled(
        "contrastive_norms",
        fastcl.contrastive_loss,
        contrastive_reference,
        _ROWS_OF_TWO,
        normalize=False,
        neg_margin=8.0,
    ),
    *(
        _labelled(
            f"triplet_{mining}", fastcl.triplet_loss, triplet_reference, _ONE_SWEEP, SORTED, mining=mining, margin=0.3
        )
        for mining in ("all", "semihard")
    ),
    _labelled("triplet_hard", fastcl.triplet_loss, triplet_reference, _UNEVEN, mining="hard", margin=0.3),
    _labelled(
        "triplet_smooth",
        fastcl.triplet_loss,
        triplet_reference,
        _UNEVEN,
        mining="hard",
        smooth_loss=True,
        distance="cosine",
    ),
    _labelled("triplet_swap", fastcl.triplet_loss, triplet_reference, _UNEVEN, mining="hard", swap=True, margin=0.3),
    _labelled("lifted_structure", fastcl.lifted_structure_loss, lifted_structure_reference, _TWO_STAGES),
    _labelled(
        "lifted_structure_norms",
        fastcl.lifted_structure_loss,
        lifted_structure_reference,
        _TWO_STAGES,
        normalize=False,
    ),
    *(
        _row(
            f"sup_con_{form}",
            lambda z, tau, labels, **options: fastcl.sup_con_loss(z, labels, tau, **options),
            lambda z, tau, labels, **options: sup_con_reference(z, labels, tau, **options),
            ("z",),
            _HALF,
            lambda x, form=form: {"labels": tag(len(x[0]), 6, x[0]), "form": form},
            one_operator=False,
        )
        for form in ("out", "in")
    ),
)
