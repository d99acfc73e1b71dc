"""Time, memory and error of the dense loss, the compiled dense loss and fastcl, from 512 pairs to 8,192."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastcl
from benchmarks.measure import (
    Errors,
    ValueAndGradients,
    available_bytes,
    dense_bytes,
    gradient_step,
    peak_memory,
    relative_errors,
    time_step,
)
from examples.demo.compiled import CompiledDense
from examples.demo.reference import dense_nt_xent, exact_nt_xent, views

LOSSES = ("dense, eager", "dense, torch.compile", "fastcl")
EAGER, COMPILED, FASTCL = LOSSES
_CELL, _PENDING = 23, "..."


@dataclass(frozen=True)
class Measured:
    """One loss at one batch size."""

    ms: float
    peak: int
    errors: Errors

    def __str__(self) -> str:
        errors = f"{_short(self.errors.value)} {_short(self.errors.gradient)}"
        return f"{number(self.ms):>6} {number(self.peak / 1e6):>5} {errors:>10}"


@dataclass(frozen=True)
class LeftOut:
    """A loss that was not run, and why."""

    reason: str

    def __str__(self) -> str:
        return self.reason


Cells = dict[tuple[int, str], Measured | LeftOut]


def measure_loss(
    loss: Callable[[Tensor, Tensor], Tensor], inputs: Sequence[Tensor]
) -> tuple[float, int, ValueAndGradients]:
    """Milliseconds of forward and backward, their peak memory in bytes, and what they computed.

    The median of the calls that fit into half a second, three at least; a call that takes seconds is timed once.
    """
    device = inputs[0].device
    step = gradient_step(loss, inputs)
    calls: list[tuple[float, ValueAndGradients]] = []

    def timed() -> None:
        start = time.perf_counter()
        found = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls.append(((time.perf_counter() - start) * 1e3, found))

    peak = peak_memory(timed, device)
    ms, found = calls[0]
    if ms < 1500:
        ms = time_step(step, device, budget_s=0.5, warmup=0, least=3).median_ms
    return ms, peak, found


def fill_table(sizes: Sequence[int], dim: int, tau: float, device: str, compiled: CompiledDense) -> Cells:
    """Measure and show everything; the dense loss only where it fits into memory."""
    mine = {EAGER: dense_nt_xent, FASTCL: fastcl.nt_xent}
    with compiled.paused():
        for loss in mine.values():  # libraries load, threads start and warnings come in the first call
            gradient_step(lambda a, b, loss=loss: loss(a, b, tau), views(64, dim, device))()
    table = _LiveTable(sizes)
    exact: dict[int, ValueAndGradients] = {}

    def record(pairs: int, loss: str, result: tuple[float, int, ValueAndGradients]) -> None:
        ms, peak, found = result
        if pairs not in exact:
            exact[pairs] = exact_nt_xent(*views(pairs, dim, device), tau)
        moved = ValueAndGradients(found.value.to(device), tuple(g.to(device) for g in found.gradients))
        table.set(pairs, loss, Measured(ms, peak, relative_errors(moved, exact[pairs])))

    for pairs in sizes:
        short = too_large(pairs, device)
        for name, loss in mine.items():
            if name == EAGER and short:
                table.set(pairs, name, short)
                continue
            with compiled.paused():
                result = measure_loss(lambda a, b, loss=loss: loss(a, b, tau), views(pairs, dim, device))
            record(pairs, name, result)
    failure = compiled.failure()
    for pairs in sizes:
        short = LeftOut("failed") if failure else too_large(pairs, device)
        if short:
            table.set(pairs, COMPILED, short)
        else:
            record(pairs, COMPILED, compiled.measure(pairs))
    if failure:
        print(f"torch.compile failed: {failure}")
    return table.cells


def largest_measured(cells: Cells, loss: str) -> int | None:
    """The largest batch at which a loss was measured."""
    return max((p for (p, name), cell in cells.items() if name == loss and isinstance(cell, Measured)), default=None)


def number(x: float) -> str:
    """Three digits, or all before the point.

    >>> number(1.234), number(12.34), number(4123.4)
    ('1.23', '12.3', '4,123')
    """
    return f"{x:.2f}" if x < 9.995 else f"{x:.1f}" if x < 99.95 else f"{x:,.0f}"


def _short(error: float) -> str:
    # 2e-7, not 2e-07: the table has to fit into 80 columns.
    return f"{error:.0e}".replace("e-0", "e-").replace("e+00", "")


def too_large(pairs: int, device: str) -> LeftOut | None:
    """Why the dense loss of so many pairs must not be tried, or None where it fits into memory."""
    needs, has = dense_bytes(2 * pairs, 2 * pairs), available_bytes(device)
    # A fifth is left to others: what is free now may not be free in a second.
    return LeftOut(f"needs {needs / 1e9:.1f} of {has / 1e9:.1f} GB") if needs > 0.8 * has else None


class _LiveTable:
    """Fills itself in place on a terminal; elsewhere a row is printed before and after torch.compile is measured."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.cells: Cells = {}
        self._sizes = sizes
        self._printed = 0
        self._live = sys.stdout.isatty() and shutil.get_terminal_size().columns >= 80
        print(
            "ms of forward + backward, peak MB above the inputs, relative errors of value and\ngradient against float64"
        )
        print()
        print(f"{'':5}" + "".join(f"  {name:^{_CELL}}" for name in LOSSES).rstrip())
        print(f"{'pairs':5}" + f"  {'ms':>6} {'MB':>5} {'errors':>10}" * len(LOSSES))
        if self._live:
            print("\n".join(map(self._row, sizes)), flush=True)

    def set(self, pairs: int, loss: str, cell: Measured | LeftOut) -> None:
        self.cells[pairs, loss] = cell
        if self._live:
            print(f"\x1b[{len(self._sizes)}A" + "\n".join("\x1b[2K" + self._row(p) for p in self._sizes), flush=True)
            return
        # The rows without torch.compile come first: it is still compiling.
        if loss != COMPILED and all((pairs, name) in self.cells for name in LOSSES if name != COMPILED):
            print(self._row(pairs), flush=True)
        for p in self._sizes[self._printed :]:
            if any((p, name) not in self.cells for name in LOSSES):
                break
            print(self._row(p), flush=True)
            self._printed += 1

    def _row(self, pairs: int) -> str:
        cells = (str(self.cells.get((pairs, name), _PENDING)) for name in LOSSES)
        return f"{pairs:5,}" + "".join(f"  {cell:>{_CELL}}" for cell in cells)
