"""``python -m benchmarks roofline``: what the cost model predicts for a device, as tables and a plot.

The same tables stand in docs/gpu-kernels.md; ``python -m benchmarks status`` writes them and checks them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.around import dense
from benchmarks.cases import Case
from benchmarks.devices import DEVICES, Device
from benchmarks.report import markdown_row
from benchmarks.roofline import (
    LAUNCH,
    PASSES,
    PLANS,
    PRECISIONS,
    Prediction,
    backend_plan,
    crossover,
    predict,
    predicted_seconds,
)
from benchmarks.targets import TARGETS, Target

ROWS = 32768
DIMS = (64, 128, 256, 512, 1024, 2048)
PAGE_DEVICE = "h200"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks roofline", description=__doc__)
    parser.add_argument("--device", choices=tuple(DEVICES), default=PAGE_DEVICE)
    parser.add_argument("--rates", type=Path, help="a file of `python -m benchmarks rates`, instead of figures")
    parser.add_argument("--rows", type=_numbers, default=(2048, 8192, ROWS, 131072), help="rows of S, comma-separated")
    parser.add_argument("--dims", type=_numbers, default=DIMS, help="D, comma-separated")
    parser.add_argument("--dtypes", type=_dtypes, default=("bfloat16",), help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the plot")
    options = parser.parse_args(arguments)
    device = DEVICES[options.device]
    if options.rates:
        device = with_rates(device, json.loads(options.rates.read_text()))
    print(describe(device), "Not run on a GPU yet: predictions.", sep="\n")
    for dtype in options.dtypes:
        for rows in options.rows:
            print(f"\n{rows:,} rows, {dtype}", case_table(device, rows, options.dims, dtype), sep="\n")
    print("\ntargets", target_table(device), "", remedy_table(device), sep="\n")
    print("\nsmallest D from which W panels beat accumulators in registers", crossover_table([device]), sep="\n")
    print(f"\n{draw(device, options.dims, options.dtypes, options.out)}")
    return 0


def with_rates(device: Device, rates: dict[str, float]) -> Device:
    """The device at rates that were measured: FLOP/s by dtype, bytes/s of ``copy``."""
    measured = {PRECISIONS[dtype].library: rates[dtype] for dtype in PRECISIONS if dtype in rates}
    return replace(device, gemm={**device.gemm, **measured}, copy=rates.get("copy", device.copy))


def describe(device: Device) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:,.0f}" for name, rate in device.gemm.items())
    return (
        f"{device.name}: {device.sms} SMs at {device.clock / 1e9:.2f} GHz, products at {rates} TFLOP/s, "
        f"copy at {device.copy / 1e12:.2g} TB/s ({device.sources})"
    )


def case_table(device: Device, rows: int, dims: Iterable[int], dtype: str = "bfloat16") -> str:
    """Losses and D down, plans across: milliseconds, the share of the floor, what costs most besides the products."""
    lines = [
        markdown_row("loss", "D", "floor, ms", *(f"{plan}, ms" for plan in PLANS), "of the floor", "costs most"),
        markdown_row("---", *["--:"] * (3 + len(PLANS)), "---"),
    ]
    for loss in PASSES:
        for dim in dims:
            case = case_of(loss, rows, dim, dtype)
            found = {plan: predict(case, device, plan, dtype) for plan in PASSES[loss]}
            cells = [_ms(found[plan].seconds) if plan in found else "-" for plan in PLANS]
            now = found[backend_plan(case, device, dtype)]
            lines.append(
                markdown_row(f"`{loss}`", f"{dim:,}", _ms(now.floor), *cells, f"{now.fraction:.0%}", _bound(now))
            )
    return "\n".join(lines)


def target_table(device: Device) -> str:
    """Each target of benchmarks/targets.py against the model."""
    lines = [markdown_row("target", "wanted", "predicted", "predicted to hold", "why"), markdown_row(*["---"] * 5)]
    for target in TARGETS:
        number, why = _predicted(target, device)
        if number is None:
            cells = ("-", "not modelled", why)
        else:
            cells = (target.show(number), "yes" if target.holds(number) else "**no**", why)
        lines.append(markdown_row(target.name, target.wanted, *cells))
    return "\n".join(lines)


def crossover_table(devices: Sequence[Device]) -> str:
    """For each loss the D from which the panels win."""
    lines = [markdown_row("device", *(f"`{loss}`" for loss in PASSES)), markdown_row("---", *["--:"] * len(PASSES))]
    for device in devices:
        depths = [crossover(loss, device, case_of(loss, ROWS, 64).pairs) for loss in PASSES]
        lines.append(markdown_row(device.name, *(f"{depth:,}" if depth else "none" for depth in depths)))
    return "\n".join(lines)


REMEDIES = {
    "as it is": (),
    "epilogue and latency hidden": ("latency", "exps", "issue"),
    "operands for nothing, too": ("latency", "exps", "issue", "shared", "l2"),
    "PyTorch around for nothing, too": ("latency", "exps", "issue", "shared", "l2", "around"),
}
"""What a warp-specialised kernel hides, larger tiles or clusters share, and fused normalisation saves."""


def remedy_table(device: Device) -> str:
    """The share of the floor in the targets' cases, were more and more of the costs nothing."""
    lines = [markdown_row("case", "wanted", *REMEDIES), markdown_row("---", *["--:"] * (1 + len(REMEDIES)))]
    for target in TARGETS:
        if target.case is None or target.unit != "%":
            continue
        floor = predict(target.case, device).floor
        shares = [floor / predicted_seconds(target.case, device, free=free) for free in REMEDIES.values()]
        name = f"`{target.case.loss}`, D = {target.case.dim:,}"
        lines.append(markdown_row(name, f"{target.limit:.0%}", *(f"{share:.0%}" for share in shares)))
    return "\n".join(lines)


def device_table(devices: Sequence[Device]) -> str:
    """The share of the floor at D = 512 and 1,024 on every device."""
    dims = (512, 1024)
    columns = [(loss, dim) for loss in PASSES for dim in dims]
    lines = [
        markdown_row("device", *(f"`{loss}` D = {dim:,}" for loss, dim in columns)),
        markdown_row("---", *["--:"] * len(columns)),
    ]
    for device in devices:
        shares = [predict(case_of(loss, ROWS, dim), device).fraction for loss, dim in columns]
        lines.append(markdown_row(device.name, *(f"{share:.0%}" for share in shares)))
    return "\n".join(lines)


def page_tables() -> dict[str, str]:
    """What stands between the markers of docs/gpu-kernels.md."""
    device = DEVICES[PAGE_DEVICE]
    return {
        "predictions": f"{describe(device)}.\n\n{case_table(device, ROWS, DIMS[1:5])}",
        "targets": target_table(device),
        "remedies": remedy_table(device),
        "devices": device_table(list(DEVICES.values())),
        "crossover": crossover_table(list(DEVICES.values())),
    }


def draw(device: Device, dims: Sequence[int], dtypes: Sequence[str], folder: Path) -> str:
    """Writes the share of the floor against D, for each loss and plan; says what was written, or why not."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed"
    figure, axes = pyplot.subplots(1, len(PASSES), figsize=(12, 4), layout="constrained", sharey=True)
    for axis, loss in zip(axes, PASSES, strict=True):
        for dtype in dtypes:
            for plan in PASSES[loss]:
                shares = [100 * predict(case_of(loss, ROWS, d, dtype), device, plan, dtype).fraction for d in dims]
                axis.plot(dims, shares, marker="o", markersize=4, label=f"{plan}, {dtype}")
        axis.set_xscale("log", base=2)
        axis.set(title=f"{loss}, {ROWS:,} rows", xlabel="D")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("predicted % of the floor")
    # Shared, and only now does it know all lines; the last loss has every plan.
    axes[0].set_ylim(bottom=0)
    axes[-1].legend(fontsize=8)
    figure.suptitle(f"{device.name}: predicted, not measured", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "roofline.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"plot: {path}"


def case_of(loss: str, rows: int, dim: int, dtype: str = "bfloat16") -> Case:
    """The case with so many rows of S; ``tf32`` is a precision of float32."""
    return Case(loss, rows // Case(loss, 1, dim).rows, dim, "float32" if dtype == "tf32" else dtype)


def dense_seconds(case: Case, device: Device) -> float:
    """Eager PyTorch: its products at the library's rate and its operators' bytes, or the host's time."""
    counted = dense(case)
    on_device = counted.product_flops / device.gemm[PRECISIONS[case.dtype].library] + counted.bytes / device.copy
    return max(on_device, LAUNCH["torch"] * counted.operators)


def _predicted(target: Target, device: Device) -> tuple[float | None, str]:
    if target.case is None:
        return None, "peers are not modelled"
    found = predict(target.case, device)
    if target.unit == "%":
        return found.fraction, f"{_ms(found.seconds)} ms for {_ms(found.floor)}; {_bound(found)}"
    if target.unit == "GB":
        gradients = 2 * target.case.pairs * target.case.dim * target.case.torch_dtype.itemsize
        return (
            found.memory - gradients
        ) / 1e9, "copies of unit length, one gradient, the other's sums in float32, a panel"
    eager = dense_seconds(target.case, device)
    return eager / found.seconds, f"{_ms(found.seconds)} ms against {_ms(eager)}; {_bound(found)}"


def _bound(found: Prediction) -> str:
    return f"{found.bound}: {found.saved:.0%}" if found.saved >= 0.05 else "the products"


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _dtypes(text: str) -> tuple[str, ...]:
    for part in text.split(","):
        if part not in PRECISIONS:
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(PRECISIONS)}")
    return tuple(text.split(","))
