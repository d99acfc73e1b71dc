"""Time and memory against batch size, one picture for each loss, dim and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Row


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Writes the pictures that have at least two sizes to show; returns lines that say what was written, or why not."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return ["no plots: matplotlib is not installed"]
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if row.median_ms is not None:
            groups.setdefault((row.loss, row.dim, row.dtype), []).append(row)
    lines = []
    for (loss, dim, dtype), group in groups.items():
        if len({row.pairs for row in group}) < 2:
            continue
        figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        for provider in dict.fromkeys(row.provider for row in group):
            own = sorted((row for row in group if row.provider == provider), key=lambda row: row.pairs)
            pairs = [row.pairs for row in own]
            style = {"marker": "o", "markersize": 4, "linewidth": 2.2 if provider.startswith("fastcl") else 1.1}
            time_axes.plot(pairs, [row.median_ms for row in own], label=provider, **style)
            time_axes.fill_between(pairs, [row.p20_ms for row in own], [row.p80_ms for row in own], alpha=0.15)
            memory_axes.plot(pairs, [max(row.peak_mb, 0.1) for row in own], label=provider, **style)
        floor = sorted({(row.pairs, row.floor_ms) for row in group})
        label = f"floor: {group[0].floor_passes:g} passes by {group[0].gemm_library}"
        time_axes.plot(*zip(*floor, strict=True), "k:", linewidth=1, label=label)
        for axes, name in ((time_axes, "forward + backward, ms"), (memory_axes, "peak memory above the inputs, MB")):
            axes.set(xscale="log", yscale="log", xlabel="pairs", ylabel=name)
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        time_axes.legend(fontsize=8)
        figure.suptitle(f"{loss}, dim {dim}, {dtype}: {group[0].device}", fontsize=10)
        path = folder / f"{loss}-{dim}-{dtype}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        lines.append(f"plot: {path}")
    return lines
