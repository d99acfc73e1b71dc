"""No backend but `dense` takes memory of the order of N x M; threads and strides take none of the order of N x D.

All is measured in one process that does nothing else: what a test left in fragments of the heap would be counted here.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

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
M_MMAP_THRESHOLD = -3

Measured = Callable[..., int]


def _start() -> None:
    """Tiles and panels are as small in proportion as those of a batch that somebody needs fastcl for.

    The larger blocks go back to the system when they are freed.
    """
    torch.set_num_threads(1)
    tiled._TILE_ON_CPU = 512
    panels._PANEL_ON_CPU = 1 << 17
    with contextlib.suppress(AttributeError):  # glibc has mallopt
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    """``measured(function, *arguments)`` is what a function of this module returns in the process that measures."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_start) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def bytes_of_loss(name: str, backend: str | None, pairs: int) -> int:
    loss = next(loss for loss in LOSSES if loss.name == name)

    def step(pairs: int) -> Callable[[], object]:
        features = make_features(loss, pairs, 8, torch.float32)
        return gradient_step(lambda *x: loss.call(x, 0.1, backend=backend, reduction="mean"), features)

    step(32)()
    return peak_memory(step(pairs), "cpu")


def _least(step: Callable[[], object]) -> int:
    """What a step needs it needs in each call; what the allocator adds comes and goes."""
    step()
    return min(peak_memory(step, "cpu") for _ in range(CALLS))


def bytes_of_nt_xent(threads: int) -> int:
    views = [torch.randn(2048, 1024, requires_grad=True) for _ in range(2)]
    torch.set_num_threads(threads)
    try:
        return _least(gradient_step(lambda x, y: fastcl.nt_xent(x, y, 0.1, backend="cpu"), views))
    finally:
        torch.set_num_threads(1)


def bytes_of_clip(dtype: torch.dtype, transposed: bool) -> int:
    features = [torch.randn(4096, 1024).to(dtype) for _ in range(2)]
    if transposed:
        features = [x.T.contiguous().T for x in features]
    features = [x.requires_grad_() for x in features]
    return _least(gradient_step(lambda x, y: fastcl.clip_loss(x, y, 3.0, backend="cpu"), features))


@each_loss_and_backend(without=("dense",))
def test_memory_stays_far_below_the_logits(loss: Loss, backend: str | None, measured: Measured) -> None:
    pairs = PAIRS // len(loss.features) if loss.symmetric else PAIRS
    assert measured(bytes_of_loss, loss.name, backend, pairs) < 4 * PAIRS**2 / 2


def test_the_measurement_sees_what_dense_takes(measured: Measured) -> None:
    pairs = PAIRS // 2
    assert all(measured(bytes_of_loss, "clip", "dense", pairs) > 4 * pairs**2 for _ in range(CALLS))


needs_engine = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@needs_engine
def test_threads_share_the_gradient(measured: Measured) -> None:
    """Seven more bring their workspaces, of the same size for any batch; one gradient more would be 16 MB here."""
    assert measured(bytes_of_nt_xent, 8) - measured(bytes_of_nt_xent, 1) < 16e6


@needs_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_strided_half_precision_is_not_copied_to_float32(dtype: torch.dtype, measured: Measured) -> None:
    """Beyond what contiguous features take: a copy in float32 would be 16 MB for each of them."""
    assert measured(bytes_of_clip, dtype, True) - measured(bytes_of_clip, dtype, False) < 12e6
