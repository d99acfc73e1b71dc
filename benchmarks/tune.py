"""``python -m benchmarks tune``: looks for the kernels' fastest block sizes on this GPU, to be kept in fastcl/tuning.

For each kernel, precision and D: candidates that fit shared memory and registers, the most promising first by the cost
model; each must agree with the default configuration before it is timed; the fastest replaces the entry of its shape in
the device's file, and all other entries stay. **Not run on a GPU yet.** What needs one is behind :class:`Bench`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.devices import DEVICES
from benchmarks.predictions import case_of
from benchmarks.roofline import clocks_per_logit, shared_memory
from fastcl import tuning

KERNELS = tuple(kernel for kernel in tuning.KERNELS if kernel != "redo")
"""The redo kernel is not among them: it nearly always returns at once."""
DTYPES = {"half": "bfloat16", "tf32": "tf32", "float32": "float32"}
"""The dtype that stands for each precision class."""
TOLERANCE = {"half": 2e-2, "tf32": 1e-2, "float32": 1e-4}
"""Largest relative difference from what the default configuration computes, in the 2-norm."""
GAIN = 0.98
"""A candidate wins only if it takes less than this share of the default's time: the rest is noise."""
_ACCUMULATORS = (8, 128)
"""Fewest and most elements of a tile of S that a thread may hold."""
_WAYS = ((True, False), (False, False), (True, True), (False, True))
"""Whether operands come by TMA and whether programs persist, in the order in which they are tried."""


class Job(NamedTuple):
    """One entry of a table that is looked for."""

    kernel: str
    precision: str
    d: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.precision} D = {self.d}"

    @property
    def base(self) -> str:
        """The kernel without what the entry says of its plans."""
        return self.kernel.split("_")[0]

    @property
    def symmetric(self) -> bool:
        return "symmetric" in self.kernel


class Found(NamedTuple):
    """The fastest configuration of a job, and the default's time."""

    config: tuning.Config
    ms: float
    default_ms: float


class Bench(Protocol):
    """What runs a kernel: a GPU, or a test."""

    def outputs(self, job: Job, config: tuning.Config | None) -> Sequence[Tensor]:
        """What the kernel computes with ``config``, by default with the table's; raises what a launch raises."""

    def spills(self) -> int:
        """Registers that the kernel compiled last keeps in memory."""

    def milliseconds(self, job: Job, config: tuning.Config | None) -> float:
        """The median time of a call."""


def candidates(
    job: Job, most_shared_memory: int, itemsize: int, capability: tuple[int, int] = (8, 0)
) -> list[tuning.Config]:
    """Block sizes that a launch could accept, and the ways to go through them on a device of this capability."""
    sides, depths, piece = (32, 64, 128, 256), (32, 64, 128), 64
    if job.base == "registers":
        depths, piece = (32, 64, 128, 256), 16
    ways = _WAYS if job.base in ("sweep", "weights") and capability >= (9, 0) else ((False, False),)
    found = []
    for m, n, d, warps, stages in itertools.product(sides, sides, depths, (4, 8), (2, 3, 4)):
        config = tuning.Config(m, n, d, warps, stages, piece)
        if reason_against(config, job, most_shared_memory, itemsize) is None:
            found += [replace(config, tma=tma, persistent=persistent) for tma, persistent in ways]
    return found


def reason_against(config: tuning.Config, job: Job, most_shared_memory: int, itemsize: int) -> str | None:
    """Why a configuration is not worth compiling, or None."""
    if job.base == "registers":
        return _reason_against_registers(config, job, most_shared_memory, itemsize)
    if job.symmetric and config.block_m != config.block_n:
        return "a triangle of tiles is made of squares"
    if config.block_d > max(32, 2 ** math.ceil(math.log2(job.d))):
        return "its steps are longer than D"
    if (size := shared_memory(config, itemsize)) > most_shared_memory:
        return f"it takes {size:,} bytes of shared memory, {most_shared_memory:,} are there"
    held = config.block_m * config.block_n // (32 * config.num_warps)
    if not _ACCUMULATORS[0] <= held <= _ACCUMULATORS[1]:
        return f"a thread would hold {held} elements of S"
    return None


def _reason_against_registers(config: tuning.Config, job: Job, most_shared_memory: int, itemsize: int) -> str | None:
    if not config.block_d // 2 < job.d <= config.block_d:
        return "its sums are not as wide as D"
    size = (config.block_m + config.num_stages * config.block_n) * config.block_d * itemsize
    if size > most_shared_memory:
        return f"it takes {size:,} bytes of shared memory, {most_shared_memory:,} are there"
    held = config.block_m * (config.block_n + config.block_d) // (32 * config.num_warps)
    return f"a thread would hold {held} sums" if held > _ACCUMULATORS[1] else None


def ordered(configs: Iterable[tuning.Config], job: Job, capability: tuple[int, int], rows: int) -> list[tuning.Config]:
    """The most promising first, by the cost model of a device of this capability; as they come if it has none.

    The model hardly tells pipelines apart: each tile is tried with one, then each with another.
    """
    device = next((device for device in DEVICES.values() if device.capability == capability), None)
    if device is None or job.base == "registers":
        return list(configs)
    dtype = DTYPES[job.precision]
    case = case_of("nt_xent" if job.symmetric else "clip", rows, job.d, dtype)
    pipelines: dict[tuple[int, int, int], list[tuning.Config]] = {}
    for config in sorted(configs, key=lambda config: (abs(config.block_d - 64), abs(config.num_stages - 3))):
        pipelines.setdefault((config.block_m, config.block_n, config.num_warps), []).append(config)
    rounds = [(i, config) for group in pipelines.values() for i, config in enumerate(group)]
    modelled = {"sigmoid": "weights"}.get(job.base, job.base)
    rounds.sort(key=lambda entry: (entry[0], clocks_per_logit(case, device, modelled, entry[1], dtype)))
    return [config for _, config in rounds]


def search(
    jobs: Sequence[Job],
    candidates_of: Callable[[Job], Sequence[tuning.Config]],
    bench: Bench,
    *,
    limit_s: float,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Job, Found | None]:
    """The jobs whose default was beaten, and those whose entry must go. Each gets its share of the time that is left.

    Sums in registers have entries only where they beat panels of W, which are their default.
    """
    deadline = clock() + limit_s
    found = {}
    for number, job in enumerate(jobs):
        share_end = clock() + (deadline - clock()) / (len(jobs) - number)
        if clock() >= deadline:
            say(f"{job}: left out, the {limit_s:.0f} s are over")
            continue
        best = _best_of(job, candidates_of(job), bench, lambda end=share_end: clock() >= end, say)
        if best is not None or job.base == "registers":
            found[job] = best
    return found


def _best_of(
    job: Job,
    configs: Sequence[tuning.Config],
    bench: Bench,
    is_over: Callable[[], bool],
    say: Callable[[str], None],
) -> Found | None:
    exact = bench.outputs(job, None)
    default_ms = bench.milliseconds(job, None)
    say(f"{job}: {default_ms:.3f} ms with the table's configuration, {len(configs)} candidates")
    best = None
    for number, config in enumerate(configs):
        if is_over():
            say(f"  {len(configs) - number} candidates left out, the job's share of the time is over")
            break
        reason, ms = _reason_to_reject(job, config, exact, bench), math.nan
        if reason is None:
            ms = bench.milliseconds(job, config)
            if ms < (best.ms if best else GAIN * default_ms):
                best = Found(config, ms, default_ms)
        say(f"  {number + 1:>3} {tuple(vars(config).values())}: {reason or f'{ms:.3f} ms'}")
    if best is not None:
        say(f"  {default_ms / best.ms:.2f}x as fast: {best.config}")
    return best


def _reason_to_reject(job: Job, config: tuning.Config, exact: Sequence[Tensor], bench: Bench) -> str | None:
    try:
        outputs = bench.outputs(job, config)
    except Exception as error:  # a compiler or a launch that refuses is an answer, too
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    if (spills := bench.spills()) > 0:
        return f"{spills} registers spilled"
    for error in map(_relative_difference, outputs, exact):
        # Not `error > allowed`, which a NaN passes.
        if not error <= TOLERANCE[job.precision]:
            return f"WRONG by {error:.1e}"
    return None


def _relative_difference(x: Tensor, exact: Tensor) -> float:
    difference, size = (torch.linalg.vector_norm(y.double()).item() for y in (x.double() - exact.double(), exact))
    return difference / size if size > 0 else difference


def merged(content: Mapping[str, Any], found: Mapping[Job, Found | None]) -> dict[str, Any]:
    """A table's content with what was found in place of entries of the same shape; all others stay."""
    content = json.loads(json.dumps(content))
    for job, best in found.items():
        shape = {"d": job.d}
        entries = content["kernels"].setdefault(job.kernel, {}).setdefault(job.precision, [])
        entries[:] = [entry for entry in entries if entry["shape"] != shape]
        if best is not None:
            entries.append({"shape": shape, **vars(best.config)})
        entries.sort(key=lambda entry: sorted(entry["shape"].items()))
    return content


def formatted(content: Mapping[str, Any]) -> str:
    """JSON as the tables have it: an entry to a line."""
    lines = ["{"]
    for key, value in content.items():
        if key == "backends":
            lines.append('  "backends": [\n    ' + ",\n    ".join(json.dumps(entry) for entry in value) + "\n  ],")
        elif key != "kernels":
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)},")
    kernels = []
    for kernel, precisions in content["kernels"].items():
        parts = []
        for precision, entries in precisions.items():
            separator = ",\n" + " " * (len(precision) + 11)
            parts.append(f"      {json.dumps(precision)}: [{separator.join(json.dumps(e) for e in entries)}]")
        kernels.append(f"    {json.dumps(kernel)}: {{\n" + ",\n".join(parts) + "\n    }")
    return "\n".join([*lines, '  "kernels": {', ",\n".join(kernels), "  }", "}"]) + "\n"


def table_file(folder: Path, capability: tuple[int, int], device: str, shared: int) -> tuple[Path, dict[str, Any]]:
    """The device's file and its content; that of default.json where the device has none yet."""
    number = 10 * capability[0] + capability[1]
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if number in content["capabilities"]:
            return path, content
    content = json.loads((folder / "default.json").read_text())
    own = {"description": device, "capabilities": [number], "shared_memory": shared}
    return folder / f"sm_{number}.json", content | own


def write_table(
    folder: Path, capability: tuple[int, int], device: str, shared: int, found: Mapping[Job, Found | None]
) -> Path:
    """Merges what was found into the device's file."""
    path, content = table_file(folder, capability, device, shared)
    write(path, merged(content, found))
    return path


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a table, as one step that an interruption can't leave half done."""
    scratch = path.with_suffix(".new")
    scratch.write_text(formatted(content))
    scratch.replace(path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--kernels", type=_parts(KERNELS), default=KERNELS, help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--precisions", type=_parts(tuple(DTYPES)), default=("half",), help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--dims", type=_numbers, default=(64, 128, 256, 512, 1024, 2048), help="values of D")
    parser.add_argument("--rows", type=int, default=16384, help="rows of S that are timed")
    parser.add_argument("--most", type=int, default=80, help="candidates tried for each entry")
    parser.add_argument("--out", type=Path, default=Path(tuning.__file__).parent, help="folder of the tables")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was tuned", file=sys.stderr)
        return 1
    # Imports Triton, which only a GPU needs.
    from benchmarks.tune_bench import KernelBench

    properties = torch.cuda.get_device_properties(0)
    capability, shared = (properties.major, properties.minor), properties.shared_memory_per_block_optin
    # Shallow depths first: there the block sizes matter most.
    jobs = [Job(*key) for key in itertools.product(options.kernels, options.precisions, options.dims)]
    jobs.sort(key=lambda job: job.d)

    def candidates_of(job: Job) -> list[tuning.Config]:
        fitting = candidates(job, shared, 2 if job.precision == "half" else 4, capability)
        return ordered(fitting, job, capability, options.rows)[: options.most]

    bench = KernelBench(options.rows, "cuda")
    found = search(jobs, candidates_of, bench, limit_s=options.limit)
    if not found:
        print("nothing was faster than the tables")
        return 0
    print(f"wrote {len(found)} entries to {write_table(options.out, capability, properties.name, shared, found)}")
    return 0


def _parts(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        for part in text.split(","):
            if part not in allowed:
                raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(allowed)}")
        return tuple(text.split(","))

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
