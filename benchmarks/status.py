"""The tables of README and docs/cpu-engine.md, from what is in ``benchmarks/results``, those of docs/gpu-kernels.md,
from the cost model, and those of docs/losses.md, from trying every loss.

``python -m benchmarks status`` rewrites what stands between the pages' markers; ``--check`` only says whether it is
what it would write. ``results/compiled.json`` is written by hand: devices for which CI compiles a backend ahead of time
and checks what came out, without running it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import family, peak_table, predictions
from benchmarks.environment import device_slug
from benchmarks.report import markdown_row, read_csv
from fastcl.engine import BACKENDS

ROOT = Path(__file__).resolve().parent
MEASURED, COMPILED, NOT_YET, ELSEWHERE = "run and measured", "compiled and checked", "not yet", "-"
KINDS = {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}
"""Kinds of devices a backend is made for; those that aren't here run anywhere."""

ResultRow = dict[str, str]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks status", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is stale")
    parser.add_argument("--readme", type=Path, default=ROOT.parent / "README.md")
    parser.add_argument("--cpu-page", type=Path, default=ROOT.parent / "docs" / "cpu-engine.md")
    parser.add_argument("--gpu-page", type=Path, default=ROOT.parent / "docs" / "gpu-kernels.md")
    parser.add_argument("--losses-page", type=Path, default=ROOT.parent / "docs" / "losses.md")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args(arguments)
    readme = readme_tables(load_results(options.results), load_compiled(options.results))
    pages = (
        (options.readme, readme),
        (options.cpu_page, peak_table.page_tables(options.results)),
        (options.gpu_page, predictions.page_tables()),
        (options.losses_page, family.page_tables()),
    )
    stale = [_refresh(path, tables, write=not options.check) for path, tables in pages]
    return int(options.check and any(stale))


def _refresh(path: Path, tables: Mapping[str, str], *, write: bool) -> bool:
    """Whether the page's tables were stale; they are fresh afterwards if ``write``."""
    old = new = path.read_text()
    for name, table in tables.items():
        new = _between(new, name, table)
    if old == new:
        print(f"{path} is up to date")
    elif write:
        path.write_text(new)
        print(f"wrote the tables in {path}")
    else:
        print(f"{path} is stale: run `python -m benchmarks status`", file=sys.stderr)
    return old != new


def load_results(folder: Path) -> list[ResultRow]:
    """All rows of all devices."""
    return [row for path in sorted(folder.glob("*/*.csv")) for row in read_csv(path)]


def load_compiled(folder: Path) -> list[dict]:
    """Devices for which something was compiled and checked."""
    path = folder / "compiled.json"
    return json.loads(path.read_text()) if path.exists() else []


def readme_tables(results: Sequence[ResultRow], compiled: Sequence[dict]) -> dict[str, str]:
    """By the name of the README's marker."""
    return {"status": status_table(results, compiled), "measured": measured_table(results)}


def status_table(results: Sequence[ResultRow], compiled: Sequence[dict]) -> str:
    """Devices down, backends across."""
    kinds = {row["device"]: row["kind"] for row in results}
    measured = {(row["device"], row["provider"].removeprefix("fastcl ")) for row in results if _is_timed_fastcl(row)}
    for entry in compiled:
        kinds.setdefault(entry["device"], entry["kind"])
    checked = {(entry["device"], backend) for entry in compiled for backend in entry["backends"]}
    lines = [markdown_row("device", *(f"`{name}`" for name in BACKENDS)), markdown_row(*["---"] * (len(BACKENDS) + 1))]
    for device, kind in kinds.items():
        cells = []
        for backend in BACKENDS:
            if kind not in KINDS.get(backend, (kind,)):
                cells.append(ELSEWHERE)
            elif (device, backend) in measured:
                cells.append(MEASURED)
            else:
                cells.append(COMPILED if (device, backend) in checked else NOT_YET)
        lines.append(markdown_row(device, *cells))
    return "\n".join(lines)


def measured_table(results: Sequence[ResultRow]) -> str:
    """For each device, loss, dim and dtype: the largest batch that a peer managed, and the largest of all."""
    if not results:
        return "Nothing measured yet."
    parts = []
    for device in dict.fromkeys(row["device"] for row in results):
        own = [row for row in results if row["device"] == device]
        first = own[0]
        rates: dict[str, str] = {}
        for row in own:
            rate = f"{row['dtype']} {float(row['gemm_gflops']):,.0f} GFLOP/s ({row['gemm_library']})"
            rates.setdefault(row["dtype"], rate)
        columns = [
            "loss",
            "pairs x dim",
            "fastcl",
            "best peer",
            "faster",
            "eager",
            "`torch.compile`",
            "peak MB",
            "eager's",
        ]
        caption = peak_table.caption(own)
        if caption:
            columns.insert(3, "of peak")
        link = f"[all numbers](benchmarks/results/{device_slug(device)})"
        parts += [
            f"**{device}**, torch {first['torch']}, commit {first['commit']}, {first['date']}; {link}. "
            f"`torch.mm`: {', '.join(rates.values())}. {caption}".rstrip(),
            "",
            markdown_row(*columns),
            markdown_row("---", *["--:"] * (len(columns) - 1)),
            *_measured_lines(own, of_peak=bool(caption)),
            "",
        ]
    return "\n".join(parts).rstrip()


def _measured_lines(rows: Sequence[ResultRow], *, of_peak: bool) -> list[str]:
    groups: dict[tuple[str, str, str], dict[int, list[ResultRow]]] = {}
    for row in rows:
        sizes = groups.setdefault((row["loss"], row["dim"], row["dtype"]), {})
        sizes.setdefault(int(row["pairs"]), []).append(row)
    lines = []
    for (loss, dim, dtype), sizes in groups.items():
        ours = [n for n in sizes if any(map(_is_timed_fastcl, sizes[n]))]
        contested = [n for n in ours if any(row["speedup"] for row in sizes[n])]
        for pairs in sorted({max(chosen) for chosen in (contested, ours) if chosen}):
            lines.append(_measured_line(f"`{loss}` {dtype}", f"{pairs:,} x {dim}", sizes[pairs], of_peak=of_peak))
    return lines


def _measured_line(loss: str, size: str, rows: Sequence[ResultRow], *, of_peak: bool) -> str:
    ours = min(filter(_is_timed_fastcl, rows), key=lambda row: float(row["median_ms"]))
    by_name = {row["provider"]: row for row in rows}
    best = by_name.get(ours["best_peer"])
    eager = by_name.get("dense eager", {})
    return markdown_row(
        loss,
        size,
        f"{_time(ours)} (`{ours['provider'].removeprefix('fastcl ')}`)",
        *([peak_table.percent(ours) or ELSEWHERE] if of_peak else []),
        f"{_time(best)} ({best['provider']})" if best else ELSEWHERE,
        f"{float(ours['speedup']):.1f}x" if ours["speedup"] else ELSEWHERE,
        _time(eager),
        _time(by_name.get("torch.compile")),
        _size(ours.get("peak_mb")),
        _size(eager.get("peak_mb"))
        or (f"would need {_size(eager['needed_mb'])}" if eager.get("needed_mb") else ELSEWHERE),
    )


def _is_timed_fastcl(row: ResultRow) -> bool:
    return row["provider"].removeprefix("fastcl ") in BACKENDS and row["status"] == "ok"


def _time(row: ResultRow | None) -> str:
    if not row or not row["median_ms"]:
        return ELSEWHERE
    ms = float(row["median_ms"])
    return f"{ms / 1e3:,.1f} s" if ms >= 10_000 else f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def _size(megabytes: str | None) -> str:
    return f"{float(megabytes):,.0f}" if megabytes else ""


def _between(text: str, name: str, content: str) -> str:
    """The text with fresh content; ValueError where a marker is missing."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no <!-- {name}:begin --> … <!-- {name}:end --> to write between")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)
