"""The CUDA kernels compiled by nvcc, which needs no GPU: registers, spills, instructions, and how many blocks fit.

csrc/cuda/engine.cu has all instantiations of the portable kernels: their operands must come by asynchronous copies and
ldmatrix, and the products must be those of the tensor cores in each kernel's precision. csrc/cuda/hopper.cu has those
for sm_90a, whose operands must come by TMA and whose products must be wgmma's. Nothing may spill.
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

HOPPER_PRECISIONS = {"BFloat16": r"HGMMA\.64x128x16\.F32\.BF16", "Float16": r"HGMMA\.64x128x16\.F32 "}
HOPPER_REGISTERS = 65_536 // 384 // 8 * 8
"""What each of a block's 384 threads begins with."""
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
"""What they go on with."""
MOST_SHARED_BYTES = 232_448

SWEEPS, WEIGHTS = ("sweep", "sweep_tagged"), ("weights", "weights_tagged")
"""The kernels for plans without tags and with."""
GRADIENTS = {f"gradient_{depth}": blocks for depth, blocks in ((64, 3), (128, 2), (256, 2))}
"""The kernels with sums in registers, by the longest rows that they take: blocks that an SM holds."""
BLOCKS = {(name, "Tf32x3"): 1 for name in (*SWEEPS, *WEIGHTS, "pairs")} | {
    ("redo", precision): 1 for precision in PRECISIONS
}
BLOCKS |= {(name, precision): blocks for name, blocks in GRADIENTS.items() for precision in HOPPER_PRECISIONS}
"""Blocks that an SM of compute capability 8.0 or 9.0 holds, where not 2."""
BLOCKS_ON_89 = {"gradient_64": 2}
"""Where not 1."""


def _cuda_tool(name: str) -> str | None:
    """One of the toolkit's programs, or the copy that comes with Triton."""
    triton = find_spec("triton")
    copy = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(copy) if copy and copy.is_file() else None)


CUOBJDUMP = _cuda_tool("cuobjdump")

pytestmark = [
    pytest.mark.matrix,
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
    return done.stdout + done.stderr


def _kernels(cubin: Path) -> Iterator[Kernel]:
    usage = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+)", _run(CUOBJDUMP, "-res-usage", cubin))
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)\n\s*\.{10}", _run(CUOBJDUMP, "-sass", cubin), re.DOTALL))
    for symbol, registers, stack in usage:
        name = ("hopper_" if "6hopper" in symbol else "") + re.search(r"([a-z]+)_kernel", symbol).group(1)
        name += "_tagged" if "Lb1E" in symbol else ""
        name += "".join(f"_{depth}" for depth in re.findall(r"Li(\d+)E", symbol))
        precision = re.search(r"INS0_\d+(\w+?)E", symbol)
        yield Kernel(name, precision.group(1) if precision else "", int(registers), int(stack), bodies[symbol])


def _compile(name: str, architecture: str, folder: Path) -> tuple[list[Kernel], str]:
    """The kernels of a file in csrc/cuda, and what the compiler said."""
    cubin = folder / f"{name}_{architecture}.cubin"
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    flags = ("-std=c++17", "-O3", "-DNDEBUG", "-cubin", "-gencode", target)
    said = _run("nvcc", *flags, "-o", cubin, ROOT / "csrc" / "cuda" / f"{name}.cu")
    return list(_kernels(cubin)), said


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Kernel]]:
    """``kernels(architecture)`` compiles all of the portable ones, once."""
    found: dict[str, list[Kernel]] = {}

    def of(architecture: str) -> list[Kernel]:
        if architecture not in found:
            found[architecture] = _compile("engine", architecture, tmp_path_factory.mktemp("cuda"))[0]
        return found[architecture]

    return of


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Kernel], str]:
    return _compile("hopper", "90a", tmp_path_factory.mktemp("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instantiation_is_there(architecture: str, kernels: Callable[[str], list[Kernel]]) -> None:
    names = Counter((kernel.name, kernel.precision) for kernel in kernels(architecture))
    of_precision = {(name, precision): 1 for name in (*SWEEPS, *WEIGHTS, "redo", "pairs") for precision in PRECISIONS}
    in_registers = {(name, precision): 1 for name in GRADIENTS for precision in HOPPER_PRECISIONS}
    assert names == of_precision | in_registers | {("combine", ""): 1}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture: str, kernels: Callable[[str], list[Kernel]]) -> None:
    assert _spilling(kernels(architecture)) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_and_copies(architecture: str, kernels: Callable[[str], list[Kernel]]) -> None:
    for kernel in kernels(architecture):
        if kernel.name == "combine":
            continue
        least = {PRECISIONS[kernel.precision]: 32, r"LDGSTS\.E\.BYPASS\.128": 4, "LDSM": 6}
        if kernel.precision == "Tf32x3":
            least[PRECISIONS["Tf32x3"]] *= 3
        if kernel.name in GRADIENTS:
            # the same number of products for S and for the sums, whose right operands come transposed
            warps, depth = 4, int(kernel.name.removeprefix("gradient_"))
            rows = 64 if depth == 256 else 128
            least[PRECISIONS[kernel.precision]] = 2 * rows // warps * 32 * depth // (16 * 8 * 16)
            least[r"LDSM\.16\.MT88\.4"] = 32 * depth // (16 * 16)
        for instruction, count in least.items():
            assert len(re.findall(instruction, kernel.instructions)) >= count, (kernel[:4], instruction)
        assert not re.search(r"(?<![.\w])(ATOM|ATOMG|RED)\b", kernel.instructions), kernel[:4]


@pytest.mark.slow
def test_hopper(hopper: tuple[list[Kernel], str]) -> None:
    """Products in the order they were written in, too: ptxas says so where it has to wait for each by itself."""
    compiled, said = hopper
    names = Counter((kernel.name, kernel.precision) for kernel in compiled)
    assert names == {(f"hopper_{name}", p): 1 for name in (*SWEEPS, *WEIGHTS) for p in HOPPER_PRECISIONS}
    assert _spilling(compiled) == []
    assert "wgmma" not in said, said
    for kernel in compiled:
        assert kernel.registers <= HOPPER_REGISTERS, kernel[:4]
        for instruction, count in {
            HOPPER_PRECISIONS[kernel.precision]: 8,
            r"UTMALDG\.2D": 2,
            r"USETMAXREG\.DEALLOC": 1,
            r"USETMAXREG\.TRY_ALLOC": 1,
            r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT": 2,
            r"BAR\.ARV": 1,
        }.items():
            assert len(re.findall(instruction, kernel.instructions)) >= count, (kernel[:4], instruction)
        assert not re.search(r"(?<![.\w])(ATOM|ATOMG|RED|HMMA|LDGSTS)\b", kernel.instructions), kernel[:4]
        assert _highest_register(kernel.instructions) < CONSUMER_REGISTERS, kernel[:4]
        producer = re.search(r"USETMAXREG\.DEALLOC.*?\bEXIT\b", kernel.instructions, re.DOTALL)[0]
        assert "UTMALDG" in producer, kernel[:4]
        assert _highest_register(producer) < PRODUCER_REGISTERS, kernel[:4]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to ask cuda_occupancy.h with")
def test_blocks_on_an_sm(
    tmp_path: Path,
    kernels: Callable[[str], list[Kernel]],
    hopper: tuple[list[Kernel], str],
    record_property: Callable,
) -> None:
    """By capability; where shared memory is 100 KB, one block must still fit."""
    # nvcc may be a script that starts the toolkit's.
    include = re.search(r"#\$ INCLUDES=\"-I([^\"]+)\"", _dry_run()).group(1)
    program = tmp_path / "occupancy"
    flags = ("-std=c++17", "-Wno-unknown-pragmas", "-Wno-psabi", f"-I{ROOT / 'tests' / 'cpp'}", f"-I{include}")
    _run("g++", *flags, "-o", program, ROOT / "tests" / "cpp" / "cuda_occupancy.cpp")
    asked = [(c, k) for c, arch in ((80, "80"), (89, "80"), (90, "90a")) for k in kernels(arch)]
    asked += [(90, kernel) for kernel in hopper[0]]
    lines = "".join(f"{capability} {kernel.name} {kernel.registers}\n" for capability, kernel in asked)
    answers = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
    for (capability, kernel), answer in zip(asked, answers, strict=True):
        blocks, shared = map(int, answer.split())
        record_property(f"{kernel.name} {kernel.precision} sm_{capability}", (kernel.registers, shared, blocks))
        if kernel.name.startswith("hopper"):
            assert blocks == 1, kernel[:4]
            assert shared <= MOST_SHARED_BYTES, kernel[:4]
        elif kernel.name != "combine":
            on_89 = BLOCKS_ON_89.get(kernel.name, 1)
            assert blocks == (on_89 if capability == 89 else BLOCKS.get((kernel.name, kernel.precision), 2)), kernel[:4]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to build the bindings with")
def test_the_extension_builds_and_loads(tmp_path: Path) -> None:
    """With any torch, whose device it then misses; for 9.0 with its own kernels and the portable ones."""
    for name in ("csrc", "fastcl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"FASTCL_BUILD": "0", "FASTCL_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    environment["PYTHONPATH"] = str(tmp_path)
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    built = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"])
    assert built.returncode == 0, built.stdout + built.stderr
    program = "from fastcl.backends.cuda import binding as b; print(b.unavailable()); print(b.extension().HAS_HOPPER)"
    loaded = run([sys.executable, "-c", program])
    unavailable = "None" if torch.cuda.is_available() else "there is no CUDA device"
    assert loaded.stdout.splitlines() == [unavailable, "1"], loaded.stderr


def _highest_register(instructions: str) -> int:
    return max(map(int, re.findall(r"\bR(\d+)\b", instructions)))


def _spilling(kernels: list[Kernel]) -> list[tuple]:
    return [k[:4] for k in kernels if k.stack or re.search(r"\b(STL|LDL)\b", k.instructions)]


def _dry_run() -> str:
    return subprocess.run(["nvcc", "-dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
