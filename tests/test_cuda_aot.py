"""The CUDA kernels compiled by nvcc, which needs no GPU: registers, spills, instructions, and how many blocks fit.

csrc/cuda/engine.cu has all instantiations. Nothing may spill, the operands must come by asynchronous copies and
ldmatrix, and the products must be those of the tensor cores in each kernel's precision.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90a")
PRECISIONS = {
    "BFloat16": r"HMMA\.16816\.F32\.BF16",
    "Float16": r"HMMA\.16816\.F32 ",
    "Tf32": r"HMMA\.1688\.F32\.TF32",
    "Tf32x3": r"HMMA\.1688\.F32\.TF32",
}
"""The kernels' template argument, and the instruction of its products."""

BLOCKS = {("sweep", "Tf32x3"): 1, ("weights", "Tf32x3"): 1} | {("redo", precision): 1 for precision in PRECISIONS}
"""Blocks that an SM of compute capability 8.0 or 9.0 holds, where not 2."""


def _cuda_tool(name: str) -> str | None:
    """One of the toolkit's programs, or the copy that comes with Triton."""
    triton = find_spec("triton")
    copy = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(copy) if copy and copy.is_file() else None)


CUOBJDUMP = _cuda_tool("cuobjdump")

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump, neither a toolkit's nor Triton's"),
]


class Kernel(NamedTuple):
    name: str
    precision: str
    registers: int
    stack: int
    instructions: str


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _kernels(cubin: Path) -> Iterator[Kernel]:
    usage = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+)", _run(CUOBJDUMP, "-res-usage", cubin))
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)\n\s*\.{10}", _run(CUOBJDUMP, "-sass", cubin), re.DOTALL))
    for symbol, registers, stack in usage:
        name = re.search(r"([a-z]+)_kernel", symbol).group(1)
        precision = re.search(r"INS0_\d+(\w+?)E", symbol)
        yield Kernel(name, precision.group(1) if precision else "", int(registers), int(stack), bodies[symbol])


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Kernel]]:
    """``kernels(architecture)`` compiles all of them, once."""
    found: dict[str, list[Kernel]] = {}

    def of(architecture: str) -> list[Kernel]:
        if architecture not in found:
            cubin = tmp_path_factory.mktemp("cuda") / f"sm_{architecture}.cubin"
            target = f"arch=compute_{architecture},code=sm_{architecture}"
            source = ROOT / "csrc" / "cuda" / "engine.cu"
            _run("nvcc", "-std=c++17", "-O3", "-DNDEBUG", "-cubin", "-gencode", target, "-o", cubin, source)
            found[architecture] = list(_kernels(cubin))
        return found[architecture]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instantiation_is_there(architecture: str, kernels: Callable[[str], list[Kernel]]) -> None:
    names = Counter((kernel.name, kernel.precision) for kernel in kernels(architecture))
    of_precision = {(name, precision): 1 for name in ("sweep", "redo", "weights") for precision in PRECISIONS}
    assert names == of_precision | {("combine", ""): 1}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture: str, kernels: Callable[[str], list[Kernel]]) -> None:
    assert [k[:4] for k in kernels(architecture) if k.stack or re.search(r"\b(STL|LDL)\b", k.instructions)] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_and_copies(architecture: str, kernels: Callable[[str], list[Kernel]]) -> None:
    for kernel in kernels(architecture):
        if kernel.name == "combine":
            continue
        least = {PRECISIONS[kernel.precision]: 32, r"LDGSTS\.E\.BYPASS\.128": 4, "LDSM": 6}
        if kernel.precision == "Tf32x3":
            least[PRECISIONS["Tf32x3"]] *= 3
        for instruction, count in least.items():
            assert len(re.findall(instruction, kernel.instructions)) >= count, (kernel[:4], instruction)
        assert not re.search(r"(?<![.\w])(ATOM|ATOMG|RED)\b", kernel.instructions), kernel[:4]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to ask cuda_occupancy.h with")
def test_blocks_on_an_sm(tmp_path: Path, kernels: Callable[[str], list[Kernel]], record_property: Callable) -> None:
    """By capability; where shared memory is 100 KB, one block must still fit."""
    # nvcc may be a script that starts the toolkit's.
    include = re.search(r"#\$ INCLUDES=\"-I([^\"]+)\"", _dry_run()).group(1)
    program = tmp_path / "occupancy"
    flags = ("-std=c++17", "-Wno-unknown-pragmas", f"-I{ROOT / 'tests' / 'cpp'}", f"-I{include}")
    _run("g++", *flags, "-o", program, ROOT / "tests" / "cpp" / "cuda_occupancy.cpp")
    asked = [(c, k) for c, arch in ((80, "80"), (89, "80"), (90, "90a")) for k in kernels(arch)]
    lines = "".join(f"{capability} {kernel.name} {kernel.registers}\n" for capability, kernel in asked)
    answers = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
    for (capability, kernel), answer in zip(asked, answers, strict=True):
        blocks, shared = map(int, answer.split())
        record_property(f"{kernel.name} {kernel.precision} sm_{capability}", (kernel.registers, shared, blocks))
        if kernel.name != "combine":
            assert blocks == (1 if capability == 89 else BLOCKS.get((kernel.name, kernel.precision), 2)), kernel[:4]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to build the bindings with")
def test_the_extension_builds_and_loads(tmp_path: Path) -> None:
    """With any torch, whose device it then misses."""
    for name in ("csrc", "fastcl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"FASTCL_BUILD": "0", "FASTCL_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    environment["PYTHONPATH"] = str(tmp_path)
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    built = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"])
    assert built.returncode == 0, built.stdout + built.stderr
    loaded = run([sys.executable, "-c", "from fastcl.backends import cuda; print(cuda.unavailable())"])
    assert loaded.stdout.strip() == ("None" if torch.cuda.is_available() else "there is no CUDA device"), loaded.stderr


def _dry_run() -> str:
    return subprocess.run(["nvcc", "-dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
