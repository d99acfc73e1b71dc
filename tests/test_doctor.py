"""The doctor tells what there is, and finds a backend that computes something wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import fastcl
from fastcl import doctor
from fastcl.backends import tiled
from tests.cases import available_backends


def test_python_m_fastcl() -> None:
    done = subprocess.run([sys.executable, "-m", "fastcl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in available_backends():
        assert f"\n{name:9} works on cpu" in done.stdout
    assert "cuda      unavailable: the CUDA extension is not built" in done.stdout


@pytest.mark.skipif("FASTCL_EXPECT_CPU" not in os.environ, reason="FASTCL_EXPECT_CPU doesn't ask for the C++ engine")
def test_the_engine_is_there_where_it_is_expected() -> None:
    assert fastcl.list_backends()["cpu"] is None


def test_summary_is_one_line() -> None:
    assert "\n" not in doctor.summary()
    assert "torch" in doctor.summary()


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiled.statistics

    def off_by_a_little(plan, operands):
        rows, columns = original(plan, operands)
        return type(original(plan, operands))(rows + 1e-2, columns)

    monkeypatch.setattr(tiled, "statistics", off_by_a_little)
    text, healthy = doctor.report()
    assert not healthy
    assert "tiled     WRONG on cpu" in text
