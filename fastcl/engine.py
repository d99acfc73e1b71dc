"""Selects a backend and runs a plan on it: raw statistics and raw gradients, below autograd.

May import :mod:`fastcl.terms` and :mod:`fastcl.backends`.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

from fastcl.backends import Backend, cpu, cuda, dense, softmax, tiled, triton
from fastcl.terms import CrossEntropy, Gradients, LossAndGradients, Needs, Operands, Plan, Products, Statistics

logger = logging.getLogger("fastcl")

BACKENDS: dict[str, Backend] = {"cuda": cuda, "triton": triton, "cpu": cpu, "tiled": tiled, "dense": dense}
"""Every backend by name."""

_AUTOMATIC = {"cpu": ("cpu", "tiled")}
# "cuda" only where it is asked for: it was not run on a GPU yet
_AUTOMATIC_ELSEWHERE = ("triton", "tiled")
_ENGINE_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}


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
    insisted = name or os.environ.get("FASTCL_BACKEND")
    if not insisted:
        candidates = _AUTOMATIC.get(operands.a.device.type, _AUTOMATIC_ELSEWHERE)
        chosen = next(n for n in candidates if BACKENDS[n].supports(plan, operands) is None)
        _warn_if_slow(chosen, operands.a.device.type)
    else:
        if insisted not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {insisted!r}")
        reason = BACKENDS[insisted].supports(plan, operands)
        if reason is not None:
            raise ValueError(f"backend {insisted!r} can't compute this call: {reason}")
        chosen = insisted
    if logger.isEnabledFor(logging.INFO):
        _log_choice(chosen, operands.a.device.type, str(operands.a.dtype), plan.encode())
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
def _log_choice(chosen: str, device: str, dtype: str, plan: str) -> None:
    logger.info("backend %s for %s %s tensors, plan: %s", chosen, device, dtype, plan)


@functools.cache
def _warn_if_slow(chosen: str, device: str) -> None:
    engine = _ENGINE_OF_DEVICE.get(device)
    reason = BACKENDS[engine].unavailable() if chosen == "tiled" and engine else None
    if reason is not None:
        warnings.warn(
            f"fastcl runs on its plain PyTorch backend, which is slower, because the {engine!r} backend is "
            f"unavailable: {reason}. `python -m fastcl` says more.",
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
            f"{ranks} ranks of the process group. Pass group=torch.distributed.group.WORLD to share them.",
            RuntimeWarning,
            stacklevel=2,
        )
