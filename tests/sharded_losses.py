"""Losses of a sharded batch: what each rank calls on its rows, and the textbook formula of the global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
from fastcl.losses.multiple_negatives import DIRECTIONS
from fastcl.losses.multiple_negatives import reference as ranking_reference
from fastcl.losses.nt_xent import reference as nt_xent_reference
from fastcl.losses.siglip import reference as siglip_reference
from fastcl.losses.spectral import reference as spectral_reference
from fastcl.losses.sup_con import reference as sup_con_reference
from fastcl.losses.triplet import reference as triplet_reference

DIM = 5


class Loss(NamedTuple):
    """``call`` and ``reference`` take features, the scale and the bias; a call also its rank's first row."""

    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    lengths: Callable[[int], Sequence[int]]
    """rows of each feature matrix for a batch of so many pairs"""


def _target(queries: int, first: int, keys: int) -> Tensor:
    target = ((torch.arange(queries) + first) * 7 + 3) % max(keys, 1)
    return target.where((torch.arange(queries) + first) % 5 != 4, -1)


def _tag(rows: int, first: int, kinds: int) -> Tensor:
    return ((torch.arange(rows) + first) * 5 // 3) % kinds


def _views(**tags: int) -> Loss:
    """NT-Xent with tags of so many kinds."""

    def of(rows: int, first: int) -> dict[str, Tensor]:
        return {name: _tag(rows, first, kinds) for name, kinds in tags.items()}

    return Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.nt_xent(*x, 1 / scale, **of(len(x[0]), first), **options),
        lambda x, scale, bias: (
            sup_con_reference(torch.cat(x), of(len(x[0]), 0)["labels"].repeat(2), 1 / scale)
            if "labels" in tags
            else nt_xent_reference(*x, 1 / scale, **of(len(x[0]), 0))
        ),
        lambda pairs: (pairs, pairs),
    )


def _of_views(call: Callable[..., Tensor], reference: Callable[..., Tensor], **given: object) -> Loss:
    """A loss of two views and a temperature with options, where ids are of so many kinds."""

    def of(rows: int, first: int) -> dict[str, object]:
        return {name: _tag(rows, first, kinds) if name == "ids" else kinds for name, kinds in given.items()}

    return Loss(
        lambda x, scale, bias, first, keys, **options: call(*x, 1 / scale, **of(len(x[0]), first), **options),
        lambda x, scale, bias: reference(*x, 1 / scale, **of(len(x[0]), 0)),
        lambda pairs: (pairs, pairs),
    )


def _clip(**given: object) -> Loss:
    """CLIP with options, where labels and ids are of so many kinds."""

    def of(rows: int, first: int) -> dict[str, object]:
        return {name: _tag(rows, first, kinds) if name in ("labels", "ids") else kinds for name, kinds in given.items()}

    return Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.clip_loss(
            *x, scale, normalize=True, **of(len(x[0]), first), **options
        ),
        lambda x, scale, bias: clip_reference(*x, scale, normalize=True, **of(len(x[0]), 0)),
        lambda pairs: (pairs, pairs),
    )


def _labelled(call: Callable[..., Tensor], reference: Callable[..., Tensor], **given: object) -> Loss:
    """A loss of one batch with labels, over panels: its features are gathered whatever the exchange is."""

    def shard(x, scale, bias, first, keys, *, exchange, **options):
        return call(x[0], _tag(len(x[0]), first, 4), **given, **options)

    return Loss(shard, lambda x, scale, bias: reference(x[0], _tag(len(x[0]), 0, 4), **given), lambda pairs: (pairs,))


def _nce(**given: object) -> Loss:
    def shard(x, scale, bias, first, keys, *, exchange, **options):
        ids = _tag(len(x[0]), first, 3)
        return fastcl.binary_nce_loss(*x, 1 / scale, log_noise=bias, ids=ids, **given, **options)

    return Loss(
        shard,
        lambda x, scale, bias: binary_nce_reference(*x, 1 / scale, log_noise=bias, ids=_tag(len(x[0]), 0, 3), **given),
        lambda pairs: (pairs, pairs),
    )


def _teacher(pairs: int, first: int) -> tuple[Tensor, Tensor, float]:
    angles = 0.7 * (torch.arange(2 * pairs * DIM, dtype=torch.float64) + 2 * first * DIM).reshape(pairs, 2, DIM)
    return *angles.sin().unbind(dim=1), 3.0


LOSSES = {
    "nt_xent": Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.nt_xent(*x, 1 / scale, **options),
        lambda x, scale, bias: nt_xent_reference(*x, 1 / scale),
        lambda pairs: (pairs, pairs),
    ),
    "info_nce": Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.info_nce(*x, 1 / scale, **options),
        lambda x, scale, bias: info_nce_reference(*x, 1 / scale),
        lambda pairs: (pairs, pairs),
    ),
    "info_nce_target": Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.info_nce(
            *x, 1 / scale, target=_target(len(x[0]), first, keys), **options
        ),
        lambda x, scale, bias: info_nce_reference(*x, 1 / scale, target=_target(len(x[0]), 0, len(x[1]))),
        lambda pairs: (pairs, 2 * pairs + 1),
    ),
    "info_nce_negatives": Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.info_nce(
            x[0], x[1], 1 / scale, negatives=x[2], **options
        ),
        lambda x, scale, bias: info_nce_reference(x[0], x[1], 1 / scale, negatives=x[2]),
        lambda pairs: (pairs, pairs, 2 * pairs + 1),
    ),
    "clip": Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.clip_loss(*x, scale, bias, **options),
        lambda x, scale, bias: clip_reference(*x, scale, bias),
        lambda pairs: (pairs, pairs),
    ),
    "binary_nce": _nce(),
    "binary_nce_ratio": _nce(noise_ratio=2.5),
    "spectral_ids": Loss(
        lambda x, scale, bias, first, keys, *, reduction, group, **options: fastcl.spectral_contrastive_loss(
            *x, ids=_tag(len(x[0]), first, 3), reduction=reduction, group=group
        ),
        lambda x, scale, bias: spectral_reference(*x, ids=_tag(len(x[0]), 0, 3)),
        lambda pairs: (pairs, pairs),
    ),
    "spectral": Loss(
        lambda x, scale, bias, first, keys, *, reduction, group, **options: fastcl.spectral_contrastive_loss(
            *x, mu=2.0, reduction=reduction, group=group
        ),
        lambda x, scale, bias: spectral_reference(*x, mu=2.0),
        lambda pairs: (pairs, pairs),
    ),
    "contrastive": _labelled(fastcl.contrastive_loss, contrastive_reference, pos_margin=0.1),
    "triplet_all": _labelled(fastcl.triplet_loss, triplet_reference, margin=0.2, normalize=False),
    "triplet_hard": _labelled(fastcl.triplet_loss, triplet_reference, margin=0.2, mining="hard"),
    "triplet_swap": _labelled(fastcl.triplet_loss, triplet_reference, margin=0.2, mining="hard", swap=True),
    "lifted_structure": _labelled(fastcl.lifted_structure_loss, lifted_structure_reference, normalize=False),
    "nt_xent_ids": _views(ids=3),
    "nt_xent_labels": _views(labels=4),
    "clip_ids_margin": _clip(ids=5, false_negative_margin=0.1),
    "clip_labels": _clip(labels=4, ids=3, label_smoothing=0.2),
    "clip_smoothing": _clip(label_smoothing=0.2),
    "sup_con": Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.sup_con_loss(
            x[0], _tag(len(x[0]), first, 4), 1 / scale, form="in", label_width=1, **options
        ),
        lambda x, scale, bias: sup_con_reference(x[0], _tag(len(x[0]), 0, 4), 1 / scale, form="in", label_width=1),
        lambda pairs: (pairs,),
    ),
    "info_nce_smoothing": Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.info_nce(
            *x,
            1 / scale,
            target=_target(len(x[0]), first, keys),
            ids=_tag(len(x[0]), first, 3),
            label_smoothing=0.2,
            **options,
        ),
        lambda x, scale, bias: info_nce_reference(
            *x,
            1 / scale,
            target=_target(len(x[0]), 0, len(x[0])),
            ids=(_tag(len(x[0]), 0, 3),) * 2,
            label_smoothing=0.2,
        ),
        lambda pairs: (pairs, pairs),
    ),
    "info_nce_labels": Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.info_nce(
            *x, 1 / scale, labels=_tag(len(x[0]), first, 4), ids=_tag(len(x[0]), first, 3), **options
        ),
        lambda x, scale, bias: info_nce_reference(
            *x, 1 / scale, labels=(_tag(len(x[0]), 0, 4),) * 2, ids=(_tag(len(x[0]), 0, 3),) * 2
        ),
        lambda pairs: (pairs, pairs),
    ),
    "siglip": Loss(
        lambda x, scale, bias, first, keys, exchange, **options: fastcl.siglip_loss(
            *x, scale, bias, labels=_tag(len(x[0]), first, 4), ids=_tag(len(x[0]), first, 3), **options
        ),
        lambda x, scale, bias: siglip_reference(
            *x, scale, bias, labels=_tag(len(x[0]), 0, 4), ids=_tag(len(x[0]), 0, 3)
        ),
        lambda pairs: (pairs, pairs),
    ),
    "dcl": _of_views(fastcl.dcl_loss, dcl_reference, ids=3),
    "dclw": _of_views(fastcl.dcl_loss, dcl_reference, sigma=0.7),
    "macl": _of_views(fastcl.macl_loss, macl_reference, alpha=0.8, ids=3),
    "debiased": _of_views(fastcl.debiased_loss, debiased_reference, tau_plus=0.05),
    "hard_negative": _of_views(fastcl.hard_negative_loss, debiased_reference, tau_plus=0.02, beta=0.6, ids=3),
    "clip_distillation": Loss(
        lambda x, scale, bias, first, keys, exchange, **options: fastcl.clip_distillation_loss(
            *x, scale, *_teacher(len(x[0]), first), ids=_tag(len(x[0]), first, 3), normalize=True, **options
        ),
        lambda x, scale, bias: distillation_reference(
            *x, scale, *_teacher(len(x[0]), 0), ids=_tag(len(x[0]), 0, 3), normalize=True
        ),
        lambda pairs: (pairs, pairs),
    ),
    "alpha_cl": Loss(
        lambda x, scale, bias, first, keys, exchange, **options: (
            scale * fastcl.alpha_cl_loss(*x, 0.7, importance="power", ids=_tag(len(x[0]), first, 3), **options)
        ),
        lambda x, scale, bias: scale * alpha_cl_reference(*x, 0.7, importance="power", ids=_tag(len(x[0]), 0, 3)),
        lambda pairs: (pairs, pairs),
    ),
    "ranking": Loss(
        lambda x, scale, bias, first, keys, **options: fastcl.multiple_negatives_ranking_loss(
            x[0], x[1], 1 / scale, negatives=x[2:], directions=DIRECTIONS, ids=_tag(len(x[0]), first, 3), **options
        ),
        lambda x, scale, bias: ranking_reference(
            x[0], x[1], 1 / scale, negatives=x[2:], directions=DIRECTIONS, ids=_tag(len(x[0]), 0, 3)
        ),
        lambda pairs: (pairs, pairs, pairs),
    ),
}


def local_lengths(loss: Loss, pairs: Sequence[int]) -> list[list[int]]:
    """For each feature matrix, its rows on each rank."""
    return [list(of_ranks) for of_ranks in zip(*(loss.lengths(n) for n in pairs), strict=True)]
