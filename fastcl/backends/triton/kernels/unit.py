"""Rows scaled to unit length, and a gradient with respect to those turned into one with respect to the rows as given.

Each program owns a block of rows and looks at it twice: once for the norms, once to write. unit_kernel alone writes
``unit``, through_unit_kernel alone ``gradient``.
"""

import triton
import triton.language as tl

_SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit
def _load(at, rows, n, k, d):
    return tl.load(at, mask=(rows < n)[:, None] & (k < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def unit_kernel(
    x_ptr,
    unit_ptr,
    scale_ptr,
    shift_ptr,
    n,
    d,
    stride_x,
    stride_x_d,
    bound,
    headroom,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (blocks of rows,). ``unit`` is contiguous. Where asked, one program also writes the fixed shift."""
    if shift_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(shift_ptr, tl.abs(tl.load(scale_ptr)) * bound - headroom)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = rows.to(tl.int64)[:, None]
    squares = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        k = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = _load(x_ptr + row * stride_x + k[None, :] * stride_x_d, rows, n, k, d)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, axis=1))
    norm = tl.maximum(norm, _SMALLEST_NORM, propagate_nan=tl.PropagateNan.ALL)[:, None]
    for start in range(0, d, BLOCK_D):
        k = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = _load(x_ptr + row * stride_x + k[None, :] * stride_x_d, rows, n, k, d)
        there = (rows < n)[:, None] & (k < d)[None, :]
        tl.store(unit_ptr + row * d + k[None, :], (x / norm).to(unit_ptr.dtype.element_ty), mask=there)


@triton.jit
def through_unit_kernel(
    x_ptr,
    product_ptr,
    gradient_ptr,
    scale_ptr,
    n,
    d,
    stride_x,
    stride_x_d,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (blocks of rows,). ``product`` and ``gradient`` are contiguous, and may be one.

    The product's part along x is taken out, but for the shortest rows.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = rows.to(tl.int64)[:, None]
    squares = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        k = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = _load(x_ptr + row * stride_x + k[None, :] * stride_x_d, rows, n, k, d)
        squares += x * x
        along += x * _load(product_ptr + row * d + k[None, :], rows, n, k, d)
    norm = tl.sqrt(tl.sum(squares, axis=1))
    clamped = tl.maximum(norm, _SMALLEST_NORM, propagate_nan=tl.PropagateNan.ALL)
    radial = tl.where(norm < _SMALLEST_NORM, 0.0, tl.sum(along, axis=1) / clamped)[:, None]
    clamped = clamped[:, None]
    scale = tl.load(scale_ptr)
    for start in range(0, d, BLOCK_D):
        k = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = _load(x_ptr + row * stride_x + k[None, :] * stride_x_d, rows, n, k, d)
        product = _load(product_ptr + row * d + k[None, :], rows, n, k, d)
        gradient = scale * (product - radial * (x / clamped)) / clamped
        there = (rows < n)[:, None] & (k < d)[None, :]
        tl.store(gradient_ptr + row * d + k[None, :], gradient.to(gradient_ptr.dtype.element_ty), mask=there)
