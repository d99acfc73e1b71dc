"""The search for block sizes without a GPU: candidates, pruning, the gate, the clock and the tables.

What runs the kernels is a stand-in; a process of its own runs the real one in Triton's interpreter on a tiny shape.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import tune
from benchmarks.tune import Found, Job
from fastcl import tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TABLES = Path(tuning.__file__).parent
JOB = Job("weights", "half", 256)
SLOW, FAST, WRONG, NAN, SPILLING, REFUSED = (tuning.Config(64, 64, 32, 4, stages) for stages in range(1, 7))
DEFAULT_MS = 2.0


class _StandIn:
    """Takes the default's time but for ``FAST``, which takes half; some candidates have each a way of being no good."""

    def __init__(self) -> None:
        self.timed: list[tuning.Config | None] = []
        self.last: tuning.Config | None = None
        self.now = 0.0

    def outputs(self, job: Job, config: tuning.Config | None) -> Sequence[Tensor]:
        self.last, self.now = config, self.now + 1.0
        if config == REFUSED:
            raise RuntimeError("out of resource: shared memory")
        return torch.ones(3), torch.full((4,), {WRONG: 1.1, NAN: math.nan}.get(config, 1.001 if config else 1.0))

    def spills(self) -> int:
        return 8 if self.last == SPILLING else 0

    def milliseconds(self, job: Job, config: tuning.Config | None) -> float:
        self.timed.append(config)
        # The others would win by their time alone.
        return {None: DEFAULT_MS, SLOW: 0.99 * DEFAULT_MS, FAST: 1.0}.get(config, 0.1)


def _search(configs: Sequence[tuning.Config], **options: object) -> tuple[dict[Job, Found], _StandIn, list[str]]:
    bench, said = _StandIn(), []
    options = {"limit_s": 1e6, "jobs": [JOB]} | options
    jobs = options.pop("jobs")
    found = tune.search(jobs, lambda job: configs, bench, say=said.append, clock=lambda: bench.now, **options)
    return found, bench, said


def test_fastest_right_one_wins() -> None:
    found, bench, said = _search([SLOW, WRONG, NAN, SPILLING, REFUSED, FAST])
    assert found == {JOB: Found(FAST, 1.0, DEFAULT_MS)}
    assert bench.timed == [None, SLOW, FAST], "only what is right and spills nothing is timed"
    text = "\n".join(said)
    for part in ("WRONG by 1.0e-01", "WRONG by nan", "8 registers spilled", "out of resource", "2.00x as fast"):
        assert part in text


def test_candidate_is_for_its_kernel_alone() -> None:
    config = tuning.Config(block_m=16, block_n=16, block_d=16, num_warps=1, num_stages=1)
    shape = {"n": 8, "m": 8, "d": 8}
    others = tuning.lookup("redo", "half", None, **shape)
    with tuning.override(config, kernel="sweep"):
        assert tuning.lookup("sweep", "half", None, **shape) is config
        assert tuning.lookup("redo", "half", None, **shape) is others


def test_refused_kernels_have_no_spills() -> None:
    """Triton keeps what it compiled before it finds that it doesn't fit, and counts registers after."""
    pytest.importorskip("triton")
    from benchmarks.tune_bench import KernelBench

    bench = KernelBench(8, "cpu")
    refused, loaded = SimpleNamespace(), SimpleNamespace(n_spills=4)
    kernel = SimpleNamespace(device_caches={0: ({"refused": refused},)})
    bench._look_at_compiled(kernel)
    assert bench.spills() == 0
    kernel.device_caches[0][0]["loaded"] = loaded
    bench._look_at_compiled(kernel)
    assert bench.spills() == 4
    bench._look_at_compiled(kernel)
    assert bench.spills() == 0


def test_noise_does_not_win() -> None:
    assert _search([SLOW])[0] == {}


def test_time_is_shared_and_ends() -> None:
    """Each look at outputs takes a second: of ten, two jobs get five, the default's look included."""
    jobs = [JOB, JOB._replace(d=512), JOB._replace(d=64)]
    found, bench, said = _search([SLOW] * 20 + [FAST], jobs=jobs[:2], limit_s=10.0)
    assert found == {}
    assert bench.timed.count(None) == 2
    assert bench.timed.count(SLOW) == 8
    assert sum("left out" in line for line in said) == 2
    _, bench, said = _search([SLOW] * 20, jobs=jobs, limit_s=0.0)
    assert bench.timed == []
    assert len(said) == 3


@pytest.mark.parametrize("kernel", tune.KERNELS)
@pytest.mark.parametrize("d", [64, 1024])
def test_candidates_fit(kernel: str, d: int) -> None:
    job = Job(kernel, "half", d)
    found = tune.candidates(job, 101_376, 2)
    if job.base == "registers":
        assert bool(found) == (d <= 256)
        assert all(config.block_d == d and config.block_m * (config.block_n + d) // 128 >= 8 for config in found)
        return
    assert len(found) > 10
    for config in found:
        assert config.num_stages * (config.block_m + config.block_n) * config.block_d * 2 <= 101_376
        assert config.block_d <= d
        assert config.block_m == config.block_n or "symmetric" not in kernel
    assert set(found) < set(tune.candidates(job, 232_448, 2))


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_ways_of_devices_with_tma(kernel: str) -> None:
    """Sweeps and panels are also tried by TMA and with persistent programs, each tile in each way early on."""
    job = Job(kernel, "half", 64)
    plain, found = (tune.candidates(job, 232_448, 2, capability) for capability in ((8, 9), (9, 0)))
    assert not any(config.tma or config.persistent for config in plain)
    if job.base not in ("sweep", "weights"):
        assert found == plain
        return
    assert len(set(found)) == len(found) == 4 * len(plain)
    assert set(plain) < set(found)
    first = tune.ordered(found, job, (9, 0), 8192)
    tiles = len({(config.block_m, config.block_n, config.num_warps) for config in found})
    assert [(config.tma, config.persistent) for config in first[: 4 * tiles : tiles]] == list(tune._WAYS)


@pytest.mark.parametrize(
    ("change", "kernel", "reason"),
    [
        ({}, "weights", None),
        ({"block_n": 128}, "weights_symmetric", "squares"),
        ({"block_n": 128}, "sweep_symmetric_tags", "squares"),
        ({"block_d": 512}, "weights", "longer than D"),
        ({"num_stages": 16}, "weights", "shared memory"),
        ({"block_m": 256, "block_n": 256}, "weights", "512 elements"),
    ],
)
def test_reasons(change: dict[str, int], kernel: str, reason: str | None) -> None:
    config = dataclasses.replace(tuning.Config(64, 64, 64, 4, 3), **change)
    found = tune.reason_against(config, Job(kernel, "half", 128), 200_000, 2)
    assert (found is None) if reason is None else (reason in found)


def test_most_promising_first() -> None:
    """The cost model puts large tiles before those that bring their operands again and again."""
    job = Job("weights", "half", 1024)
    configs = [tuning.Config(32, 32, 64, 4, 3), tuning.Config(128, 128, 64, 8, 3)]
    assert tune.ordered(configs, job, (9, 0), 8192) == configs[::-1]
    assert tune.ordered(configs, job, (7, 0), 8192) == configs, "no model of that device"
    every = tune.candidates(job, 232_448, 2)
    first = tune.ordered(every, job, (9, 0), 8192)[:20]
    assert len({(config.block_m, config.block_n, config.num_warps) for config in first}) > 10, (
        "not one tile's pipelines"
    )


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_tables_survive(path: Path) -> None:
    """Writing changes the entry of the found shape and nothing else."""
    content = json.loads(path.read_text())
    assert json.loads(tune.formatted(content)) == content
    new = tune.merged(content, {JOB: Found(FAST, 1.0, 2.0), JOB._replace(d=64): Found(SLOW, 1.0, 2.0)})
    entries = new["kernels"]["weights"].pop("half")
    old = content["kernels"]["weights"].pop("half")
    assert new == content
    assert {"shape": {"d": 256}, **vars(FAST)} in entries
    assert {"shape": {"d": 64}, **vars(SLOW)} in entries
    assert [entry for entry in entries if entry["shape"]["d"] not in (64, 256)] == [
        entry for entry in old if entry["shape"]["d"] not in (64, 256)
    ]


def test_sums_in_registers_lose_their_entry() -> None:
    """Where panels of W were faster, or as fast, there is to be none."""
    job = Job("registers_symmetric", "half", 128)
    content = json.loads((TABLES / "sm_90.json").read_text())
    assert [entry["shape"]["d"] for entry in content["kernels"]["registers_symmetric"]["half"]] == [64, 128]
    found, _, _ = _search([SLOW], jobs=[job])
    assert found == {job: None}
    entries = tune.merged(content, found)["kernels"]["registers_symmetric"]["half"]
    assert [entry["shape"]["d"] for entry in entries] == [64]
    assert _search([FAST], jobs=[job])[0] == {job: Found(FAST, 1.0, DEFAULT_MS)}


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "sm_90.json"), ((8, 9), "sm_89.json")])
def test_device_gets_its_file(
    capability: tuple[int, int], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known device's file is extended, an unknown one's starts as the default; the look-up finds what was written."""
    for path in TABLES.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    found = {JOB._replace(d=512): Found(FAST, 1.0, 2.0)}
    assert tune.write_table(tmp_path, capability, "a GPU", 101_376, found) == tmp_path / name
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
    monkeypatch.setattr(tuning, "tables", lambda: tuple(map(tuning._read, sorted(tmp_path.glob("*.json")))))
    assert tuning.lookup("weights", "half", capability, n=1, m=1, d=600) == FAST
    old = tuning._read(TABLES / ("sm_90.json" if capability == (9, 0) else "default.json"))
    assert tuning.table(capability).entries["sweep", "half"] == old.entries["sweep", "half"]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "nothing was tuned" in capsys.readouterr().err


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if INTERPRETED:
        pytest.skip("this process interprets itself")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "real_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(tune.KERNELS)} passed" in done.stdout


def interpreted(case: Callable[..., None]) -> Callable[..., None] | None:
    """Leaves nothing to collect in a process that doesn't interpret."""
    return case if INTERPRETED else None


@interpreted
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_real_kernels(kernel: str) -> None:
    """The bench runs each kernel at the candidate's configuration and finds it right; a wrong one would be seen."""
    from benchmarks.tune_bench import PLANS, KernelBench
    from fastcl.backends.triton.plan import table_entry

    job = Job(kernel, "half", 32)
    described = job.base in ("sweep", "weights")
    config = tuning.Config(16, 16, 32 if job.base == "registers" else 16, 4, 2, tma=described, persistent=described)
    bench = KernelBench(40, "cpu", budget_s=0.0)
    said: list[str] = []
    assert table_entry(job.base, PLANS[kernel.removeprefix(job.base).removeprefix("_")]) == kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "milliseconds", lambda job, config: 1.0 if config else 2.0)
        found = tune.search([job], lambda job: [config], bench, limit_s=600.0, say=said.append)
    assert found == {job: Found(config, 1.0, 2.0)}, said
    assert bench.milliseconds(job, config) > 0
    exact = [x * 1.1 for x in bench.outputs(job, None)]
    assert "WRONG" in tune._reason_to_reject(job, config, exact, bench)
