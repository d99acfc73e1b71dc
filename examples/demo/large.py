"""The largest batch that this machine can do within a time limit, and what the dense loss would have needed for it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import fastcl
from benchmarks.measure import available_bytes, dense_bytes, gradient_step, peak_memory, time_step
from examples.demo.reference import exact_row_losses, views
from examples.demo.table import number

_CHECKED_ROWS = 64
_PROBE_S = 0.3


def run_large_batch(dim: int, tau: float, device: str, limit_s: float) -> None:
    """Predict from a small batch which power of two takes less than ``limit_s``, run it, and check some of its rows."""
    pairs, seconds = _measured_rate(dim, tau, device)
    while 4 * seconds < limit_s and _fits(2 * pairs, dim, device):
        pairs, seconds = 2 * pairs, 4 * seconds
    print(f"{pairs:,} pairs of dim {dim}: {seconds:.0f} s predicted from this machine's rate", flush=True)

    inputs = views(pairs, dim, device)
    losses: list[Tensor] = []

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        rows = fastcl.nt_xent(z1, z2, tau, reduction="none")
        losses.append(rows.detach())
        return rows.mean()

    start = time.perf_counter()
    with _ticker(seconds):
        peak = peak_memory(gradient_step(loss, inputs), device)
    took = time.perf_counter() - start
    dense = dense_bytes(2 * pairs, 2 * pairs, copies=1)
    print(f"value and gradient in {took:.1f} s, with {peak / 1e6:,.0f} MB above the inputs")
    print(f"one dense copy of its {2 * pairs:,} x {2 * pairs:,} logits would have needed {number(dense / 1e9)} GB")

    checked = torch.linspace(0, 2 * pairs - 1, _CHECKED_ROWS, dtype=torch.float64).long().to(device)
    exact = exact_row_losses(*inputs, tau, checked)
    error = torch.linalg.vector_norm(losses[0][checked] - exact) / torch.linalg.vector_norm(exact)
    print(f"relative error of the losses of {_CHECKED_ROWS} of its rows against float64: {error.item():.0e}")


def _measured_rate(dim: int, tau: float, device: str) -> tuple[int, float]:
    """A batch that is large enough to tell the rate, and its seconds."""
    pairs, seconds = 2048, 0.0
    while seconds < _PROBE_S:
        pairs *= 2
        step = gradient_step(lambda a, b: fastcl.nt_xent(a, b, tau), views(pairs, dim, device))
        seconds = time_step(step, device, budget_s=_PROBE_S, warmup=1, least=1).median_ms / 1e3
    return pairs, seconds


def _fits(pairs: int, dim: int, device: str) -> bool:
    # Two views and their gradients, the normalised rows and theirs, and room for the check in float64.
    return 8 * dense_bytes(2 * pairs, dim, torch.float64, copies=1) < available_bytes(device)


@contextmanager
def _ticker(predicted_s: float) -> Iterator[None]:
    """Elapsed seconds while one long operation runs; it releases the interpreter lock, so a thread can tell."""
    live = sys.stdout.isatty()
    done = threading.Event()
    start = time.perf_counter()

    def tell() -> None:
        while not done.wait(0.5 if live else 10):
            elapsed = time.perf_counter() - start
            filled = min(30, round(30 * elapsed / max(predicted_s, 1e-3)))
            bar = f"  [{'#' * filled}{'.' * (30 - filled)}] {elapsed:.0f} of about {predicted_s:.0f} s"
            print(f"\r{bar}" if live else bar, end="" if live else "\n", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if live:
            print("\r\x1b[2K", end="", flush=True)
