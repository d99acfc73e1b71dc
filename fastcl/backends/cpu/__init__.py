"""The C++ CPU engine: a tile engine compiled for each instruction set, in ``csrc/``.

May import :mod:`fastcl.terms`, what backends share, and the extension ``fastcl._C``, which is loaded on first use
(``binding.py``). Everything here is the translation of a call into the operators of ``fastcl_cpu``;
``panel_functions.py`` has the panel functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.backends.cpu.binding import extension, packed, takes, unavailable, vector
from fastcl.backends.cpu.panel_functions import PANEL_KERNELS
from fastcl.backends.shift import fixed_shift, flag_threshold, lowest_exponent
from fastcl.backends.term_codes import term_codes
from fastcl.terms import (
    Axis,
    CrossEntropy,
    Gradients,
    LossAndGradients,
    Needs,
    Operands,
    Plan,
    Products,
    Reduce,
    Statistics,
    Tags,
)

__all__ = [
    "PANEL_KERNELS",
    "cross_entropy",
    "gradient",
    "level",
    "levels",
    "peak_flops",
    "refuses",
    "statistics",
    "supports",
    "takes",
    "unavailable",
]

_MAX_DENSE = 4


def level() -> str:
    """The instruction-set level in use: the best one, or the one that ``FASTCL_CPU_LEVEL`` names."""
    return extension().level()


def levels() -> list[str]:
    """The instruction-set levels that this machine supports, best last."""
    return extension().levels()


def peak_flops(dtype: torch.dtype) -> float:
    """The arithmetic peak that the engine is measured against: FLOP/s of the calling thread at the level in use.

    Measured now, in some 30 ms, by a loop of independent multiply-adds (two operations each) on registers alone: the
    bfloat16 dot product where ``dtype`` is bfloat16 and the level has one, else that of float32, to which the engine
    converts. Other Python threads run meanwhile: the peak of n threads is the sum of n calls at once.

    Raises:
        ValueError: ``dtype`` is not one of float32, bfloat16, float16.
    """
    return extension().peak_flops(str(dtype).removeprefix("torch."))


def refuses(plan: Plan) -> str | None:
    for terms in (plan.rows, plan.columns):
        for reduce, name in ((Reduce.LSE, "log-sum-exp"), (Reduce.SUM, "sum")):
            if sum(term.reduce is reduce and not term.mask.is_sparse for term in terms) > _MAX_DENSE:
                return f"more than {_MAX_DENSE} {name} terms along one axis, over more than a few pairs"
    return None


def supports(plan: Plan, operands: Operands) -> str | None:
    if (reason := takes(operands.a)) is not None:
        return reason
    if 0 in (*operands.shape, operands.a.shape[1]):
        return "an operand is empty"
    if plan.symmetric and (plan.columns or operands.b is not None or operands.row0 != operands.col0):
        return "a symmetric plan takes one operand, row terms only, and row0 == col0"
    return refuses(plan)


def statistics(plan: Plan, operands: Operands) -> Statistics:
    extension()
    return Statistics(*torch.ops.fastcl_cpu.statistics(*_arguments(plan, operands)))


def gradient(
    plan: Plan,
    operands: Operands,
    statistics: Statistics,
    incoming: Statistics,
    needs_a: bool,
    needs_b: bool,
) -> Products:
    extension()
    vectors = (v.detach().float().contiguous() for v in (*statistics, *incoming))
    a, b = torch.ops.fastcl_cpu.gradient(*_arguments(plan, operands), *vectors, needs_a, needs_b)
    return Products(a if needs_a else None, b if needs_b and not plan.symmetric else None)


def cross_entropy(plan: Plan, operands: Operands, head: CrossEntropy, needs: Needs) -> LossAndGradients:
    extension()
    loss, rows, columns, a, b, scale, positive = torch.ops.fastcl_cpu.cross_entropy(
        *_arguments(plan, operands),
        vector(head.positive),
        vector(head.weights),
        head.factor(plan, operands.shape[0]),
        head.normalize,
        *needs,
    )
    return LossAndGradients(
        loss,
        Statistics(rows, columns),
        Gradients(a if needs.a else None, b if needs.b else None, scale if needs.scale else None),
        positive if needs.positive else None,
    )


def _arguments(plan: Plan, operands: Operands) -> tuple:
    target = operands.target if plan.tests("target") else None
    scale = operands.scale.item()
    shift = float(fixed_shift(operands, scale))
    return (
        operands.a.detach(),
        None if operands.b is None else operands.b.detach(),
        scale,
        shift,
        flag_threshold(operands),
        lowest_exponent(operands, shift),
        None if target is None else target.to(torch.int64).contiguous(),
        [] if plan.names_pairs else _tags(plan, operands),
        operands.row0,
        operands.col0,
        term_codes(plan),
        plan.symmetric,
    )


def _tags(plan: Plan, operands: Operands) -> list[Tensor | None]:
    """What the plan's masks test about rows and columns."""
    sides = ((operands.row_tags, Axis.ROW), (operands.column_tags, Axis.COLUMN))[: 1 if operands.b is None else 2]
    both = (
        Tags(*(tag if tested else None for tag, tested in zip(tags, plan.tags_tested(axis), strict=True)))
        for tags, axis in sides
    )
    return packed(tuple(both), plan.label_width)
