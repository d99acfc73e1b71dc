"""The extension ``fastcl._cuda``: loading it, what its kernels can read, and calls of its operators."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOWEST_CAPABILITY = (8, 0)


@functools.lru_cache(maxsize=1)
def load() -> tuple[Any, str | None]:
    """The extension or None, and the reason why it could not be loaded or None."""
    try:
        from fastcl import _cuda
    except ImportError as error:
        return None, f"the CUDA extension is not built or can't be loaded ({error})"
    return _cuda, None


def extension() -> Any:
    """The extension, or an error."""
    loaded, reason = load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def unavailable() -> str | None:
    loaded, reason = load()
    if loaded is not None and loaded.DEVICE == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return reason


def takes(a: Tensor) -> str | None:
    if (reason := unavailable()) is not None:
        return reason
    if a.device.type != extension().DEVICE:
        return f"the tensors are on {a.device.type}, not on a CUDA device"
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < _LOWEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(a.device)} has a compute capability below 8.0"
    if a.dtype not in _DTYPES:
        return f"{a.dtype} is not one of float32, bfloat16, float16"
    if a.shape[1] == 0:
        return "an operand is empty"
    return None


def capability(a: Tensor) -> tuple[int, int] | None:
    """The compute capability of its device, None on a CPU."""
    return torch.cuda.get_device_capability(a.device) if a.is_cuda else None


def aligned(x: Tensor) -> Tensor:
    """Rows apart from each other that begin where asynchronous copies can read them: x itself, or a copy."""
    alignment = extension().ALIGNMENT
    pitch = x.stride(0) * x.element_size()
    apart = x.stride(0) >= x.shape[1]
    if apart and x.stride(1) == 1 and pitch % alignment == 0 and x.data_ptr() % alignment == 0:
        return x
    multiple = alignment // x.element_size()
    rows, depth = x.shape
    return x.new_empty(rows, -(-depth // multiple) * multiple)[:, :depth].copy_(x)


def run(name: str, device: torch.device, *arguments: Any) -> Any:
    """Calls an operator on the operands' device and in its current stream."""
    extension()
    operator = getattr(torch.ops.fastcl_cuda, name)
    if device.type != "cuda":
        return operator(*arguments, 0)
    with torch.cuda.device(device):
        return operator(*arguments, torch.cuda.current_stream().cuda_stream)
