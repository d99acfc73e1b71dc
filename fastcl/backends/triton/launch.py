"""What forward and backward launch their kernels with: operands as the kernels want them, and a configuration."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcl import tuning
from fastcl.backends.shift import fixed_shift, flag_threshold
from fastcl.backends.triton.plan import Constants
from fastcl.terms import Operands, PanelOperands, Tags, wants_tf32

_FIRST_WITH_TMA = (9, 0)
_WARPS = 8
"""of a multiprocessor, each of whose threads takes up to 255 of its 65,536 registers, as these kernels' do"""


class Inputs(NamedTuple):
    """The operands, with unit stride along D."""

    a: Tensor
    b: Tensor
    scale: Tensor
    shift: Tensor
    target: Tensor | None
    row_tags: Tags
    column_tags: Tags
    first_column: int
    self_offset: int
    threshold: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, M, D)."""
        return self.a.shape[0], self.b.shape[0], self.a.shape[1]


def inputs(operands: Operands, shift: Tensor | None = None) -> Inputs:
    """The operands for the kernels; ``shift`` is their fixed shift where it is known."""
    n, m = operands.shape
    a = unit_stride(operands.a)
    row_tags = contiguous(operands.row_tags)
    return Inputs(
        a=a,
        b=a if operands.b is None else unit_stride(operands.b),
        scale=operands.scale,
        shift=fixed_shift(operands, operands.scale.detach().float()) if shift is None else shift,
        target=None if operands.target is None else operands.target.contiguous(),
        row_tags=row_tags,
        column_tags=row_tags if operands.b is None else contiguous(operands.column_tags),
        first_column=operands.col0,
        # beyond [-n, m] no pair of this S is a self pair, and so it stays when clamped
        self_offset=max(-n, min(operands.row0 - operands.col0, m)),
        threshold=flag_threshold(operands),
    )


def matmul_precision(dtype: torch.dtype) -> str:
    """tl.dot's ``input_precision``: three tf32 products stand for one of float32."""
    if dtype is not torch.float32:
        return "ieee"
    return "tf32" if wants_tf32() else "tf32x3"


def configuration(kernel: str, a: Tensor, n: int, m: int) -> tuning.Config:
    """The configuration for a kernel over [n, m] of the S that ``a`` is one side of."""
    precision = tuning.precision_class(a.dtype, matmul_precision(a.dtype))
    return tuning.lookup(kernel, precision, capability(a), n=n, m=m, d=a.shape[1])


def capability(x: Tensor) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def constant_arguments(constants: Constants, x: Inputs, config: tuning.Config) -> dict[str, Any]:
    """Keyword arguments of a kernel that walks tiles for all of a plan's terms."""
    piece = min(config.piece, config.block_m, config.block_n)
    return constants.as_arguments() | tile_arguments(x, config) | {"PIECE": piece}


def tile_arguments(x: Inputs | PanelOperands, config: tuning.Config) -> dict[str, Any]:
    return {
        "EVEN_D": x.a.shape[1] % config.block_d == 0,
        "PRECISION": matmul_precision(x.a.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def programs(count: int, x: Tensor, config: tuning.Config) -> int:
    """How many programs share ``count`` pieces of work: one each, or as many as the device runs at a time."""
    if not config.persistent:
        return count
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return min(count, multiprocessors * max(1, _WARPS // config.num_warps))


def operand_tiles(x: Inputs, config: tuning.Config) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """The operands as TMA reads them, a tile at a time, where ``config`` asks for it and TMA can read both."""
    if not (config.tma and _read_by_tma(x.a) and _read_by_tma(x.b)):
        return None, None
    return tuple(
        TensorDescriptor.from_tensor(features, [block, config.block_d])
        for features, block in ((x.a, config.block_m), (x.b, config.block_n))
    )


def _read_by_tma(features: Tensor) -> bool:
    """Rows side by side along D that begin at multiples of 16 bytes, on a device that has TMA (or none at all)."""
    (n, d), (stride, step), size = features.shape, features.stride(), features.element_size()
    aligned = features.data_ptr() % 16 == 0 and stride * size % 16 == 0
    has_tma = (capability(features) or _FIRST_WITH_TMA) >= _FIRST_WITH_TMA
    return has_tma and aligned and step == 1 and stride >= d and max(n, d) < 2**31


def vector(x: Tensor | None) -> Tensor | None:
    """Numbers for each row, as the kernels read them."""
    return None if x is None else x.detach().float().contiguous()


def contiguous(tags: Tags) -> Tags:
    """The tags, copied where they don't lie side by side."""
    return Tags(*(None if tag is None else tag.contiguous() for tag in tags))


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the operands'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """The features, copied where they don't lie side by side along D."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
