"""What the GPU path is held to on an H200; ``python -m benchmarks targets FILE.csv...`` gives the verdict of a run.

Each is a number that is found in the rows of a run (``measured``) and, where the cost model has it, predicted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import MILLION, Case
from benchmarks.report import read_csv

LARGE = 16384
"""rows of the similarity matrix from which the targets against peers hold"""

ResultRow = dict[str, str]
_KEY = ("loss", "pairs", "dim", "dtype")


@dataclass(frozen=True)
class Target:
    """A number with its limit; ``measured`` is None where the rows don't have it."""

    name: str
    limit: float
    unit: str
    measured: Callable[[Sequence[ResultRow]], float | None]
    case: Case | None = None
    """where the target is about one"""
    at_most: bool = False

    def holds(self, number: float) -> bool:
        return number <= self.limit if self.at_most else number >= self.limit

    def show(self, number: float) -> str:
        return f"{100 * number:.0f} %" if self.unit == "%" else f"{number:.3g} {self.unit}"

    @property
    def wanted(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.show(self.limit)}"


def verdicts(rows: Sequence[ResultRow]) -> list[str]:
    """A line for each target: pass, FAIL or not measured, with the number."""
    lines = []
    for target in TARGETS:
        number = target.measured(rows)
        if number is None:
            lines.append(f"not measured  {target.name}: {target.wanted} wanted")
        else:
            verdict = "pass" if target.holds(number) else "FAIL"
            lines.append(f"{verdict:<12}  {target.name}: {target.show(number)}, {target.wanted} wanted")
    return lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks targets", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="CSV files of runs; one that isn't there has no rows")
    options = parser.parse_args(arguments)
    rows = [row for path in options.files if path.exists() for row in read_csv(path)]
    device = next((row["device"] for row in rows if row["kind"] == "cuda"), "no GPU")
    print(f"targets, meant for an H200, on {device}:", *verdicts(rows), sep="\n")
    return 0


def _fraction(case: Case) -> Callable[[Sequence[ResultRow]], float | None]:
    def measured(rows: Sequence[ResultRow]) -> float | None:
        ours = _ours(_of_case(rows, case))
        return float(ours["fraction_of_floor"]) if ours else None

    return measured


def _extra_gigabytes(case: Case) -> Callable[[Sequence[ResultRow]], float | None]:
    def measured(rows: Sequence[ResultRow]) -> float | None:
        ours = _ours(_of_case(rows, case))
        return (float(ours["peak_mb"]) - float(ours["gradients_mb"])) / 1e3 if ours else None

    return measured


def _least_speedup(
    over: str | None = None, *, least_rows: int = 0, case: Case | None = None
) -> Callable[[Sequence[ResultRow]], float | None]:
    """The smallest ratio of a provider's time, or of the best peer's, to ours, over all cases that both have."""

    def measured(rows: Sequence[ResultRow]) -> float | None:
        ratios = []
        for group in _by_case(_of_case(rows, case) if case else rows):
            ours = _ours(group)
            if ours is None or int(ours["rows"]) < least_rows:
                continue
            if over is None:
                ratios += [float(ours["speedup"])] if ours["speedup"] else []
            else:
                times = [float(row["median_ms"]) for row in group if row["provider"] == over and row["median_ms"]]
                ratios += [time / float(ours["median_ms"]) for time in times]
        return min(ratios, default=None)

    return measured


def _by_case(rows: Sequence[ResultRow]) -> Iterable[list[ResultRow]]:
    groups: dict[tuple[str, ...], list[ResultRow]] = {}
    for row in rows:
        if row["kind"] == "cuda":
            groups.setdefault(tuple(row[name] for name in _KEY), []).append(row)
    return groups.values()


def _of_case(rows: Sequence[ResultRow], case: Case) -> list[ResultRow]:
    key = (case.loss, str(case.pairs), str(case.dim), case.dtype)
    return [row for row in rows if key == tuple(row[name] for name in _KEY)]


def _ours(rows: Iterable[ResultRow]) -> ResultRow | None:
    timed = [row for row in rows if row["provider"].startswith("fastcl") and row["median_ms"]]
    return min(timed, key=lambda row: float(row["median_ms"]), default=None)


def _of_the_floor(loss: str, pairs: int, dim: int, limit: float) -> Target:
    case = Case(loss, pairs, dim, "bfloat16")
    return Target(f"{loss} of {case.rows:,} rows x {dim}, of the floor", limit, "%", _fraction(case), case)


_SMALL, _LARGEST = Case("nt_xent", 256, 128, "bfloat16"), Case("clip", MILLION, 512, "bfloat16")

TARGETS = (
    _of_the_floor("clip", 32768, 512, 0.75),
    _of_the_floor("clip", 32768, 1024, 0.75),
    _of_the_floor("nt_xent", 16384, 512, 0.70),
    _of_the_floor("nt_xent", 16384, 128, 0.55),
    Target(f"best peer's time over ours, N >= {LARGE:,}", 1.5, "x", _least_speedup(least_rows=LARGE)),
    Target(
        f"torch.compile's time over ours, N >= {LARGE:,}", 2.5, "x", _least_speedup("torch.compile", least_rows=LARGE)
    ),
    Target("best peer's time over ours, any case", 1.0, "x", _least_speedup()),
    Target(
        "dense eager's time over ours, nt_xent of 256 pairs x 128",
        1.0,
        "x",
        _least_speedup("dense eager", case=_SMALL),
        _SMALL,
    ),
    Target(
        "clip of 1,048,576 rows x 512, memory beyond inputs and gradients",
        4.0,
        "GB",
        _extra_gigabytes(_LARGEST),
        _LARGEST,
        at_most=True,
    ),
)
