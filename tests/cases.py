"""Shapes, dtypes, backends and inputs for the losses of ``losses.py``, and how a result is judged."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Container, Iterable

import pytest
import torch
from torch import Tensor

from fastcl.engine import BACKENDS
from tests.losses import LOSSES, PLAIN, Loss


@functools.cache
def refusal(loss: Loss, backend: str | None, device: str = "cpu") -> str | None:
    """Why a backend doesn't compute a loss, in its own words, or None."""
    features = make_features(loss, 2, 1, torch.float32, device)
    try:
        loss.call(features, 0.5, backend=backend)
    except ValueError as error:
        if "can't compute this call" in str(error) or "backend must be None" in str(error):
            return str(error)
        raise
    return None


def require(loss: Loss, backend: str | None, device: str = "cpu") -> None:
    """Skip the running test, with the reason, where the backend doesn't compute the loss."""
    if reason := refusal(loss, backend, device):
        pytest.skip(f"{loss.name}: {reason}")


SHAPES = ((1, 3), (2, 1), (7, 5), (33, 17), (129, 65), (300, 96), (1030, 40))
"""(pairs, dim), none a multiple of anything that a tile is"""


def shapes_of(loss: Loss, backend: str | None) -> tuple[tuple[int, int], ...]:
    """All shapes for the losses with kernels of their own, which is where tiles and panels are; else a few.

    A large one is for the engines, whose tiles are large.
    """
    if loss.by_panels or loss.backends == PLAIN:
        return SHAPES[0], SHAPES[3], SHAPES[4]
    is_engine = backend in ("cpu", "triton", "cuda")
    if loss.thorough and not loss.variant:
        return SHAPES if is_engine else SHAPES[:-1]
    return SHAPES[0], SHAPES[3], SHAPES[-1 if is_engine else -2]


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""what a backend's relative error may exceed the dense PyTorch formula's by, in the same dtype"""


def available_backends(device: str = "cpu") -> list[str]:
    """The backends that the tests on ``device`` run."""
    names = {"cpu": ("dense", "tiled", "cpu"), "cuda": ("dense", "tiled", "triton", "cuda")}[device]
    return [name for name in names if BACKENDS[name].unavailable() is None]


def backends_of(loss: Loss, device: str = "cpu") -> list[str | None]:
    """The available backends that may compute a loss; None is its own choice."""
    available = available_backends(device)
    return [name for name in loss.backends if name is None or name in available]


def each_loss_and_backend(losses: Iterable[Loss] = LOSSES, without: Container[str] = ()) -> pytest.MarkDecorator:
    """Parametrises ``loss`` and ``backend`` with what there is of the two on a CPU."""
    pairs = [(loss, backend) for loss in losses for backend in backends_of(loss) if backend not in without]
    return pytest.mark.parametrize(
        ("loss", "backend"), [pytest.param(*pair, id=f"{pair[0].name}-{pair[1] or 'own'}") for pair in pairs]
    )


def seed_of(*key: object) -> int:
    """A seed that differs from case to case and not from run to run."""
    return zlib.crc32(repr(key).encode())


def make_features(
    loss: Loss, pairs: int, dim: int, dtype: torch.dtype, device: str = "cpu", *, noise: float = 0.5
) -> list[Tensor]:
    """Features with planted signal: matching rows are noisy copies of each other. They require grad."""
    # The same numbers on every device, but for a GPU's largest batches, which would take a processor a minute.
    source = ("cpu", torch.float64) if pairs * dim < 1 << 28 else (device, torch.float32)
    generator = torch.Generator(source[0]).manual_seed(seed_of(loss.name, pairs, dim, str(dtype)))

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, device=source[0], dtype=source[1])

    anchor = draw(pairs)
    features = []
    for rows in loss.lengths(pairs):
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
