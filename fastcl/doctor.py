"""What ``python -m fastcl`` prints: the state of this machine, and a quick self-check of every backend that can run.

May import the public API and the engine.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastcl
from fastcl.backends import cpu
from fastcl.engine import BACKENDS

_PAIRS, _DIM, _TAU = 96, 40, 0.1
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def summary() -> str:
    """This machine's state in one line: versions, processor or GPU, and the backend that a default call takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    engine = next(n for n in ("triton", "cpu", "tiled") if _runs_on(n, device))
    level = f" ({cpu.level()})" if engine == "cpu" else ""
    return (
        f"fastcl {fastcl.__version__}, torch {torch.__version__}, {name}, {torch.get_num_threads()} threads: "
        f"backend {engine}{level}"
    )


def report() -> tuple[str, bool]:
    """The whole report, and whether every available backend passed its self-check."""
    lines = [
        f"fastcl    {fastcl.__version__}",
        f"python    {platform.python_version()} on {platform.platform()}",
        f"torch     {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton    {_version('triton') or 'not installed'}",
        f"processor {_processor()}",
    ]
    if cpu.unavailable() is None:
        lines.append(f"engine    {cpu.level()} (this processor has: {', '.join(cpu.levels())})")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"gpu {index}     {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    if not torch.cuda.is_available():
        lines.append("gpu       none that torch can use")
    if forced := os.environ.get("FASTCL_BACKEND"):
        lines.append(f"forced    FASTCL_BACKEND={forced}")
    lines += ["", "backend   state"]
    healthy = True
    for name, backend in BACKENDS.items():
        reason = backend.unavailable()
        if reason is not None:
            lines.append(f"{name:9} unavailable: {reason}")
            continue
        for device in ("cpu", "cuda"):
            if not _runs_on(name, device):
                continue
            errors = {dtype: _self_check(name, device, dtype) for dtype in _TOLERANCE}
            passed = all(error < _TOLERANCE[dtype] for dtype, error in errors.items())
            healthy &= passed
            shown = ", ".join(f"{str(dtype)[6:]} {error:.1e}" for dtype, error in errors.items())
            lines.append(f"{name:9} {'works' if passed else 'WRONG'} on {device}: error against float64 {shown}")
    return "\n".join(lines), healthy


def main() -> int:
    """Print the report; the exit code is 0 where every available backend is right."""
    text, healthy = report()
    print(text)
    return 0 if healthy else 1


def _self_check(name: str, device: str, dtype: torch.dtype) -> float:
    """The larger relative error of value and gradient of nt_xent and clip_loss, against `dense` in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PAIRS, _DIM, generator=generator)
    features = [x, x + 0.5 * torch.randn(_PAIRS, _DIM, generator=generator)]
    results = []
    for backend, kind in ((name, dtype), ("dense", torch.float64)):
        inputs = [z.to(device=device, dtype=dtype).to(kind).requires_grad_() for z in features]
        loss = fastcl.nt_xent(*inputs, _TAU, backend=backend)
        loss = loss + fastcl.clip_loss(*inputs, 1 / _TAU, normalize=True, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    return max(float((got.double() - want).norm() / want.norm()) for got, want in zip(*results, strict=True))


def _runs_on(name: str, device: str) -> bool:
    if BACKENDS[name].unavailable() is not None or (device == "cuda" and not torch.cuda.is_available()):
        return False
    return name in {"cpu": ("cpu", "tiled", "dense"), "cuda": ("cuda", "triton", "tiled", "dense")}[device]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
