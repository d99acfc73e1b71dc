"""The CPU engine against the arithmetic peak of its processor: each loss at each size, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.providers import CPU_ENGINE
from benchmarks.report import markdown_row, read_csv

SMALLEST = 4096
"""rows of the similarity matrix below which overheads and not the arithmetic decide"""


def caption(rows: Sequence[dict[str, str]]) -> str:
    """What the share of the peak means, with the passes and the peaks it was taken at; empty where no row has one."""
    own = _measured(rows)
    if not own:
        return ""
    passes = dict.fromkeys(f"`{row['loss']}` {float(row['floor_passes']):g}" for row in own)
    peaks: dict[str, list[float]] = {}
    for row in own:
        peaks.setdefault(f"{row['dtype']} on {_threads(row)} at {row['level']}", []).append(float(row["peak_gflops"]))
    rates = (f"{kind} {_span(found)} GFLOP/s" for kind, found in peaks.items())
    return (
        f"Of peak: the floor of 2·N·M·D operations a pass ({', '.join(passes)} passes for value and gradients) at the "
        f"rate of multiply-adds on registers alone, over the measured time. That rate, between a case's rounds: "
        f"{', '.join(rates)}."
    )


def table(rows: Sequence[dict[str, str]]) -> str:
    """Losses, dtypes and dims down, rows of the similarity matrix across; empty where there is nothing to show.

    Of a case with several runs it shows the median.
    """
    own = [row for row in _measured(rows) if int(row["rows"]) >= SMALLEST]
    if not own:
        return ""
    sizes = sorted({int(row["rows"]) for row in own})
    lines: dict[tuple[str, str, str], dict[int, list[dict[str, str]]]] = {}
    for row in own:
        cells = lines.setdefault((row["loss"], row["dtype"], row["dim"]), {})
        cells.setdefault(int(row["rows"]), []).append(row)
    note = " In brackets: one thread's time over all threads'." if any(row["thread_scaling"] for row in own) else ""
    return "\n".join(
        [
            f"{caption(own)}{note}",
            "",
            markdown_row("loss", "D", *(f"{n:,} rows" for n in sizes)),
            markdown_row("---", *["--:"] * (len(sizes) + 1)),
            *(
                markdown_row(f"`{loss}` {dtype}", dim, *(_cell(cells.get(n, [])) for n in sizes))
                for (loss, dtype, dim), cells in lines.items()
            ),
        ]
    )


def page_tables(results: Path) -> Mapping[str, str]:
    """By the name of the marker in docs/cpu-engine.md: for each kind of run in ``results/*/engine``, each device."""
    found = {}
    for kind in ("peak", "threads", "avx2"):
        rows = [row for path in sorted(results.glob(f"*/engine/{kind}*.csv")) for row in read_csv(path)]
        devices = dict.fromkeys(row["device"] for row in rows)
        own = ((device, [row for row in rows if row["device"] == device]) for device in devices)
        found[kind] = "\n\n".join(f"**{device}**, {_commits(of)}. {table(of)}" for device, of in own)
    return found


def percent(row: dict[str, str]) -> str:
    """A row's share of the peak, empty in a row that was not measured against one."""
    share = row.get("fraction_of_peak")
    return _percent(float(share)) if share else ""


def _measured(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["provider"] == CPU_ENGINE and percent(row)]


def _cell(runs: Sequence[dict[str, str]]) -> str:
    if not runs:
        return "-"
    share = statistics.median(float(row["fraction_of_peak"]) for row in runs)
    scalings = [float(row["thread_scaling"]) for row in runs if row["thread_scaling"]]
    return _percent(share) + (f" ({statistics.median(scalings):.2f}x)" if scalings else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _commits(rows: Sequence[dict[str, str]]) -> str:
    commits = dict.fromkeys(row["commit"] for row in rows)
    return f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def _span(numbers: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys((f"{min(numbers):,.0f}", f"{max(numbers):,.0f}")))


def _threads(row: dict[str, str]) -> str:
    return f"{row['threads']} thread" + ("s" if row["threads"] != "1" else "")
