"""How anything here is measured: time, peak memory, error against float64, and the rate of a plain matrix product.

Imports torch and nothing of fastcl, so that a peer's process measures exactly as fastcl's does.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[[], object]
"""One forward and backward, ready to be called again and again."""


class Timing(NamedTuple):
    """Milliseconds of one call: the median and the 20th and 80th percentiles over ``repeats`` calls."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


class Errors(NamedTuple):
    """Relative errors against float64; ``gradient`` is the worst of the inputs' gradients, each in the 2-norm."""

    value: float
    gradient: float


class ValueAndGradients(NamedTuple):
    """A loss and its gradients with respect to the inputs that require one, in their order."""

    value: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class GemmRate:
    """What this machine's ``torch.mm`` reaches: floating-point operations (2 for a multiply-add) in a second."""

    flops: float
    dtype: str
    library: str
    size: int

    def __str__(self) -> str:
        return f"{self.flops / 1e9:,.0f} GFLOP/s, {self.dtype} {self.size}^3 by {self.library}"


def gradient_step(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], ValueAndGradients]:
    """A step that computes ``loss(*inputs)`` and its gradients with respect to the inputs that require one.

    Returns the gradients instead of accumulating them in ``.grad``, so that every call does the same work.
    """
    wanted = [x for x in inputs if x.requires_grad]

    def step() -> ValueAndGradients:
        value = loss(*inputs)
        return ValueAndGradients(value.detach(), torch.autograd.grad(value, wanted))

    return step


def sample_times(
    step: Step, device: torch.device | str = "cpu", *, budget_s: float = 1.0, warmup: int = 1, least: int = 1
) -> list[float]:
    """Milliseconds of each call of ``step`` that fitted into ``budget_s`` (at least ``least``), after ``warmup`` calls.

    On a GPU each call lies between two CUDA events and is waited for before the next one starts: what is timed is a
    call that finds the device idle, launch overhead included.
    """
    device = torch.device(device)
    for _ in range(warmup):
        step()
    _synchronize(device)
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < least or time.perf_counter() < end:
        times.append(_timed(step, device))
    return times


def summarize_times(times: Sequence[float]) -> Timing:
    """The median and the percentiles of samples in milliseconds."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], len(times))


def time_step(
    step: Step, device: torch.device | str = "cpu", *, budget_s: float = 1.0, warmup: int = 1, least: int = 3
) -> Timing:
    """:func:`sample_times`, summarised."""
    return summarize_times(sample_times(step, device, budget_s=budget_s, warmup=warmup, least=least))


def peak_memory(step: Step, device: torch.device | str = "cpu") -> int:
    """Bytes that one call of ``step`` holds at its peak beyond what is allocated when it starts.

    Inputs that exist already are not counted, the gradients that the call returns are. On a GPU this is what the
    caching allocator handed out. On a CPU it is resident memory: the kernel's high-water mark, reset before the call
    (Linux); where that can't be reset, resident memory sampled each millisecond. Libraries load and thread pools start
    in the first call of a process, so run a small step before; and measure in a fresh process, because an allocator
    that kept freed memory hides what the next call needs.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    _return_freed_memory()
    if _reset_high_water_mark():
        before = _status_bytes("VmRSS")
        step()
        return max(0, _status_bytes("VmHWM") - before)
    with _sampled_resident_memory() as peak:
        step()
    return peak()


def relative_errors(found: ValueAndGradients, exact: ValueAndGradients) -> Errors:
    """How far a loss and its gradients are from the exact ones; NaN where anything found is not finite."""
    pairs = [(found.value, exact.value), *zip(found.gradients, exact.gradients, strict=True)]
    errors = []
    for x, y in pairs:
        y = y.double()
        difference = torch.linalg.vector_norm(x.to(y) - y).item()
        size = torch.linalg.vector_norm(y).item()
        errors.append(difference / size if size > 0 else difference)
    # max() would pass over a NaN that isn't first.
    gradient = math.nan if any(math.isnan(e) for e in errors[1:]) else max(errors[1:], default=0.0)
    return Errors(errors[0], gradient)


def dense_bytes(rows: int, columns: int, dtype: torch.dtype = torch.float32, copies: int = 4) -> int:
    """What a dense loss needs at its peak: ``copies`` matrices of rows x columns in ``dtype``.

    Measured with eager PyTorch: 3 for NT-Xent and InfoNCE (the log-softmax saved for the backward, its gradient and
    that of the logits), 4 for CLIP (a log-softmax for each direction). The default leaves room for one more.
    """
    return copies * rows * columns * dtype.itemsize


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Memory that could be allocated now: the GPU's free memory, or the machine's within its control group's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_system_available(), *_control_group_rooms()])


def gemm_rate(dtype: torch.dtype, device: torch.device | str = "cpu", *, budget_s: float = 1.0) -> GemmRate:
    """The rate of a square ``torch.mm`` in ``dtype`` with the matmul precision that is set, from its fastest repeat."""
    device = torch.device(device)
    # Some CPUs have no fast product in half precision: stop growing where the next size would outlast the budget.
    for size in (1024, 2048, 4096, 8192) if device.type == "cuda" else (256, 512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        fastest = min(sample_times(lambda a=a, b=b: torch.mm(a, b), device, budget_s=0.1 * budget_s, warmup=2))
        if fastest / 1e3 * 8 > 4 * budget_s:
            break
    fastest = min(fastest, *sample_times(lambda: torch.mm(a, b), device, budget_s=budget_s, warmup=0))
    return GemmRate(2 * size**3 / (fastest / 1e3), dtype_name(dtype), gemm_library(dtype, device), size)


def copy_rate(device: torch.device | str = "cpu", *, size: int = 1 << 30, budget_s: float = 0.5) -> float:
    """Bytes a second, read and written together, of the fastest copy of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    fastest = min(sample_times(lambda: destination.copy_(source), device, budget_s=budget_s, warmup=2, least=3))
    return 2 * size / (fastest / 1e3)


def rate_of_threads(rate: Callable[[], float], threads: int, *, repeats: int = 11) -> float:
    """The sum of what ``rate`` returns on each of ``threads`` threads that call it at once: the repeats' median."""
    together = threading.Barrier(threads)

    def one(_: int) -> float:
        together.wait()
        return rate()

    with ThreadPoolExecutor(threads) as pool:
        return statistics.median(sum(pool.map(one, range(threads))) for _ in range(repeats))


def gemm_library(dtype: torch.dtype, device: torch.device | str = "cpu") -> str:
    """The library behind ``torch.mm``, as far as torch tells."""
    if torch.device(device).type == "cuda":
        precision = torch.get_float32_matmul_precision()
        mode = f" (float32 precision {precision})" if dtype is torch.float32 else ""
        return ("hipBLAS" if torch.version.hip else f"cuBLAS of CUDA {torch.version.cuda}") + mode
    lowered = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    if (lowered or dtype in (torch.bfloat16, torch.float16)) and torch.backends.mkldnn.is_available():
        return "oneDNN"
    for name in ("mkl", "openblas", "accelerate"):
        if f"blas_info={name}" in torch.__config__.show().lower():
            return {"mkl": "MKL", "openblas": "OpenBLAS", "accelerate": "Accelerate"}[name]
    return "torch's BLAS"


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _timed(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    start_s = time.perf_counter()
    step()
    _synchronize(device)
    return (time.perf_counter() - start_s) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _return_freed_memory() -> None:
    # glibc keeps freed heap; trimming puts the baseline where it would be had earlier calls not happened.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmHWM") <= 1.05 * _status_bytes("VmRSS")
    except (OSError, ValueError):
        return False


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def _resident_bytes() -> int:
    try:
        return _status_bytes("VmRSS")
    except (OSError, ValueError):
        import resource  # not on Windows

        # Only the mark since the process started: an upper bound of the difference in a process that did little before.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if os.uname().sysname == "Darwin" else peak * 1024


@contextmanager
def _sampled_resident_memory() -> Iterator[Callable[[], int]]:
    before = highest = _resident_bytes()
    stop = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.001):
            highest = max(highest, _resident_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(0, highest - before)
    finally:
        stop.set()
        thread.join()
        highest = max(highest, _resident_bytes())


def _system_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_group_rooms() -> list[int]:
    """Limit minus use of each control group this process is in (version 2, or version 1's memory controller)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit, use = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, use = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        leaf = root / group.lstrip("/")
        # In a container the path of the host's view may not exist below the mount: then the mount itself is the group.
        for folder in [leaf, *leaf.parents]:
            with suppress(OSError, ValueError):  # no such file, or "max"
                rooms.append(max(0, int((folder / limit).read_text()) - int((folder / use).read_text())))
            if folder == root:
                break
    return rooms
