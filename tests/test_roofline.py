"""The cost model of the GPU plans: hand-computed cases, units, limits, and that it models what the backend does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import predictions, roofline, targets
from benchmarks.around import around_kernels, dense
from benchmarks.cases import TARGET_CASES, Case, suite
from benchmarks.devices import DEVICES, Device
from benchmarks.report import COLUMNS
from benchmarks.roofline import PASSES, TERMS, predict, predicted_seconds
from tests.losses import LOSSES

H200 = DEVICES["h200"]
CLIP = Case("clip", 8192, 512, "bfloat16")
WORKSPACE = 256 << 20
EVERYTHING_BUT_PRODUCTS = tuple(term for terms in TERMS.values() for term in terms)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_figures_of_devices_agree(device: Device) -> None:
    """Tensor cores do a power of two of FLOPs in a clock (a GeForce card's at half rate, too)."""
    peak = device.gemm["half"] / (790 / 989.4 if device is H200 else 0.8)
    per_clock = peak / device.sms / device.clock
    assert math.log2(per_clock) == pytest.approx(round(math.log2(per_clock)), abs=0.02)
    assert device.gemm["half"] > device.gemm["tf32"] >= device.gemm["float32"]
    assert 0.2e12 < device.copy < 10e12
    assert device.sources


@pytest.mark.parametrize(("loss", "passes"), [(loss.name, loss.passes) for loss in LOSSES if loss.name in PASSES])
def test_best_plan_is_the_floor(loss: str, passes: float) -> None:
    assert min(PASSES[loss].values()) == passes


@pytest.mark.parametrize(("loss", "plan"), [*((loss, "panels") for loss in PASSES), ("info_nce", "one sweep")])
def test_products_alone_take_the_plans_passes(loss: str, plan: str) -> None:
    """All but the tensor cores for nothing: 2 * passes * N * N * D operations at the device's rate, and no more."""
    case = predictions.case_of(loss, 32768, 4096)
    seconds = predicted_seconds(case, H200, plan, free=EVERYTHING_BUT_PRODUCTS)
    exact = PASSES[loss][plan] * 2 * 32768**2 * 4096 / 790e12
    # A symmetric sweep's tiles on the diagonal are computed whole.
    assert seconds == pytest.approx(exact, rel=0.01)


def test_registers_take_their_passes() -> None:
    for loss, passes in (("nt_xent", 2.5), ("clip", 5), ("info_nce", 4)):
        case = predictions.case_of(loss, 32768, 256)
        seconds = predicted_seconds(case, H200, "registers", free=EVERYTHING_BUT_PRODUCTS)
        assert seconds == pytest.approx(passes * 2 * 32768**2 * 256 / 790e12, rel=0.01)


def test_exponentials_cost_what_an_s_pass_costs_at_128() -> None:
    """16 a clock and SM: 8,192^2 of them on 132 SMs at 1.83 GHz, next to an S pass at 4,096 FLOP/clock and SM."""
    exps = 8192**2 / (16 * 132 * 1.83e9)
    assert exps == pytest.approx(2 * 8192**2 * 128 / (4096 * 132 * 1.83e9))
    others = [term for term in EVERYTHING_BUT_PRODUCTS if term != "exps"]
    case = Case("info_nce", 8192, 128, "bfloat16")
    model = roofline._Model(case, replace(H200, gemm=dict.fromkeys(H200.gemm, 1e30)), roofline.PRECISIONS["bfloat16"])
    assert model.parts("panels", frozenset(others))["sweep"] == pytest.approx(exps, rel=1e-6)


def test_bytes_of_a_panel() -> None:
    """W is written once and read twice: 3 * 2 bytes a logit, all that remains with infinitely fast SMs."""
    fast = replace(H200, gemm=dict.fromkeys(H200.gemm, 1e30), clock=1e18)
    case = Case("clip", 32768, 64, "bfloat16")
    parts = roofline._Model(case, fast, roofline.PRECISIONS["bfloat16"]).parts("panels", frozenset(("latency",)))
    logits = 32768**2
    assert parts["weights"] == pytest.approx(2 * logits / 4.3e12)
    assert 4 * logits / 4.3e12 < parts["products"] < 1.2 * 4 * logits / 4.3e12


@pytest.mark.parametrize("loss", PASSES)
def test_more_work_takes_longer(loss: str) -> None:
    times = [predicted_seconds(predictions.case_of(loss, rows, 256), H200) for rows in (8192, 16384, 32768, 65536)]
    assert times == sorted(times)
    assert 3.5 < times[-1] / times[-2] < 4.5
    times = [predicted_seconds(predictions.case_of(loss, 32768, d), H200) for d in (64, 128, 256, 512, 1024)]
    assert times == sorted(times)


@pytest.mark.parametrize("loss", PASSES)
@pytest.mark.parametrize("name", ["a100", "h200", "rtx4090"])
def test_nothing_is_below_the_floor(loss: str, name: str) -> None:
    for rows in (1024, 32768):
        for dim in (64, 1024):
            for plan in PASSES[loss]:
                found = predict(predictions.case_of(loss, rows, dim), DEVICES[name], plan)
                assert 0 < found.fraction < 1
                assert 0 <= found.saved < 1
                assert sum(found.parts.values()) <= found.seconds * (1 + 1e-9)


@pytest.mark.parametrize("loss", PASSES)
def test_large_depths_approach_the_products(loss: str) -> None:
    """All that is paid for a logit and not for its D fades; what is paid for each operand stays."""
    for_each_d = ("shared", "l2", "around")
    shares = []
    for dim in (256, 1024, 4096):
        case = predictions.case_of(loss, 32768, dim)
        exact = PASSES[loss]["panels"] * 2 * 32768**2 * dim / 790e12
        shares.append(exact / predicted_seconds(case, H200, free=for_each_d))
    assert shares == sorted(shares)
    assert shares[-1] > 0.9


def test_a_faster_device_is_faster() -> None:
    for change in ({"clock": 2e9}, {"copy": 8e12}, {"gemm": {k: 2 * v for k, v in H200.gemm.items()}}):
        assert predicted_seconds(CLIP, replace(H200, **change)) < predicted_seconds(CLIP, H200)


def test_precisions() -> None:
    """float32 at the precision "highest" is three products in tf32 and the library's in float32."""
    times = [
        predicted_seconds(predictions.case_of("clip", 8192, 512, dtype), H200, precision=dtype)
        for dtype in ("bfloat16", "tf32", "float32")
    ]
    assert times == sorted(times)
    assert times[2] > 2 * times[1]


def test_remedies_help() -> None:
    for line in predictions.remedy_table(H200).splitlines()[2:]:
        wanted, *shares = [int(cell.strip(" %")) for cell in line.split("|")[2:-1]]
        assert shares == sorted(shares)
        assert 50 < wanted < 100
        assert shares[-1] <= 100


def test_unknown_plan() -> None:
    with pytest.raises(ValueError, match="'one sweep'"):
        predict(CLIP, H200, "one sweep")


def test_around_the_kernels() -> None:
    """Bytes grow with N * D; a small batch of NT-Xent is a dozen launches, whatever its size."""
    small, large = (around_kernels(Case("nt_xent", n, 64, "bfloat16"), 0) for n in (256, 2048))
    assert 5 < small.operators + small.kernels == large.operators + large.kernels < 15
    assert 7 < large.bytes / small.bytes < 9
    assert large.peak > 2 * 2048 * 64 * 4
    case = Case("nt_xent", 512, 64, "float32")
    assert dense(case).product_flops == 3 * 2 * 1024**2 * 64
    assert dense(case).peak > 2 * 1024**2 * 4


@pytest.mark.parametrize("loss", PASSES)
def test_counted_peaks_are_the_measured_ones(loss: str) -> None:
    """What the dense losses hold at their peak was measured, in whole matrices (benchmarks/cases.py)."""
    case = predictions.case_of(loss, 8192, 64)
    assert dense(case).peak / case.dense_bytes(1) == pytest.approx(case.cost.dense_copies, rel=0.05)


def test_measured_rates_replace_figures() -> None:
    device = predictions.with_rates(H200, {"bfloat16": 7e14, "float32": 5e13, "copy": 4e12})
    assert device.gemm == {**H200.gemm, "half": 7e14, "float32": 5e13}
    assert device.copy == 4e12


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"bfloat16": 5e14}))
    arguments = ["--rows", "8192", "--dims", "128,512", "--out", str(tmp_path), "--rates", str(rates)]
    assert predictions.main(arguments) == 0
    text = capsys.readouterr().out
    assert "half 500" in text
    assert "Not run on a GPU yet" in text
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_super_tiles_are_the_forwards() -> None:
    forward = pytest.importorskip("fastcl.backends.triton.forward", reason="triton is not installed")
    for count in (1, 127, 128, 5000, 32768, 1_000_003):
        assert roofline.super_tiles(count, 128) == forward._super_tiles(count, 128)


def _row(case: Case, provider: str, ms: float | None, **more: object) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "") | {
        "kind": "cuda",
        "device": "a GPU",
        "loss": case.loss,
        "pairs": str(case.pairs),
        "rows": str(case.rows),
        "dim": str(case.dim),
        "dtype": case.dtype,
        "provider": provider,
        "median_ms": "" if ms is None else str(ms),
    }
    return row | {name: str(value) for name, value in more.items()}


def test_verdicts() -> None:
    clip, small, largest = TARGET_CASES[0], Case("nt_xent", 256, 128, "bfloat16"), TARGET_CASES[-1]
    rows = [
        _row(clip, "fastcl triton", 7.0, fraction_of_floor=0.8, speedup=1.4),
        _row(clip, "fastcl tiled", 30.0, fraction_of_floor=0.2, speedup=0.3),
        _row(clip, "torch.compile", 21.0),
        _row(small, "fastcl triton", 0.2, fraction_of_floor=0.0, speedup=0.9),
        _row(small, "dense eager", 0.18),
        _row(largest, "fastcl triton", 9000.0, fraction_of_floor=0.6, peak_mb=6500, gradients_mb=2147),
        _row(Case("clip", 64, 64, "bfloat16"), "fastcl triton", None),
    ]
    lines = targets.verdicts(rows)
    assert [line.split("  ")[0] for line in lines] == [
        "pass", "not measured", "not measured", "not measured", "FAIL", "pass", "FAIL", "FAIL", "FAIL",
    ]  # fmt: skip
    assert "80 %, at least 75 % wanted" in lines[0]
    assert "1.4 x" in lines[4]
    assert "3 x" in lines[5]
    assert "4.35 GB, at most 4 GB" in lines[-1]
    assert all(line.startswith("not measured") for line in targets.verdicts([]))


def test_verdicts_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main([str(tmp_path / "missing.csv")]) == 0
    assert "on no GPU" in capsys.readouterr().out


def test_targets_are_in_a_suite() -> None:
    cases = {target.case for target in targets.TARGETS if target.case}
    assert cases == set(suite("cuda", "targets", quick=False))
    assert max(case.pairs for case in suite("cuda", "targets", quick=True)) < 1 << 20
