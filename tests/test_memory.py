"""No backend but `dense` takes memory of the order of N x M; threads and strides take none of the order of N x D."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import pytest
import torch

import fastcl
from benchmarks.measure import gradient_step, peak_memory
from fastcl import panels
from fastcl.backends import cpu, tiled
from tests.cases import each_loss_and_backend, make_features
from tests.losses import LOSSES, Loss

PAIRS = 4096
CALLS = 5
"""What a step needs it needs in each of them; what a heap in fragments adds comes and goes."""
M_MMAP_THRESHOLD = -3


@pytest.fixture(autouse=True)
def _freed_memory_is_returned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Larger blocks go back to the system when they are freed, so that none stays resident in a fragmented heap.

    Tiles and panels are as small in proportion as those of a batch that somebody needs fastcl for.
    """
    monkeypatch.setattr(tiled, "_TILE_ON_CPU", 512)
    monkeypatch.setattr(panels, "_PANEL_ON_CPU", 1 << 17)
    with contextlib.suppress(AttributeError):  # glibc has mallopt
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)
    yield
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 25)


@each_loss_and_backend(without=("dense",))
def test_memory_stays_far_below_the_logits(loss: Loss, backend: str | None) -> None:
    features = make_features(loss, PAIRS // len(loss.features) if loss.symmetric else PAIRS, 8, torch.float32)
    step = gradient_step(lambda *inputs: loss.call(inputs, 0.1, backend=backend, reduction="mean"), features)
    step()
    logits_bytes = 4 * PAIRS**2
    assert any(peak_memory(step, "cpu") < logits_bytes / 2 for _ in range(CALLS))


def test_the_measurement_sees_what_dense_takes() -> None:
    loss = next(loss for loss in LOSSES if loss.name == "clip")
    features = make_features(loss, PAIRS // 2, 8, torch.float32)
    step = gradient_step(lambda *inputs: loss.call(inputs, 0.1, backend="dense", reduction="mean"), features)
    assert all(peak_memory(step, "cpu") > 4 * (PAIRS // 2) ** 2 for _ in range(CALLS))


needs_engine = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@needs_engine
def test_threads_share_the_gradient() -> None:
    """One more brings its workspace, of the same size for any batch; a gradient of its own would be 16 MB here."""
    z1, z2 = (torch.randn(2048, 1024, requires_grad=True) for _ in range(2))
    step = gradient_step(lambda x, y: fastcl.nt_xent(x, y, 0.1, backend="cpu"), [z1, z2])

    def least(threads: int) -> int:
        torch.set_num_threads(threads)
        step()
        return min(peak_memory(step, "cpu") for _ in range(CALLS))

    before = torch.get_num_threads()
    try:
        one, eight = least(1), least(8)
    finally:
        torch.set_num_threads(before)
    assert eight - one < 7 * 5e6


@needs_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_strided_half_precision_is_not_copied_to_float32(dtype: torch.dtype) -> None:
    """Beyond what contiguous features take: a copy in float32 would be 16 MB for each of them."""

    def least(features: list[torch.Tensor]) -> int:
        step = gradient_step(lambda x, y: fastcl.clip_loss(x, y, 3.0, backend="cpu"), features)
        step()
        return min(peak_memory(step, "cpu") for _ in range(CALLS))

    features = [torch.randn(4096, 1024).to(dtype) for _ in range(2)]
    transposed = [x.T.contiguous().T.requires_grad_() for x in features]
    assert least(transposed) - least([x.requires_grad_() for x in features]) < 12e6
