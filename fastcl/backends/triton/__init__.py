"""Fused Triton kernels for CUDA devices: a forward that sweeps S once, a backward over bounded panels of W.

A softmax loss along rows takes one sweep for both, over panels of whole rows.

May import :mod:`fastcl.terms`, :mod:`fastcl.tuning` and what backends share, ``softmax`` and ``shift``. Importing this
package does not import Triton; only a call does. Under ``TRITON_INTERPRET=1`` it also takes CPU tensors, to be tested
without a device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcl.terms import (
    CrossEntropy,
    LossAndGradients,
    Needs,
    Operands,
    PanelGradients,
    PanelNeeds,
    PanelOperands,
    Plan,
    Products,
    Statistics,
)

if TYPE_CHECKING:
    from fastcl.backends.triton import launch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    if not _is_installed():
        return "triton is not installed"
    if not torch.cuda.is_available() and not _is_interpreted():
        return "there is no CUDA device"
    return None


def refuses(plan: Plan) -> str | None:
    if plan.symmetric and plan.columns:
        return "a symmetric plan's columns are its rows; write the term along rows"
    return None


def takes(a: Tensor) -> str | None:
    if (reason := unavailable()) is not None:
        return reason
    if not (a.is_cuda or (_is_interpreted() and a.device.type == "cpu")):
        return f"the tensors are on {a.device.type}, not on a CUDA device"
    if a.dtype not in _DTYPES:
        return f"{a.dtype} is not one of float32, bfloat16, float16"
    return None


def supports(plan: Plan, operands: Operands) -> str | None:
    if (reason := takes(operands.a)) is not None:
        return reason
    if plan.symmetric and operands.row0 != operands.col0:
        return f"a symmetric plan needs row0 == col0, got {operands.row0} and {operands.col0}"
    if 0 in (*operands.shape, operands.a.shape[1]):
        return "an operand is empty"
    return refuses(plan)


def statistics(plan: Plan, operands: Operands) -> Statistics:
    from fastcl.backends.triton import forward, launch

    return forward.statistics(plan, launch.inputs(operands))


def gradient(
    plan: Plan,
    operands: Operands,
    statistics: Statistics,
    incoming: Statistics,
    needs_a: bool,
    needs_b: bool,
) -> Products:
    from fastcl.backends.triton import backward, launch

    return backward.gradient(plan, launch.inputs(operands), statistics, incoming, needs_a, needs_b)


def cross_entropy(plan: Plan, operands: Operands, head: CrossEntropy, needs: Needs) -> LossAndGradients:
    from fastcl.backends.triton import launch, unit

    if not head.normalize:
        return _cross_entropy(plan, operands, launch.inputs(operands), head, needs)
    unit_length, shift = unit.unit_operands(operands)
    x = launch.inputs(unit_length, shift)
    found = _cross_entropy(plan, unit_length, x, replace(head, normalize=False), needs)
    return found._replace(gradients=unit.through_unit_length(operands, found.gradients))


def _sigmoid(x: PanelOperands, incoming: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    from fastcl.backends.triton import sigmoid

    return sigmoid.value_and_gradients(x, incoming, needs)


PANEL_KERNELS = {"sigmoid": _sigmoid}


def _cross_entropy(
    plan: Plan, operands: Operands, x: launch.Inputs, head: CrossEntropy, needs: Needs
) -> LossAndGradients:
    from fastcl.backends.triton import loss, panels

    height = panels.panel_rows(plan, x, head) if needs.product_a or needs.b else 0
    if height > 0:
        return panels.cross_entropy(plan, operands, x, head, needs, height)
    return loss.two_sweeps(plan, operands, x, head, needs)


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
