"""What a run leaves behind: rows of numbers, a CSV file, a table in the terminal."""

from __future__ import annotations

import csv
import datetime
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import fastcl
from benchmarks.environment import installed_version
from benchmarks.measure import GemmRate, summarize_times
from benchmarks.providers import CPU_ENGINE, CPU_ENGINE_ON_ONE_THREAD
from benchmarks.runner import Result


@dataclass(frozen=True)
class Machine:
    """What a run ran on."""

    device: str
    kind: str
    """cpu | cuda"""
    torch: str
    commit: str
    threads: int
    level: str
    """the instruction-set level of the CPU engine, empty where there is none"""
    rates: dict[str, GemmRate]
    """by dtype"""


@dataclass(frozen=True)
class Row:
    """One line of the CSV file: a provider on a case, and everything needed to know what was measured."""

    date: str
    commit: str
    device: str
    kind: str
    torch: str
    triton: str
    fastcl: str
    loss: str
    pairs: int
    rows: int
    dim: int
    dtype: str
    provider: str
    version: str
    threads: int
    level: str
    status: str
    reason: str
    gate_pairs: int | None
    value_error: float | None
    gradient_error: float | None
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    repeats: int | None
    compile_s: float | None
    peak_mb: float | None
    gradients_mb: float | None
    needed_mb: float | None
    best_peer: str
    speedup: float | None
    """the best peer's median over this one's; the best peer is anyone but fastcl"""
    thread_scaling: float | None
    """the CPU engine's median on one thread over this one's"""
    floor_passes: float
    gemm_gflops: float
    gemm_library: str
    floor_ms: float
    fraction_of_floor: float | None
    """the floor's time over the median: 1 where the loss takes no longer than its products alone by the library"""
    peak_gflops: float | None
    """of as many threads, the median of what was measured between the rounds"""
    fraction_of_peak: float | None
    """the same against the arithmetic peak of the CPU engine's level on these threads, which no code exceeds"""


COLUMNS = tuple(field.name for field in fields(Row))


def make_rows(results: Sequence[Result], machine: Machine) -> list[Row]:
    """The rows of one case's results."""
    timed_peers = [r for r in results if r.provider.is_peer and r.median_ms is not None]
    best = min(timed_peers, key=lambda r: r.median_ms, default=None)
    one_thread = next((r for r in results if r.provider.name == CPU_ENGINE_ON_ONE_THREAD and r.times_ms), None)
    return [_row(result, best, one_thread, machine) for result in results]


def _row(result: Result, best: Result | None, one_thread: Result | None, machine: Machine) -> Row:
    case, rate = result.case, machine.rates[result.case.dtype]
    has_floor = case.floor_passes > 0
    threads = result.provider.threads or machine.threads
    is_engine = result.provider.is_cpu_engine
    peak = statistics.median(result.peaks) if result.peaks and has_floor else None
    if peak and result.times_ms and case.floor_flops > peak * result.median_ms / 1e3:
        # Nothing exceeds it: its threads shared a core.
        peak = None
    scales = one_thread is not None and result.provider.name == CPU_ENGINE
    timing = summarize_times(result.times_ms) if result.times_ms else None
    floor_ms = case.floor_flops / rate.flops * 1e3
    return Row(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        commit=machine.commit,
        device=machine.device,
        kind=machine.kind,
        torch=machine.torch,
        triton=installed_version("triton") or "",
        fastcl=fastcl.__version__,
        loss=case.loss,
        pairs=case.pairs,
        rows=case.rows,
        dim=case.dim,
        dtype=case.dtype,
        provider=result.provider.name,
        version=result.provider.version,
        threads=threads,
        level=machine.level if is_engine else "",
        status=result.status,
        reason=result.reason,
        gate_pairs=result.gate_pairs,
        value_error=_rounded(result.value_error),
        gradient_error=_rounded(result.gradient_error),
        median_ms=_rounded(timing and timing.median_ms),
        p20_ms=_rounded(timing and timing.p20_ms),
        p80_ms=_rounded(timing and timing.p80_ms),
        repeats=timing and timing.repeats,
        compile_s=_rounded(None if result.compile_ms is None else result.compile_ms / 1e3),
        peak_mb=_rounded(_megabytes(result.peak_bytes)),
        gradients_mb=_rounded(_megabytes(result.gradient_bytes)),
        needed_mb=_rounded(_megabytes(result.needed_bytes or None)),
        best_peer=best.provider.name if best else "",
        speedup=_rounded(best.median_ms / timing.median_ms) if best and timing else None,
        thread_scaling=_rounded(one_thread.median_ms / timing.median_ms) if scales and timing else None,
        floor_passes=case.floor_passes,
        gemm_gflops=_rounded(rate.flops / 1e9),
        gemm_library=rate.library,
        floor_ms=_rounded(floor_ms),
        fraction_of_floor=_rounded(floor_ms / timing.median_ms) if timing and has_floor else None,
        peak_gflops=_rounded(peak and peak / 1e9),
        fraction_of_peak=_rounded(case.floor_flops / peak / (timing.median_ms / 1e3)) if peak and timing else None,
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All rows, with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(["" if (x := getattr(row, name)) is None else x for name in COLUMNS] for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that :func:`write_csv` wrote, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


_RATIOS = (
    ("x best peer", lambda row: _times(row.speedup)),
    ("x 1 thread", lambda row: _times(row.thread_scaling)),
    ("of torch.mm", lambda row: _percent(row.fraction_of_floor)),
    ("of peak", lambda row: _percent(row.fraction_of_peak)),
)
"""Columns that are printed where they say something."""


def format_case(rows: Sequence[Row]) -> str:
    """One case's block of the terminal's table, fastest first, those without a time last."""
    first = rows[0]
    title = f"{first.loss}  {first.pairs:,} pairs  dim {first.dim}  {first.dtype}"
    floor = "no floor"
    if first.floor_passes:
        rate = f"{first.gemm_gflops:,.0f} GFLOP/s"
        floor = f"floor {first.floor_passes:g} passes: {first.floor_ms:,.3g} ms at torch.mm's {rate}"
    if (peak := max((row.peak_gflops or 0 for row in rows), default=0)) > 0:
        floor += f", {first.floor_ms * first.gemm_gflops / peak:,.3g} ms at the peak of {peak:,.0f}"
    if len(reasons := {(row.status, row.reason) for row in rows}) == 1 and first.median_ms is None:
        return f"\n{title}: " + ": ".join(reasons.pop())
    ordered = sorted(rows, key=lambda row: math.inf if row.median_ms is None else row.median_ms)
    ratios = [(name, cell) for name, cell in _RATIOS if any(map(cell, rows))]
    header = f"  {'provider':<24}{'ms':>10}  {'20-80 %':<19}{'peak MB':>10}"
    header += "".join(f"  {name}" for name, _ in ratios) + f"  {'error: value':<13}{'gradient':<9}"
    return "\n".join([f"\n{title}   ({floor})", header, *(_line(row, ratios) for row in ordered)])


def _line(row: Row, ratios: Sequence[tuple[str, Callable[[Row], str]]]) -> str:
    errors = f"{_error(row.value_error):<13}{_error(row.gradient_error):<9}"
    if row.median_ms is None:
        return f"  {row.provider:<24}{row.status}: {row.reason}"
    spread = f"{_number(row.p20_ms)} - {_number(row.p80_ms)}" if row.repeats > 1 else "one call"
    compiled = "" if row.compile_s is None else f" (compiled in {row.compile_s:.1f} s)"
    gate = "" if row.gate_pairs == row.pairs else f" at {row.gate_pairs:,} pairs"
    return (
        f"  {row.provider:<24}{_number(row.median_ms):>10}  {spread:<19}{_number(row.peak_mb):>10}"
        f"{''.join(f'  {cell(row):>{len(name)}}' for name, cell in ratios)}  {errors}{gate}{compiled}"
    )


def markdown_row(*cells: str) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f} %"


def _error(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def _megabytes(x: int | None) -> float | None:
    return None if x is None else x / 1e6


def _rounded(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")
