"""The one table of losses, shapes, dtypes and backends that the tests and the benchmarks iterate.

A :class:`Loss` pairs a public call with its textbook formula on the same inputs; a new loss is a new row of ``LOSSES``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastcl
from fastcl.engine import BACKENDS
from fastcl.losses.clip import reference as clip_reference
from fastcl.losses.info_nce import reference as info_nce_reference
from fastcl.losses.nt_xent import reference as nt_xent_reference


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


def _shuffled(n: int, m: int, device: torch.device) -> Tensor:
    """A target for each of n queries that is neither the identity nor an involution."""
    return (torch.arange(n, device=device) * 7 + 3) % m


def _info_nce_with_target(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda features, tau, **options: call(
        *features, tau, target=_shuffled(len(features[0]), len(features[1]), features[0].device), **options
    )


def _rows(options: dict[str, object]) -> dict[str, object]:
    return {"reduction": "none"} | options


LOSSES = (
    Loss(
        "nt_xent",
        lambda features, tau, **options: fastcl.nt_xent(*features, tau, **_rows(options)),
        lambda features, tau: nt_xent_reference(*features, tau),
        ("z1", "z2"),
        2,
        (0.5, 1.5),
        2,
    ),
    Loss(
        "info_nce",
        lambda features, tau, **options: fastcl.info_nce(*features, tau, **_rows(options)),
        lambda features, tau: info_nce_reference(*features, tau),
        ("query", "key"),
        3,
        (1.0, 3.0),
        2,
    ),
    Loss(
        "info_nce_target",
        _info_nce_with_target(lambda *args, **options: fastcl.info_nce(*args, **_rows(options))),
        _info_nce_with_target(info_nce_reference),
        ("query", "longer key"),
        3,
        (1.0, 3.0),
        2,
    ),
    Loss(
        "info_nce_negatives",
        lambda features, tau, **options: fastcl.info_nce(
            features[0], features[1], tau, negatives=features[2], **_rows(options)
        ),
        lambda features, tau: info_nce_reference(features[0], features[1], tau, negatives=features[2]),
        ("query", "key", "longer negatives"),
        3,
        (1.0, 3.0),
        2,
    ),
    Loss(
        "clip",
        lambda features, tau, **options: fastcl.clip_loss(*features, 1 / tau, normalize=True, **_rows(options)),
        lambda features, tau: clip_reference(*features, 1 / tau, normalize=True),
        ("image_features", "text_features"),
        4,
        (1.0, 3.0),
        3,
    ),
)

SHAPES = ((1, 3), (2, 1), (7, 5), (33, 17), (129, 65), (300, 96), (1030, 40))
"""(pairs, dim), none a multiple of anything that a tile is"""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""what a backend's relative error may exceed the dense PyTorch formula's by, in the same dtype"""


def available_backends(device: str = "cpu") -> list[str]:
    """The backends that the tests on ``device`` run."""
    names = {"cpu": ("dense", "tiled", "cpu"), "cuda": ("dense", "tiled", "triton", "cuda")}[device]
    return [name for name in names if BACKENDS[name].unavailable() is None]


def seed_of(*key: object) -> int:
    """A seed that differs from case to case and not from run to run."""
    return zlib.crc32(repr(key).encode())


def make_features(
    loss: Loss, pairs: int, dim: int, dtype: torch.dtype, device: str = "cpu", *, noise: float = 0.5
) -> list[Tensor]:
    """Features with planted signal: matching rows are noisy copies of each other. They require grad."""
    generator = torch.Generator().manual_seed(seed_of(loss.name, pairs, dim, str(dtype)))

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64)

    anchor = draw(pairs)
    features = []
    for name in loss.features:
        rows = pairs + pairs // 2 + 1 if name.startswith("longer") else pairs
        x = draw(rows)
        shared = min(rows, pairs)
        x[:shared] = anchor[:shared] + noise * x[:shared]
        features.append(x.to(device=device, dtype=dtype).requires_grad_())
    return features


def value_and_gradients(rows: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The mean over rows, and its gradient with respect to each input."""
    value = rows().mean()
    return value.detach(), list(torch.autograd.grad(value, inputs))


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact| in the Frobenius norm (0 where both vanish)."""
    difference = (x.detach().double() - exact.detach().double()).norm()
    scale = exact.detach().double().norm()
    return float(difference / scale) if scale > 0 else float(difference)
