"""Selects a backend and runs a plan on it: raw statistics and raw gradients, below autograd.

May import :mod:`fastcl.terms`, :mod:`fastcl.tuning` and :mod:`fastcl.backends`.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastcl import tuning
from fastcl.backends import Backend, PanelKernel, cpu, cuda, dense, softmax, tiled, triton
from fastcl.terms import (
    CrossEntropy,
    Gradients,
    LossAndGradients,
    Needs,
    Operands,
    PanelOperands,
    Plan,
    Products,
    Statistics,
    wants_tf32,
)

logger = logging.getLogger("fastcl")

BACKENDS: dict[str, Backend] = {"cuda": cuda, "triton": triton, "cpu": cpu, "tiled": tiled, "dense": dense}
"""Every backend by name."""

_AUTOMATIC = {"cpu": ("cpu", "tiled")}
# "cuda" only where it is asked for, or where the device's table says that it was measured to be the faster one
_AUTOMATIC_ELSEWHERE = ("triton", "tiled")
_ENGINE_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}
_RUN_PANELS = ("tiled", "dense")


def list_backends() -> dict[str, str | None]:
    """Each backend's name with None where it can run in this process, else the reason why not.

    >>> import fastcl
    >>> fastcl.list_backends()["tiled"] is None
    True
    """
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def select(plan: Plan, operands: Operands, name: str | None = None) -> str:
    """The backend that computes this call.

    ``name`` insists on one, and so does the environment variable ``FASTCL_BACKEND``; otherwise the fastest backend that
    supports the call is taken, which is never `dense`.

    Raises:
        ValueError: the backend that was asked for doesn't exist or can't compute the call; the message says why.
    """
    return _select(
        lambda candidate: BACKENDS[candidate].supports(plan, operands),
        operands.a,
        name,
        lambda: f"plan: {plan.encode()}",
        _measured(plan, operands, torch.cuda.get_device_capability(operands.a.device)) if operands.a.is_cuda else None,
    )


def kind(plan: Plan) -> str | None:
    """What tables of measured backends call a plan; None if its masks test tags, as nothing was measured with these."""
    if not plan.names_pairs:
        return None
    return "symmetric" if plan.symmetric else "both" if plan.columns else "rows"


def _measured(plan: Plan, operands: Operands, capability: tuple[int, int]) -> str | None:
    """The backend that this device's table names for calls like this one, or None."""
    if (kind_of_plan := kind(plan)) is None:
        return None
    precision = tuning.precision_class(operands.a.dtype, "tf32" if wants_tf32() else "ieee")
    n, m = operands.shape
    return tuning.fastest_backend(kind_of_plan, precision, capability, n=n, m=m, d=operands.a.shape[1])


def select_panels(
    kernel: str | None, operands: PanelOperands, name: str | None = None
) -> tuple[str, PanelKernel | None]:
    """The backend that computes a panel function, chosen as by :func:`select`, and its kernel of the name ``kernel``.

    `tiled` and `dense` have none: they run the function itself, over panels of S and over all of it at once.
    """

    def reason(candidate: str) -> str | None:
        refused = refuses_panels(candidate, kernel)
        if refused is None and candidate not in _RUN_PANELS:
            refused = BACKENDS[candidate].takes(operands.a)
        return refused

    chosen = _select(reason, operands.a, name, lambda: f"panel function: {kernel or 'without a kernel'}")
    return chosen, None if chosen in _RUN_PANELS else BACKENDS[chosen].PANEL_KERNELS[kernel]


def refuses_panels(backend: str, kernel: str | None) -> str | None:
    """Why a backend can't compute a panel function, whatever its operands, or None."""
    if backend in _RUN_PANELS or kernel in BACKENDS[backend].PANEL_KERNELS:
        return None
    return (
        "it has no kernel for this function of whole rows of S, which plain PyTorch computes over panels: backend "
        "'tiled', or 'dense'"
    )


def _select(
    reason: Callable[[str], str | None],
    a: Tensor,
    name: str | None,
    what: Callable[[], str],
    preferred: str | None = None,
) -> str:
    insisted = name or os.environ.get("FASTCL_BACKEND")
    if not insisted:
        automatic = _AUTOMATIC.get(a.device.type, _AUTOMATIC_ELSEWHERE)
        candidates = automatic if preferred is None else (preferred, *automatic)
        chosen = next(candidate for candidate in candidates if reason(candidate) is None)
        engine = _ENGINE_OF_DEVICE.get(a.device.type)
        if chosen == "tiled" and engine and reason(engine) == BACKENDS[engine].unavailable():
            _warn_of_missing(engine)
    else:
        if insisted not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {insisted!r}")
        refused = reason(insisted)
        if refused is not None:
            raise ValueError(f"backend {insisted!r} can't compute this call: {refused}")
        chosen = insisted
    if logger.isEnabledFor(logging.INFO):
        _log_choice(chosen, a.device.type, str(a.dtype), what())
    return chosen


def statistics(plan: Plan, operands: Operands, backend: str | None = None) -> Statistics:
    """All terms of ``plan`` from one sweep over S."""
    with plain_arithmetic(operands.a.device):
        return BACKENDS[select(plan, operands, backend)].statistics(plan, operands)


def gradient(
    plan: Plan,
    operands: Operands,
    statistics: Statistics,
    incoming: Statistics,
    needs: Needs,
    backend: str | None = None,
) -> Gradients:
    """The gradients, in the dtypes of the operands, of the loss whose gradients to the statistics are ``incoming``.

    The scale's gradient falls out of either product, so it costs a product only where neither was asked for.
    """
    return finish(plan, operands, products(plan, operands, statistics, incoming, needs, backend), needs)


def products(
    plan: Plan,
    operands: Operands,
    statistics: Statistics,
    incoming: Statistics,
    needs: Needs,
    backend: str | None = None,
) -> Products:
    """The gradient's products in the accumulation dtype; those of disjoint tiles add up to those of their union."""
    with plain_arithmetic(operands.a.device):
        return BACKENDS[select(plan, operands, backend)].gradient(
            plan, operands, statistics, incoming, needs.product_a, needs.b
        )


def finish(plan: Plan, operands: Operands, products: Products, needs: Needs) -> Gradients:
    """The gradients that complete products stand for, in the dtypes of the operands; overwrites the products."""
    with plain_arithmetic(operands.a.device):
        return softmax.finish(plan, operands, products, needs, operands.a.dtype)


def cross_entropy(
    plan: Plan, operands: Operands, head: CrossEntropy, needs: Needs, backend: str | None = None
) -> LossAndGradients:
    """A softmax loss and the gradients that are needed, in as few sweeps as the backend can."""
    warn_if_ranks_are_apart()
    with plain_arithmetic(operands.a.device):
        return BACKENDS[select(plan, operands, backend)].cross_entropy(plan, operands, head, needs)


def plain_arithmetic(device: torch.device) -> AbstractContextManager:
    """Without autocast: an operator runs inside the caller's region, which would lower its float32 products."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@functools.cache
def _log_choice(chosen: str, device: str, dtype: str, what: str) -> None:
    logger.info("backend %s for %s %s tensors, %s", chosen, device, dtype, what)


@functools.cache
def _warn_of_missing(engine: str) -> None:
    warnings.warn(
        f"fastcl runs on its plain PyTorch backend, which is slower, because the {engine!r} backend is unavailable: "
        f"{BACKENDS[engine].unavailable()}. `python -m fastcl` says more.",
        RuntimeWarning,
        stacklevel=2,
    )


def warn_if_ranks_are_apart() -> None:
    """Say, once, that a call without a process group shares nothing between the ranks that there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _warn_of_ranks(torch.distributed.get_world_size())


@functools.cache
def _warn_of_ranks(ranks: int) -> None:
    if ranks > 1:
        warnings.warn(
            f"fastcl computes each rank's loss over that rank's own batch: negatives are not shared between the "
            f"{ranks} ranks of the process group. Pass group=torch.distributed.group.WORLD to share them, unless each "
            f"rank has all of them already, as with a whole queue or bank.",
            RuntimeWarning,
            stacklevel=2,
        )
