"""Backend `cuda`: CUDA C++ kernels. The place and the interface exist; the kernels don't yet.

May import :mod:`fastcl.terms` only.
"""

from __future__ import annotations

from fastcl.terms import CrossEntropy, LossAndGradients, Needs, Operands, Plan, Products, Statistics

_REASON = "the CUDA C++ kernels are not part of this version of fastcl"


def unavailable() -> str | None:
    return _REASON


def supports(plan: Plan, operands: Operands) -> str | None:
    return _REASON


def statistics(plan: Plan, operands: Operands) -> Statistics:
    raise NotImplementedError(_REASON)


def gradient(
    plan: Plan,
    operands: Operands,
    statistics: Statistics,
    incoming: Statistics,
    needs_a: bool,
    needs_b: bool,
) -> Products:
    raise NotImplementedError(_REASON)


def cross_entropy(plan: Plan, operands: Operands, head: CrossEntropy, needs: Needs) -> LossAndGradients:
    raise NotImplementedError(_REASON)
