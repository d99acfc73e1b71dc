"""The ways to compute a plan, all behind one interface.

May import :mod:`fastcl.terms` only. Adding a backend means adding a module that satisfies :class:`Backend` and naming
it in ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

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

PanelKernel = Callable[[PanelOperands, Tensor | None, Tensor | None, PanelNeeds], PanelGradients]
"""A panel function compiled: its values for each row of S, and the gradients of these values times a constant.

The constant is the second argument, [outputs, N], or None where no gradient is wanted. The third is the values where an
earlier sweep has found them, or None.
"""


class Backend(Protocol):
    """What a module of this package provides."""

    PANEL_KERNELS: Mapping[str, PanelKernel]
    """Compiled equivalents of panel functions by name; `tiled` and `dense` stand for the functions themselves."""

    def unavailable(self) -> str | None:
        """Why this backend can't run in this process at all, or None where it can."""

    def refuses(self, plan: Plan) -> str | None:
        """Why no call of this plan can be computed, whatever its operands, or None."""

    def supports(self, plan: Plan, operands: Operands) -> str | None:
        """Why this backend can't compute this call, or None where it can."""

    def takes(self, a: Tensor) -> str | None:
        """Why nothing can be computed over features like these, or None; asked where there are ``PANEL_KERNELS``."""

    def statistics(self, plan: Plan, operands: Operands) -> Statistics:
        """All terms of the plan, from one sweep over S."""

    def gradient(
        self,
        plan: Plan,
        operands: Operands,
        statistics: Statistics,
        incoming: Statistics,
        needs_a: bool,
        needs_b: bool,
    ) -> Products:
        """The products of the gradient matrix W, recomputed tile by tile.

        ``incoming`` holds the loss's gradient with respect to each statistic, in the shapes of ``statistics``.
        """

    def cross_entropy(self, plan: Plan, operands: Operands, head: CrossEntropy, needs: Needs) -> LossAndGradients:
        """A softmax loss with its gradients: from one sweep where that is possible, else by ``softmax.two_sweeps``."""
