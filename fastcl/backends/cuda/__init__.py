"""Backend `cuda`: CUDA C++ kernels for compute capability 8.0 and later, in ``csrc/cuda``.

Compiled and checked, not run on a GPU yet, so that no call takes it that doesn't ask for it. It is there where
``setup.py`` built the extension ``fastcl._cuda``, which is loaded on first use (``binding.py``).

May import :mod:`fastcl.terms`, :mod:`fastcl.tuning` and what backends share. The forward's kernels are one call; the
backward's kernel writes panels of W, which library products multiply. ``panel_functions.py`` has the panel functions.

On compute capability 9.0 bfloat16 and float16 take kernels of their own, where those were built; float32 does not. The
environment variable ``FASTCL_CUDA_KERNELS`` forces one path for them, to compare the two: ``portable``, or ``hopper``.
With ``registers`` a backward in bfloat16 or float16 has its sums in registers in place of panels of W wherever it can;
without the variable it does where a table of :mod:`fastcl.tuning` says so.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl import tuning
from fastcl.backends import panels
from fastcl.backends.cuda.binding import aligned, capability, extension, run, takes, unavailable
from fastcl.backends.cuda.panel_functions import PANEL_KERNELS
from fastcl.backends.shift import fixed_shift, flag_threshold
from fastcl.backends.softmax import two_sweeps
from fastcl.backends.term_codes import term_codes
from fastcl.terms import (
    Axis,
    CrossEntropy,
    LossAndGradients,
    Needs,
    Operands,
    Plan,
    Products,
    Statistics,
    Tags,
    wants_tf32,
)

__all__ = [
    "PANEL_KERNELS",
    "cross_entropy",
    "gradient",
    "refuses",
    "statistics",
    "supports",
    "takes",
    "unavailable",
]

_HOPPER = (9, 0)
_HALF = (torch.bfloat16, torch.float16)
_PATHS = ("portable", "hopper", "registers")


def refuses(plan: Plan) -> str | None:
    return None


def supports(plan: Plan, operands: Operands) -> str | None:
    a = operands.a
    if (reason := takes(a)) is not None:
        return reason
    if 0 in operands.shape:
        return "an operand is empty"
    if max(operands.shape) > extension().MOST_ROWS:
        return f"an operand has more than {extension().MOST_ROWS} rows"
    if plan.symmetric and (plan.columns or operands.b is not None or operands.row0 != operands.col0):
        return "a symmetric plan takes one operand, row terms only, and row0 == col0"
    if max(len(plan.rows), len(plan.columns)) > extension().MOST_TERMS:
        return f"more than {extension().MOST_TERMS} terms along one axis"
    return refuses(plan)


def statistics(plan: Plan, operands: Operands) -> Statistics:
    x = _inputs(plan, operands)
    return Statistics(*run("statistics", x.a.device, *x.arguments(plan)))


def gradient(
    plan: Plan,
    operands: Operands,
    statistics: Statistics,
    incoming: Statistics,
    needs_a: bool,
    needs_b: bool,
) -> Products:
    x = _inputs(plan, operands)
    vectors = [v.detach().float().contiguous() for v in (*statistics, *incoming)]
    multiplier = panels.multiplier(plan, incoming, x.a.dtype)
    if _takes_registers(plan, x.a):

        def product(transposed: bool) -> Tensor:
            return run("gradient", x.a.device, *x.without_tags(plan), *vectors, multiplier, transposed)

        return Products(product(False) if needs_a else None, product(True) if needs_b and not plan.symmetric else None)
    arguments = (*x.arguments(plan), *vectors, multiplier)
    return panels.products(
        plan,
        x.a,
        x.b,
        needs_a,
        needs_b,
        (extension().TILE, extension().TILE),
        tuning.workspace_bytes(capability(x.a)),
        lambda panel, out: run("weights", x.a.device, *arguments, *panel, out),
        multiplier,
    )


def cross_entropy(plan: Plan, operands: Operands, head: CrossEntropy, needs: Needs) -> LossAndGradients:
    return two_sweeps(statistics, gradient, plan, operands, head, needs)


class _Inputs(NamedTuple):
    """The operands as the kernels want them; the scale and the shift stay on the device, and nothing waits for them."""

    a: Tensor
    b: Tensor
    scale: Tensor
    shift: Tensor
    target: Tensor | None
    row_tags: Tags
    column_tags: Tags
    label_width: int
    self_offset: int
    flag_below: float

    def arguments(self, plan: Plan) -> tuple[Any, ...]:
        vectors = (self.a, self.b, self.scale, self.shift, self.target)
        numbers = (self.label_width, self.self_offset, self.flag_below)
        how = (plan.symmetric, not wants_tf32(), _takes_hopper(self.a))
        return (*vectors, *self.row_tags, *self.column_tags, *numbers, term_codes(plan), *how)

    def without_tags(self, plan: Plan) -> tuple[Any, ...]:
        """What the kernels with sums in registers take."""
        vectors = (self.a, self.b, self.scale, self.shift, self.target)
        return (*vectors, self.self_offset, self.flag_below, term_codes(plan), plan.symmetric)


def _inputs(plan: Plan, operands: Operands) -> _Inputs:
    n, m = operands.shape
    a = aligned(operands.a.detach())
    scale = operands.scale.detach().float()
    target = operands.target if plan.tests("target") else None
    row_tags = _tags(plan, operands.row_tags, Axis.ROW)
    return _Inputs(
        a=a,
        b=a if operands.b is None else aligned(operands.b.detach()),
        scale=scale,
        # a negative shift would only cost accuracy: nothing underflows without one
        shift=fixed_shift(operands, scale).clamp_min(0.0),
        target=None if target is None else _local_columns(target - operands.col0, m),
        row_tags=row_tags,
        column_tags=row_tags if operands.b is None else _tags(plan, operands.column_tags, Axis.COLUMN),
        label_width=plan.label_width,
        # beyond [-n, m] no pair of this S is a self pair, and so it stays when clamped
        self_offset=max(-n, min(operands.row0 - operands.col0, m)),
        flag_below=flag_threshold(operands),
    )


def _takes_hopper(a: Tensor) -> bool:
    """Whether a call takes the kernels for compute capability 9.0 in place of the portable ones."""
    path = _forced_path()
    if path == "portable" or a.dtype not in _HALF:
        return False
    reason = _refuses_hopper(a)
    if path == "hopper" and reason is not None:
        raise ValueError(f"FASTCL_CUDA_KERNELS=hopper, but {reason}")
    return reason is None and (a.is_cuda or path == "hopper")


def _takes_registers(plan: Plan, a: Tensor) -> bool:
    """Whether a backward has its sums in registers in place of panels of W."""
    path = _forced_path()
    depth = a.shape[1]
    if a.dtype not in _HALF or not plan.names_pairs or depth > extension().MOST_OWN_DEPTH:
        return False
    return path == "registers" if path is not None else tuning.cuda_registers("half", capability(a), depth)


def _forced_path() -> str | None:
    path = os.environ.get("FASTCL_CUDA_KERNELS")
    if path not in (None, *_PATHS):
        raise ValueError(f"FASTCL_CUDA_KERNELS must be one of {', '.join(_PATHS)}, got {path!r}")
    return path


def _refuses_hopper(a: Tensor) -> str | None:
    if not extension().HAS_HOPPER:
        return "the extension was not built for compute capability 9.0"
    if a.is_cuda and torch.cuda.get_device_capability(a.device) != _HOPPER:
        return f"{torch.cuda.get_device_name(a.device)} does not have compute capability 9.0"
    return None


def _local_columns(target: Tensor, m: int) -> Tensor:
    """Targets as 32-bit columns of this S, -1 for those outside."""
    return torch.where((target >= 0) & (target < m), target, -1).to(torch.int32)


def _tags(plan: Plan, tags: Tags, axis: Axis) -> Tags:
    """What the plan's masks test about rows or columns, as the kernels read it."""
    labels, ids, threshold = (
        tag.contiguous() if tested else None for tag, tested in zip(tags, plan.tags_tested(axis), strict=True)
    )
    return Tags(labels, ids, None if threshold is None else threshold.detach().float())
