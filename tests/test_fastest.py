"""Which backend is taken where a device's table says what was measured, and how a run becomes such a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import fastest, tune
from benchmarks.cases import Case
from fastcl import engine, tuning
from fastcl.terms import Axis, Mask, Operands, Plan, Reduce, Term

HOPPER = (9, 0)
TABLES = Path(tuning.__file__).parent
ROWS, BOTH = Plan((Term(Reduce.LSE),)), Plan((Term(Reduce.LSE), Term(Reduce.LSE, axis=Axis.COLUMN)))
ENTRIES = [
    {"plan": "rows", "precision": "half", "shape": {"n": 1024, "d": 128}, "fastest": "triton"},
    {"plan": "rows", "precision": "half", "shape": {"n": 32768, "d": 128}, "fastest": "cuda"},
]


def row(provider: str, median_ms: object, loss: str = "clip", **values: object) -> dict[str, str]:
    given = {"kind": "cuda", "pairs": 4096, "dim": 512, "dtype": "bfloat16"} | values
    return {name: str(x) for name, x in (given | {"loss": loss, "provider": provider, "median_ms": median_ms}).items()}


@pytest.fixture
def _measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of Hopper's with entries, and no others."""
    content = fastest.merged(json.loads((TABLES / "sm_90.json").read_text()), ENTRIES)
    tune.write(tmp_path / "sm_90.json", content)
    monkeypatch.setattr(tuning, "tables", lambda: (tuning._read(tmp_path / "sm_90.json"), *_default()))


def _default() -> tuple[tuning.Table, ...]:
    return tuple(tuning._read(path) for path in (TABLES / "default.json",))


@pytest.mark.usefixtures("_measured")
def test_nearest_measured_case_decides() -> None:
    def chosen(plan: Plan, rows: int, dtype: torch.dtype = torch.bfloat16, capability=HOPPER) -> str | None:
        x = torch.zeros(1, 100, dtype=dtype).expand(rows, 100)
        return engine._measured(plan, Operands(x, x, torch.ones(())), capability)

    assert chosen(ROWS, 2048) == "triton"
    assert chosen(ROWS, 100_000) == "cuda"
    assert chosen(BOTH, 100_000) is None, "of this kind nothing was measured"
    assert chosen(ROWS, 100_000, torch.float32) is None
    assert chosen(ROWS, 100_000, capability=(8, 0)) is None
    assert chosen(replace(ROWS, terms=(Term(Reduce.LSE, Mask(label=True)),)), 100_000) is None


def test_shipped_tables_prefer_nothing_unmeasured() -> None:
    assert all(not table.backends for table in tuning.tables())


def test_a_preferred_backend_that_refuses_is_passed_over() -> None:
    x = torch.zeros(4, 2)

    def choose(preferred: str | None) -> str:
        reason = {"cuda": "there is none", "cpu": "neither", "tiled": None, "dense": None}.get
        return engine._select(reason, x, None, lambda: "a test", preferred)

    assert choose("dense") == "dense"
    assert choose("cuda") == choose(None) == "tiled"


def test_entries_of_a_run() -> None:
    rows = [
        *(row("fastcl triton", 10.0), row("fastcl cuda", 8.0), row("dense eager", 1.0)),
        *(row("fastcl triton", 10.0, "nt_xent"), row("fastcl cuda", 9.9, "nt_xent")),
        *(row("fastcl triton", 10.0, "info_nce"), row("fastcl cuda", "", "info_nce")),
        *(row("fastcl triton", 10.0, kind="cpu", dim=64), row("fastcl cuda", 1.0, kind="cpu", dim=64)),
        *(row("fastcl triton", 10.0, "siglip"), row("fastcl cuda", 8.0, "siglip")),
    ]
    assert fastest.entries(rows) == [
        {"plan": "both", "precision": "half", "shape": {"n": 4096, "d": 512}, "fastest": "cuda"},
        {"plan": "symmetric", "precision": "half", "shape": {"n": 8192, "d": 512}, "fastest": "triton"},
    ]
    assert fastest.kind_of_plan(Case("info_nce", 4096, 64)) == "rows"


def test_merging_replaces_the_same_case(tmp_path: Path) -> None:
    content = json.loads((TABLES / "sm_90.json").read_text())
    once = fastest.merged(content, ENTRIES)
    again = fastest.merged(once, [ENTRIES[1] | {"fastest": "triton"}])
    assert [entry["fastest"] for entry in again["backends"]] == ["triton", "triton"]
    assert again["kernels"] == content["kernels"]
    tune.write(tmp_path / "new.json", again)
    assert json.loads((tmp_path / "new.json").read_text()) == again


def test_without_a_gpu_nothing_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert fastest.main([str(tmp_path / "results.csv")]) == 1
    assert "nothing was noted" in capsys.readouterr().err
