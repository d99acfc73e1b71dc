"""The examples as a stranger runs them: in processes of their own, from the repository's root."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "examples/clip_torchrun.py"


def numbers(*command: str) -> list[list[float]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [[float(x) for x in re.findall(r"[0-9.]+", line)] for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_two_ranks_print_the_curve_of_one_process() -> None:
    options = ("--batch", "130", "--steps", "30")
    alone = numbers(EXAMPLE, *options)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ranks = numbers(*torchrun, EXAMPLE, *options, "--exchange", "ring")
    assert len(ranks) == len(alone) == 3
    for found, expected in zip(ranks, alone, strict=True):
        assert found == pytest.approx(expected, abs=2e-3)
    losses = [line[1] for line in alone]
    assert losses[-1] < 0.5 * losses[0]
