"""The benchmark runner: nobody is fast who is wrong, nobody is run who wouldn't fit, and its files say what was run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gradcache, measure, peak_table, status
from benchmarks.cases import PEAK, SUITES, USUAL, Case, suite
from benchmarks.measure import GemmRate
from benchmarks.providers import CPU_ENGINE, CPU_ENGINE_ON_ONE_THREAD, find, providers
from benchmarks.report import COLUMNS, Machine, Row, format_case, make_rows, read_csv, write_csv
from benchmarks.runner import Limits, Result, Runner, describe_red_gate
from fastcl.backends import cpu
from tests.losses import LOSSES, Loss

SMALL = Case("nt_xent", 48, 16)
MACHINE = Machine(
    "a CPU",
    "cpu",
    torch="2.0",
    commit="abc",
    threads=4,
    level="avx2",
    rates={"float32": GemmRate(1e9, "float32", "a library", 64)},
)
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


def test_suite_of_the_usual() -> None:
    """A quick run on a GPU has a minute, of which each case gets its share: it has no more than two dozen."""
    for device, most in (("cpu", 8), ("cuda", 16)):
        assert {case.loss for case in suite(device, quick=False)} == set(USUAL)
        quick = suite(device, quick=True)
        assert len(set(quick)) == len(quick) == most
        assert [case.loss for case in quick[: len(USUAL)]] == list(USUAL)


def test_suite_of_the_peak() -> None:
    cases = suite("cpu", "peak", quick=False)
    assert {case.rows for case in cases} == {4096, 8192, 16384, 32768}
    assert {case.dim for case in cases} == {128, 256, 512, 1024}
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert len(set(cases)) == len(cases) == 32 * len(PEAK)
    assert [Case(loss, 1, 1).floor_passes for loss in PEAK] == [2, 3, 4]
    assert set(suite("cpu", "peak", quick=True)) < set(cases)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suite_of_the_family(device: str) -> None:
    for quick in (True, False):
        cases = suite(device, "family", quick=quick)
        assert [case.loss for case in cases] == [loss.name for loss in LOSSES]
        assert len({(case.pairs, case.dim, case.dtype) for case in cases}) == 1


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_similarity_matrix_of_a_case(loss: Loss) -> None:
    """Its shape is that of the inputs: all views against each other, or queries against keys."""
    case = Case(loss.name, 6, 2)
    lengths = [len(x) for x in case.inputs("cpu")[0]]
    assert case.rows == (sum(lengths) if loss.symmetric else lengths[0])
    assert case.columns == max(case.rows, *lengths)


def test_suite_of_small_batches() -> None:
    cases = suite("cpu", "small", quick=False)
    assert {(case.pairs, case.dim) for case in cases} == {(b, d) for b in (64, 128, 256, 512) for d in (64, 128)}
    assert {case.loss for case in cases} == {"nt_xent"}


def test_suites_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "--device", "cpu", "--suite", "peak,small,small", "--dtype", "float32"]) == 0
    names = capsys.readouterr().out.split("\n\n")[0].splitlines()
    expected = [*suite("cpu", "peak", quick=False), *suite("cpu", "small", quick=False)]
    assert names == [case.name for case in expected if case.dtype == "float32"]
    with pytest.raises(SystemExit):
        command.main(["--suite", "fast"])
    assert f"'fast' is not one of {', '.join(SUITES)}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'fast'"):
        suite("cpu", "fast", quick=False)


def test_floor_is_the_plans() -> None:
    for loss in LOSSES:
        assert Case(loss.name, 4, 2).floor_passes == loss.passes


def test_share_of_the_peak() -> None:
    """Two passes over 8,192 rows at the peak of as many threads as took part."""
    own, one_thread, dense = _engine_rows()
    assert (own.threads, one_thread.threads, dense.threads) == (4, 1, 4)
    assert (own.level, one_thread.level, dense.level) == ("avx2", "avx2", "")
    assert own.fraction_of_peak == pytest.approx(2 * 2 * 8192**2 * 16 / 2e9 / 4.0, rel=1e-3)
    assert one_thread.fraction_of_peak == pytest.approx(own.fraction_of_peak * 4 / 3.5, rel=1e-3)
    assert own.fraction_of_floor == pytest.approx(2 * own.fraction_of_peak, rel=1e-3)
    assert own.thread_scaling == 3.5
    assert dense.fraction_of_peak is dense.peak_gflops is dense.thread_scaling is one_thread.thread_scaling is None


def test_share_of_the_peak_is_shown_where_there_is_one(tmp_path: Path) -> None:
    rows = _engine_rows()
    path = tmp_path / "device" / "results.csv"
    write_csv(rows, path)
    share, table = f"{100 * rows[0].fraction_of_peak:.0f} %", peak_table.table(read_csv(path))
    assert f"| `nt_xent` float32 | 16 | {share} (3.50x) |" in table
    assert "`nt_xent` 2 passes" in table
    assert "float32 on 4 threads at avx2 2 GFLOP/s" in table
    assert "of peak" in format_case(rows)
    readme = status.measured_table(status.load_results(tmp_path))
    assert f"| 4,000 ms (`cpu`) | {share} |" in readme

    assert "of peak" not in format_case(rows[2:])
    # Results of an earlier version don't have these columns.
    old = [{k: v for k, v in row.items() if not k.endswith("_peak")} for row in read_csv(path)]
    assert peak_table.table(old) == peak_table.caption(old) == ""
    assert "of peak" not in status.measured_table(old)


def test_a_peak_below_what_was_reached_is_none() -> None:
    case = Case("nt_xent", 4096, 16)
    engine = replace(find("dense eager", "cpu"), name=CPU_ENGINE)
    (row,) = make_rows([Result(engine, case, "ok", gate_pairs=4096, times_ms=[4000.0], peaks=[1e9])], MACHINE)
    assert row.peak_gflops is row.fraction_of_peak is None


def test_several_runs_show_their_median(tmp_path: Path) -> None:
    rows = []
    for share in (0.7, 0.9, 0.8):
        write_csv([replace(_engine_rows()[0], fraction_of_peak=share)], tmp_path / "results.csv")
        rows += read_csv(tmp_path / "results.csv")
    assert "| `nt_xent` float32 | 16 | 80 % (3.50x) |" in peak_table.table(rows)


def test_small_batches_are_not_held_against_the_peak(tmp_path: Path) -> None:
    write_csv(_engine_rows(pairs=64), tmp_path / "results.csv")
    assert peak_table.table(read_csv(tmp_path / "results.csv")) == ""


def test_one_thread_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started = {}

    def start(name: str, device: str, threads: int) -> _Judge:
        started[name] = threads
        return _Judge({"value": 1.0, "gradient": 0.0})

    monkeypatch.setattr("benchmarks.runner.WorkerProcess", start)
    dense = find("dense eager", "cpu")
    own = replace(dense, name=CPU_ENGINE_ON_ONE_THREAD, threads=1)
    with Runner("cpu", [own, dense], BRIEF, threads=6) as runner:
        runner.run(SMALL)
    assert started == {"judge": 6, "dense eager": 6, CPU_ENGINE_ON_ONE_THREAD: 1}


def test_rates_of_threads_add_up() -> None:
    rates = iter((1.0, 2.0, 5.0, 4.0, 3.0, 1.0))
    assert measure.rate_of_threads(lambda: next(rates), 2, repeats=3) == 4.0


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_a_small_run_of_the_engine(tmp_path: Path) -> None:
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--suite", "small", "--one-thread"]
    assert command.main([*arguments, "--cases", "nt_xent-64x64", "--providers", "fastcl cpu"]) == 0
    own, one_thread = read_csv(tmp_path / "results.csv")
    assert (own["provider"], one_thread["provider"]) == (CPU_ENGINE, CPU_ENGINE_ON_ONE_THREAD)
    assert one_thread["threads"] == "1"
    assert own["level"] == cpu.level()
    for row in (own, one_thread):
        assert float(row["peak_gflops"]) > 0
        assert float(row["fraction_of_peak"]) > 0
        assert int(row["repeats"]) > 1
    assert float(own["thread_scaling"]) > 0
    assert CPU_ENGINE_ON_ONE_THREAD not in [provider.name for provider in providers("cpu")]


def test_a_small_run_of_gradient_caching(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    providers = ["without chunks", "fastcl GradCache"]
    arguments = ["gradcache", "--sizes", "64", "--out", str(tmp_path), "--providers", *providers]
    assert command.main(arguments) == 0
    rows = read_csv(tmp_path / "gradcache.csv")
    assert [(row["provider"], row["status"]) for row in rows] == [(name, "ok") for name in providers]
    assert all(float(row["gradient_error"]) < 1e-4 for row in rows)
    assert all(float(row["cpu_ms"]) > 0 and float(row["times_plain"]) > 0 for row in rows)
    assert "64 pairs  fastcl GradCache" in capsys.readouterr().out


def test_wrong_gradients_of_a_cache_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that forgets its last chunk is not timed."""

    def forgetful(encoder: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> gradcache.Step:
        step = gradcache.own(encoder, x[: -gradcache.CHUNK], y[: -gradcache.CHUNK])
        return lambda: step()

    monkeypatch.setitem(gradcache.PROVIDERS, "fastcl GradCache", (forgetful, "fastcl"))
    found = gradcache.measure("fastcl GradCache", 64, "cpu")
    assert found["status"].startswith("gate red")
    assert "median_ms" not in found


def test_peak_memory_sees_a_block() -> None:
    def step() -> object:
        return torch.ones(16 << 20, dtype=torch.float32).sum()

    step()
    assert 60e6 < measure.peak_memory(step) < 90e6


def test_relative_errors() -> None:
    exact = measure.ValueAndGradients(torch.tensor(2.0), (torch.tensor([3.0, 4.0]), torch.tensor(0.0)))
    found = measure.ValueAndGradients(torch.tensor(2.2), (torch.tensor([3.0, 4.5]), torch.tensor(0.0)))
    assert measure.relative_errors(found, exact) == pytest.approx((0.1, 0.1))


def test_readme_is_checked(output: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stale tables fail the check, and regenerating them makes it pass."""
    page = tmp_path / "page.md"
    page.write_text("<!-- targets:begin -->\nold\n<!-- targets:end -->\n")
    monkeypatch.setattr("benchmarks.predictions.page_tables", lambda: {"targets": "new"})
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(
        "before\n<!-- status:begin -->\nold\n<!-- status:end -->\n"
        "between\n<!-- measured:begin -->\n<!-- measured:end -->\nafter\n"
    )
    (results / "some-device").mkdir(parents=True)
    (results / "some-device" / "results.csv").write_text((output[1] / "results.csv").read_text())
    (results / "compiled.json").write_text('[{"device": "a GPU", "kind": "cuda", "backends": ["triton"]}]')
    engine_page = tmp_path / "engine.md"
    engine_page.write_text(
        "".join(f"<!-- {kind}:begin -->\n<!-- {kind}:end -->\n" for kind in ("peak", "threads", "avx2"))
    )
    (results / "some-device" / "engine").mkdir()
    write_csv(_engine_rows(), results / "some-device" / "engine" / "peak.csv")
    arguments = ["--readme", str(readme), "--results", str(results), "--gpu-page", str(page)]
    arguments += ["--cpu-page", str(engine_page)]

    assert status.main(["--check", *arguments]) == 1
    assert "old" in readme.read_text()
    assert status.main(arguments) == 0
    assert status.main(["--check", *arguments]) == 0
    assert page.read_text() == "<!-- targets:begin -->\nnew\n<!-- targets:end -->\n"
    assert "| `nt_xent` float32 | 16 |" in engine_page.read_text()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "run and measured" in text
    assert "compiled and checked" in text
    assert "| `nt_xent` float32 | 64 x 128 |" in text


def test_pages_are_up_to_date() -> None:
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


def _engine_rows(pairs: int = 4096) -> list[Row]:
    """What a run would say of the engine on all threads, on one, and of the dense loss, had they taken so long."""
    dense = find("dense eager", "cpu")
    found = (
        (replace(dense, name=CPU_ENGINE), 4_000.0, [1.9e9, 2e9, 2.5e9]),
        (replace(dense, name=CPU_ENGINE_ON_ONE_THREAD, threads=1), 14_000.0, [0.5e9]),
        (dense, 20_000.0, []),
    )
    case = Case("nt_xent", pairs, 16)
    results = [Result(p, case, "ok", gate_pairs=pairs, times_ms=[ms], peaks=peaks) for p, ms, peaks in found]
    return make_rows(results, MACHINE)


def _run_with(monkeypatch: pytest.MonkeyPatch, gate: dict[str, float]) -> Result:
    monkeypatch.setattr("benchmarks.runner.WorkerProcess", lambda *_: _Judge(gate))
    with Runner("cpu", [find("dense eager", "cpu")], BRIEF) as runner:
        (result,) = runner.run(SMALL)
    return result
