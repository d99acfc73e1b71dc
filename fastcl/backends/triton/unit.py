"""Normalisation on the host, one launch for each operand and direction."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from fastcl.backends.shift import ROUNDING, headroom
from fastcl.backends.triton.kernels.unit import through_unit_kernel, unit_kernel
from fastcl.backends.triton.launch import on_device
from fastcl.terms import Operands

_BLOCKS = {"BLOCK_ROWS": 8, "BLOCK_D": 128}


def unit_operands(operands: Operands) -> tuple[Operands, Tensor]:
    """The operands with rows of unit length, in their dtype, and the fixed shift for them from the same launch."""
    shift = operands.scale.new_empty(())
    with on_device(operands.a):
        b = None if operands.b is None else _unit(operands.b, operands, None)
        return replace(operands, a=_unit(operands.a, operands, shift), b=b, norm_bound=1.0), shift


def through_unit_length(x: Tensor, product: Tensor, scale: Tensor, gradient: Tensor) -> None:
    """The gradient with respect to ``x`` from ``scale * product``, which is that with respect to its unit rows.

    ``gradient``, which is written, may be ``product``.
    """
    with on_device(x):
        through_unit_kernel[_grid(x)](x, product, gradient, scale, *x.shape, *x.stride(), **_BLOCKS)


def _unit(x: Tensor, operands: Operands, shift: Tensor | None) -> Tensor:
    unit = torch.empty_like(x, memory_format=torch.contiguous_format)
    unit_kernel[_grid(x)](
        x, unit, operands.scale, shift, *x.shape, *x.stride(), ROUNDING, headroom(operands), **_BLOCKS
    )
    return unit


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.shape[0], _BLOCKS["BLOCK_ROWS"]),)
