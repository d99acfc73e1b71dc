"""demo.png: time and memory against batch, and the two loss curves."""

from __future__ import annotations

from pathlib import Path

from examples.demo.digits import TAU, Digits
from examples.demo.table import COMPILED, EAGER, FASTCL, LOSSES, Cells, Measured

_COLORS = {EAGER: "#9a9a9a", COMPILED: "#d98a29", FASTCL: "#1f6fb4"}
_MARKERS = {EAGER: "s", COMPILED: "D", FASTCL: "o"}


def draw(cells: Cells, digits: Digits, title: str, path: Path) -> None:
    """Write the picture to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.color": "#e6e6e6", "axes.axisbelow": True})
    figure, (time, memory, curve) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    plain = FuncFormatter(lambda x, _: f"{x:g}" if x < 1000 else f"{x:,.0f}")

    for axes, value in ((time, lambda cell: cell.ms), (memory, lambda cell: cell.peak / 1e6)):
        for loss in LOSSES:
            points = [
                (p, value(c)) for (p, name), c in sorted(cells.items()) if name == loss and isinstance(c, Measured)
            ]
            if points:
                style = {"color": _COLORS[loss], "marker": _MARKERS[loss], "linewidth": 2, "markersize": 6}
                axes.plot(*zip(*points, strict=True), label=loss, **style)
        sizes = sorted({pairs for pairs, _ in cells})
        axes.set(xscale="log", yscale="log", xlabel="pairs in the batch", xticks=sizes)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_formatter(plain)
    time.set(title="Time of forward + backward", ylabel="ms")
    time.legend(frameon=False)
    memory.set(title="Peak memory above the inputs", ylabel="MB")

    fast, dense = digits.curves["fastcl"], digits.curves["dense"]
    curve.plot(dense, color=_COLORS[EAGER], linewidth=5, alpha=0.6, label="dense")
    curve.plot(fast, color=_COLORS[FASTCL], linewidth=1.3, label="fastcl")
    curve.set(title="SimCLR on digits, same seed", xlabel="step", ylabel=f"NT-Xent at tau {TAU:g}")
    curve.legend(frameon=False, loc="upper right")
    accuracies = "\n".join(f"{name}: {100 * accuracy:.0f} %" for name, accuracy in digits.accuracies.items())
    note = f"largest difference {digits.largest_difference():.3f}\n\naccuracy from one label per digit\n{accuracies}"
    curve.text(0.97, 0.72, note, transform=curve.transAxes, ha="right", va="top", fontsize=9, color="#444444")

    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
