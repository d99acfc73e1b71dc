"""The demo's quick form, as a stranger runs it: in a process of its own, from the repository's root."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcl.losses.nt_xent import reference

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

from examples.demo import table
from examples.demo.reference import dense_nt_xent, exact_nt_xent, exact_row_losses, views

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run printed, and its picture."""
    picture = tmp_path_factory.mktemp("demo") / "demo.png"
    command = [sys.executable, "-m", "examples.demo", "--quick", "--picture", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, picture


@pytest.mark.slow
def test_table_has_all_rows_with_small_errors(demo: tuple[str, Path]) -> None:
    output, _ = demo
    for pairs in (128, 256, 512):
        # Once while torch.compile is still compiling, and once complete.
        early, row = re.findall(rf"^ *{pairs}  .*$", output, re.MULTILINE)
        assert "..." in early
        assert "..." not in row
        errors = [float(x) for x in re.findall(r"\d+e-\d+", row)]
        assert len(errors) >= 4
        assert max(errors) < 1e-5


@pytest.mark.slow
def test_large_batch_agrees_with_float64(demo: tuple[str, Path]) -> None:
    output, _ = demo
    (error,) = re.findall(r"rows against float64: (\S+)", output)
    assert float(error) < 1e-5


@pytest.mark.slow
def test_curves_agree(demo: tuple[str, Path]) -> None:
    output, _ = demo
    (difference,) = re.findall(r"largest difference between the two curves: ([^,]+),", output)
    assert float(difference) < 1e-2


@pytest.mark.slow
def test_ends_with_a_sentence_and_a_picture(demo: tuple[str, Path]) -> None:
    output, picture = demo
    assert re.fullmatch(r"512 pairs on .+: \S+x faster than eager, .*\S+x less memory", output.splitlines()[-1])
    assert "\r" not in output
    assert "\x1b" not in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_dense_loss_is_left_out_before_it_would_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "available_bytes", lambda device: 4_000_000_000)
    assert table.too_large(4096, "cpu") is None
    assert str(table.too_large(8192, "cpu")) == "needs 4.3 of 4.0 GB"


def test_what_the_demo_judges_by_is_exact() -> None:
    z1, z2 = (z.detach().double().requires_grad_() for z in views(700, 24, "cpu"))
    losses = reference(z1, z2, 0.1)
    expected = torch.autograd.grad(losses.mean(), (z1, z2))
    value, gradients = exact_nt_xent(z1, z2, 0.1)
    torch.testing.assert_close(value, losses.mean())
    torch.testing.assert_close(gradients, expected)
    rows = torch.tensor([0, 5, 699, 700, 1399])
    torch.testing.assert_close(exact_row_losses(z1, z2, 0.1, rows), losses[rows])
    torch.testing.assert_close(dense_nt_xent(z1, z2, 0.1), losses.mean())
