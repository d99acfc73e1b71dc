"""Fused Triton kernels for CUDA devices: a forward that sweeps S once, a backward over bounded panels of W.

A softmax loss along rows takes one sweep for both, over panels of whole rows. A symmetric plan's backward over short
rows may keep its sums in registers.

May import :mod:`fastcl.terms`, :mod:`fastcl.tuning` and what backends share, ``panels``, ``shift`` and ``softmax``.
Importing this package does not import Triton; only a call does. Under ``TRITON_INTERPRET=1`` it also takes CPU tensors,
to be tested without a device.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from fastcl.backends.softmax import narrowed, scale_gradient
from fastcl.terms import (
    CrossEntropy,
    Gradients,
    LossAndGradients,
    Needs,
    Operands,
    PanelGradients,
    PanelNeeds,
    PanelOperands,
    Plan,
    Products,
    Statistics,
    waiting_dtype,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = 8, 0
"""the first compute capability with bfloat16 and tf32"""


def unavailable() -> str | None:
    if not _is_installed():
        return "triton is not installed"
    if not torch.cuda.is_available() and not _is_interpreted():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "its tables are for NVIDIA's devices"
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
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < _OLDEST:
        return f"it needs compute capability {_OLDEST[0]}.{_OLDEST[1]} or higher"
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
    from fastcl.backends.triton import launch, loss, panels, unit

    given, shift, scale = operands, None, operands.scale
    if head.normalize:
        operands, shift = unit.unit_operands(given)
    x = launch.inputs(operands, shift)

    def finish(features: Tensor, product: Tensor, gradient: Tensor) -> None:
        if head.normalize:
            unit.through_unit_length(features, product, scale, gradient)
        else:
            torch.mul(product, scale, out=gradient)

    dtype = waiting_dtype(given.a.dtype, given.a.device)
    a = b = slope = keep_rows = None
    if needs.a and needs.b:
        a = torch.empty(given.a.shape, dtype=dtype, device=given.a.device)

        def keep_rows(rows: slice, product: Tensor) -> None:
            finish(given.a[rows], product, a[rows])

    height = panels.panel_rows(plan, x, head) if needs.product_a or needs.b else 0
    if height > 0:
        found = panels.cross_entropy(plan, x, head, needs, keep_rows, height)
    else:
        found = loss.two_sweeps(plan, x, head, needs, keep_rows)
    if needs.scale:
        slope = scale_gradient(plan, operands, found.products)
    # copies of unit length are as large as gradients
    del operands, x
    if needs.a and a is None:
        a = narrowed(found.products.a, dtype)
        finish(given.a, found.products.a, a)
    if needs.b:
        b = narrowed(found.products.b, dtype)
        finish(given.keys, found.products.b, b)
    return LossAndGradients(found.losses.sum(), found.statistics, Gradients(a, b, slope), found.positive)


def _sigmoid(x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    from fastcl.backends.triton import sigmoid

    return sigmoid.value_and_gradients(x, incoming, needs)


def _panel_function(
    name: str, x: PanelOperands, incoming: Tensor | None, values: Tensor | None, needs: PanelNeeds
) -> PanelGradients:
    from fastcl.backends.triton import panel_functions

    return panel_functions.value_and_gradients(name, x, incoming, values, needs)


_PANEL_FUNCTIONS = (
    *("contrastive", "negatives", "lifted", "hardest", "similarities", "nearest"),
    *("energy_softmax", "energy_uniform", "energy_power", "soft_targets", "squares"),
)
PANEL_KERNELS = {"sigmoid": _sigmoid} | {name: functools.partial(_panel_function, name) for name in _PANEL_FUNCTIONS}


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
