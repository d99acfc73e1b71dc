"""The CUDA engine without a GPU: its host-side logic exhaustively, and its kernels' own source executed on the CPU.

Both are C++ programs in tests/cpp that judge for themselves; here they are built and run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi")
FLAGS = ("-std=c++17", "-O1", *WARNINGS, f"-I{ROOT / 'tests' / 'cpp'}")
CASES = re.findall(r'^    {"(\w+)",', (ROOT / "tests" / "cpp" / "cuda_check.cpp").read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to build the emulation with")


def build(name: str, folder: Path) -> Path:
    program = folder / name
    command = ["g++", *FLAGS, "-o", program, ROOT / "tests" / "cpp" / f"{name}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("cuda_check", tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("program", ["cuda_layouts_check", "cuda_hopper_layouts_check"])
def test_layouts_order_and_sizes(program: str, tmp_path: Path) -> None:
    done = subprocess.run([build(program, tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_pairs_whatever_the_order(tmp_path: Path) -> None:
    done = subprocess.run([build("cuda_pairs_check", tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_float64(case: str, check: Path) -> None:
    """In four precisions, two of them on the Hopper path too, in different orders of warps and asynchronous copies."""
    done = subprocess.run([check, case], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 6, done.stdout
