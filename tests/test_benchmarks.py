"""The benchmark runner: nobody is fast who is wrong, nobody is run who wouldn't fit, and its files say what was run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import measure, status
from benchmarks.cases import Case, suite
from benchmarks.measure import GemmRate
from benchmarks.providers import find
from benchmarks.report import COLUMNS, Machine, make_rows, read_csv
from benchmarks.runner import Limits, Result, Runner, describe_red_gate
from tests.cases import LOSSES

SMALL = Case("nt_xent", 48, 16)
MACHINE = Machine("a CPU", "cpu", "2.0", "abc", {"float32": GemmRate(1e9, "float32", "a library", 64)})
BRIEF = Limits(rounds=1, budget_s=0.01, request_s=60)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """One small run from end to end: the command's exit code and the folder it wrote."""
    folder = tmp_path_factory.mktemp("out")
    arguments = ["--quick", "--device", "cpu", "--out", str(folder)]
    arguments += ["--cases", "nt_xent-64x", "--providers", "fastcl tiled,dense eager"]
    return command.main(arguments), folder


def test_a_small_run(output: tuple[int, Path]) -> None:
    code, folder = output
    rows = read_csv(folder / "results.csv")
    assert code == 0
    assert {row["provider"]: row["status"] for row in rows} == {"fastcl tiled": "ok", "dense eager": "ok"}
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["value_error"]) < 1e-5
        assert float(row["gradient_error"]) < 1e-4
        assert row["best_peer"] == "dense eager"
        assert row["gate_pairs"] == row["pairs"] == "64"


def test_columns(output: tuple[int, Path]) -> None:
    header = (output[1] / "results.csv").read_text().splitlines()[0]
    assert tuple(header.split(",")) == COLUMNS
    needed = {"device", "torch", "triton", "fastcl", "version", "commit", "date", "median_ms", "peak_mb", "speedup"}
    assert needed | {"fraction_of_floor", "value_error", "gradient_error", "gemm_library"} <= set(COLUMNS)


def test_wrong_provider_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's errors come from a worker, here one that answers for a provider whose gradient is off by a tenth."""
    result = _run_with(monkeypatch, {"value": 1e-7, "gradient": 0.1})
    row = make_rows([result], MACHINE)[0]
    assert row.status == "gate red"
    assert "gradient" in row.reason
    assert row.median_ms is row.speedup is row.fraction_of_floor is row.peak_mb is None


def test_wrong_losses_are_seen(tmp_path: Path) -> None:
    """A worker's gate on a loss with a wrong sign, a wrong factor, and a NaN."""
    from benchmarks.worker import Worker

    worker = Worker("dense eager", "cpu")
    path = str(tmp_path / "exact.pt")
    worker.reference(SMALL.to_json(), path)
    right = worker.provider
    for wrong, red in ((1.0, False), (-1.0, True), (1.1, True), (math.nan, True)):
        formula = right.build(SMALL)
        worker.case = None
        worker.provider = replace(right, build=lambda case, c=wrong, f=formula: lambda x, tau: c * f(x, tau))
        gate = worker.gate(SMALL.to_json(), path)
        assert (describe_red_gate("float32", gate["value"], gate["gradient"]) is not None) == red, wrong


@pytest.mark.parametrize("errors", [(1.0, 0.0), (0.0, 1.0), (math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0)])
def test_red_gate(errors: tuple[float, float]) -> None:
    assert describe_red_gate("float32", *errors) is not None
    assert describe_red_gate("float32", 0.0, 0.0) is None


def test_memory_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense loss of a million pairs is left out with what it would need, and no process is started for it."""
    started = []
    monkeypatch.setattr("benchmarks.runner.WorkerProcess", lambda name, *_: started.append(name) or _Judge())
    with Runner("cpu", [find("dense eager", "cpu")], BRIEF) as runner:
        (result,) = runner.run(Case("nt_xent", 1_000_000, 64))
    assert result.status == "left out"
    assert "would need about 48,000.0 GB" in result.reason
    assert started == ["judge"]


def test_cubic_peer_runs_at_tiny_sizes_only() -> None:
    peer = find("pytorch-metric-learning", "cpu")
    assert peer.too_large(Case("nt_xent", 512, 128)) is not None
    assert any(peer.offers(case) and peer.too_large(case) is None for case in suite("cpu", quick=True))


def test_every_loss_is_measured() -> None:
    expected = {loss.name for loss in LOSSES if not any("longer" in name for name in loss.features)}
    for device in ("cpu", "cuda"):
        for quick in (True, False):
            assert {case.loss for case in suite(device, quick=quick)} == expected


def test_peak_memory_sees_a_block() -> None:
    def step() -> object:
        return torch.ones(16 << 20, dtype=torch.float32).sum()

    step()
    assert 60e6 < measure.peak_memory(step) < 90e6


def test_relative_errors() -> None:
    exact = measure.ValueAndGradients(torch.tensor(2.0), (torch.tensor([3.0, 4.0]), torch.tensor(0.0)))
    found = measure.ValueAndGradients(torch.tensor(2.2), (torch.tensor([3.0, 4.5]), torch.tensor(0.0)))
    assert measure.relative_errors(found, exact) == pytest.approx((0.1, 0.1))


def test_readme_is_checked(output: tuple[int, Path], tmp_path: Path) -> None:
    """Stale tables fail the check, and regenerating them makes it pass."""
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(
        "before\n<!-- status:begin -->\nold\n<!-- status:end -->\n"
        "between\n<!-- measured:begin -->\n<!-- measured:end -->\nafter\n"
    )
    (results / "some-device").mkdir(parents=True)
    (results / "some-device" / "results.csv").write_text((output[1] / "results.csv").read_text())
    (results / "compiled.json").write_text('[{"device": "a GPU", "kind": "cuda", "backends": ["triton"]}]')
    arguments = ["--readme", str(readme), "--results", str(results)]

    assert status.main(["--check", *arguments]) == 1
    assert "old" in readme.read_text()
    assert status.main(arguments) == 0
    assert status.main(["--check", *arguments]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "run and measured" in text
    assert "compiled and checked" in text
    assert "| `nt_xent` float32 | 64 x 128 |" in text


def test_readme_is_up_to_date() -> None:
    assert status.main(["--check"]) == 0, "run `python -m benchmarks status`"


class _Judge:
    """Stands for every worker: plenty of memory, and the errors it was made with."""

    alive = True

    def __init__(self, gate: dict[str, float] | None = None) -> None:
        self.gate = gate

    def ask(self, op: str, timeout_s: float, **arguments: object) -> dict[str, object]:
        if op == "reference":
            Path(str(arguments["path"])).touch()
        return {"available": {"bytes": 16e9}, "reference": {}, "gate": {**(self.gate or {}), "first_ms": None}}[op]

    def dismiss(self) -> None:
        pass

    def close(self) -> None:
        pass


def _run_with(monkeypatch: pytest.MonkeyPatch, gate: dict[str, float]) -> Result:
    monkeypatch.setattr("benchmarks.runner.WorkerProcess", lambda *_: _Judge(gate))
    with Runner("cpu", [find("dense eager", "cpu")], BRIEF) as runner:
        (result,) = runner.run(SMALL)
    return result
