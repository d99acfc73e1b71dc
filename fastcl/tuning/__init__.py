"""What was measured on devices, one JSON file for each class of them: block sizes, and which backend is faster.

A leaf module: it imports torch for dtypes and nothing else of fastcl. Nothing is tuned at run time; the entry whose
shape lies nearest, in powers of two, is taken. ``default.json`` fits every supported device.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

KERNELS = (
    *("sweep", "sweep_symmetric", "sweep_symmetric_several", "redo", "weights", "weights_symmetric"),
    "registers_symmetric",
    *("sweep_tags", "sweep_symmetric_tags", "weights_tags", "weights_symmetric_tags", "sigmoid"),
)
"""A symmetric plan walks a triangle of tiles, which must be square; several terms to each tile take registers there.
Masks that test tags take registers everywhere. ``registers_symmetric`` has entries only for the D at which that kernel
is to be taken."""
PRECISIONS = ("half", "tf32", "float32")


@dataclass(frozen=True)
class Config:
    """A tile of S is [block_m, block_n], accumulated over D in steps of block_d.

    One with pairs that a mask treats apart is made in squares of side ``piece``, for masks take registers. With ``tma``
    whole tiles are read by TMA where features lie so that it can (compute capability 9.0). With ``persistent`` there
    are as many programs as the device runs at a time. Both are for sweeps and for panels, whose kernels look at them.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    piece: int = 64
    tma: bool = False
    persistent: bool = False


@dataclass(frozen=True)
class Table:
    """A file: compute capabilities it is for, bytes of shared memory it stays within, and its entries."""

    capabilities: tuple[int, ...]
    shared_memory: int
    workspace_bytes: int
    entries: Mapping[tuple[str, str], tuple[tuple[Mapping[str, int], Config], ...]]
    """(kernel, precision class) to (shape, configuration) pairs"""
    backends: Mapping[tuple[str, str], tuple[tuple[Mapping[str, int], str], ...]]
    """(kind of plan, precision class) to (shape, fastest backend) pairs; empty until they were measured"""
    cuda_registers: Mapping[str, tuple[int, ...]]
    """precision class to the D, powers of two, at which the backend `cuda` keeps a backward's sums in registers"""


class _Override(NamedTuple):
    config: Config | None
    kernel: str | None
    workspace_bytes: int | None
    registers: Config | None


_override: ContextVar[_Override | None] = ContextVar("_override", default=None)


def precision_class(dtype: torch.dtype, matmul_precision: str) -> str:
    """float32 counts as tf32 where one tf32 product is enough: it then needs far fewer registers."""
    if dtype is not torch.float32:
        return "half"
    return "tf32" if matmul_precision == "tf32" else "float32"


def lookup(kernel: str, precision: str, capability: tuple[int, int] | None, **shape: int) -> Config:
    """The configuration of the nearest shape (n, m, d) in the table of this compute capability."""
    override = _override.get()
    if override is not None and override.config is not None and override.kernel in (None, kernel):
        return override.config
    entries = table(capability).entries[kernel, precision]
    return min(entries, key=lambda entry: _distance(entry[0], shape))[1]


def fastest_backend(kind: str, precision: str, capability: tuple[int, int] | None, **shape: int) -> str | None:
    """The backend that was measured to be the fastest at the nearest shape (n, m, d); None where nothing was measured.

    The kind of a plan is "symmetric", "rows" for terms along rows alone, or "both" for terms along both axes.
    """
    entries = table(capability).backends.get((kind, precision), ())
    return min(entries, key=lambda entry: _distance(entry[0], shape))[1] if entries else None


def workspace_bytes(capability: tuple[int, int] | None = None) -> int:
    """How much memory a panel of the gradient matrix, or of what it is made from, may take, whatever the shape."""
    override = _override.get()
    if override is not None and override.workspace_bytes is not None:
        return override.workspace_bytes
    return table(capability).workspace_bytes


def registers(precision: str, capability: tuple[int, int] | None, d: int) -> Config | None:
    """How a symmetric plan's backward keeps its sums in registers at this D, or None where panels of W are faster.

    An entry is for all D whose next power of two is its ``block_d``: sums are that wide.
    """
    override = _override.get()
    if override is not None:
        return override.registers
    entries = table(capability).entries["registers_symmetric", precision]
    return next((config for _, config in entries if config.block_d // 2 < d <= config.block_d), None)


def cuda_registers(precision: str, capability: tuple[int, int] | None, d: int) -> bool:
    """Whether the backend `cuda` keeps a backward's sums in registers at this D, where panels of W were slower.

    An entry is for all D whose next power of two, 64 at least, it is: the kernel's sums are that wide.
    """
    return max(64, 1 << (d - 1).bit_length()) in table(capability).cuda_registers.get(precision, ())


@contextlib.contextmanager
def override(
    config: Config | None = None,
    workspace_bytes: int | None = None,
    registers: Config | None = None,
    kernel: str | None = None,
) -> Iterator[None]:
    """Within the context all kernels, or an entry's, take this configuration, and the backward this much workspace.

    A symmetric plan's backward keeps its sums in registers with ``registers``, and writes panels of W without.
    """
    token = _override.set(_Override(config, kernel, workspace_bytes, registers))
    try:
        yield
    finally:
        _override.reset(token)


def table(capability: tuple[int, int] | None) -> Table:
    number = None if capability is None else 10 * capability[0] + capability[1]
    return next((table for table in tables() if number in table.capabilities), _default())


@functools.cache
def tables() -> tuple[Table, ...]:
    """All tables; the default one names no capability."""
    return tuple(_read(path) for path in sorted(Path(__file__).parent.glob("*.json")))


@functools.cache
def _default() -> Table:
    return next(table for table in tables() if not table.capabilities)


def _read(path: Path) -> Table:
    content: dict[str, Any] = json.loads(path.read_text())
    entries = {
        (kernel, precision): tuple(
            (entry["shape"], Config(**{key: value for key, value in entry.items() if key != "shape"}))
            for entry in content["kernels"][kernel][precision]
        )
        for kernel in KERNELS
        for precision in PRECISIONS
    }
    backends: dict[tuple[str, str], tuple[tuple[Mapping[str, int], str], ...]] = {}
    for entry in content.get("backends", ()):
        key = entry["plan"], entry["precision"]
        backends[key] = (*backends.get(key, ()), (entry["shape"], entry["fastest"]))
    in_registers = {precision: tuple(depths) for precision, depths in content.get("cuda_registers", {}).items()}
    return Table(
        tuple(content["capabilities"]),
        content["shared_memory"],
        content["workspace_bytes"],
        entries,
        backends,
        in_registers,
    )


def _distance(known: Mapping[str, int], shape: Mapping[str, int]) -> float:
    return sum(abs(math.log2(size / shape[name])) for name, size in known.items())
