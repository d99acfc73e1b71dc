"""How many kernels one loss launches, forward and backward, Triton's and torch's own; small batches take that long.

Started by ``test_triton_interpreter.py``. Counted is every kernel of Triton's and every torch operator whose result is
new or overwritten, in float32: views and allocations launch nothing.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from tests.test_triton_interpreter import INTERPRETED, interpreted

if INTERPRETED:
    from triton.runtime.interpreter import GridExecutor

PAIRS, DIM = 40, 16


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.operators: collections.Counter[str] = collections.Counter()
        self.in_kernel = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not self.in_kernel and function.namespace == "aten" and "empty" not in name:
            overwrites = name.endswith("_") or "out" in (kwargs or {})
            storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            results = result if isinstance(result, (tuple, list)) else (result,)
            views = all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in storages for x in results)
            if overwrites or not views:
                self.operators[name] += 1
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Counts what is launched within ``with launches``."""
    mode = Launches()
    launch = GridExecutor.__call__

    def count_launch(self, *args, **kwargs):
        mode.kernels[self.fn.__name__] += 1
        mode.in_kernel = True
        try:
            return launch(self, *args, **kwargs)
        finally:
            mode.in_kernel = False

    monkeypatch.setattr(GridExecutor, "__call__", count_launch)
    return mode


@interpreted
@pytest.mark.parametrize(
    ("call", "kernels", "operators"),
    [
        (lambda x, y: fastcl.nt_xent(x, y, 0.1, backend="triton"), 6, 8),
        (lambda x, y: fastcl.clip_loss(x, y, 10.0, backend="triton"), 5, 18),
        (lambda x, y: fastcl.info_nce(x, y, 0.1, backend="triton"), 8, 10),
        (lambda x, y: fastcl.info_nce(x, y.detach(), 0.1, backend="triton"), 7, 7),
        # What the operator itself does around its kernel is hidden from the count.
        (lambda x, y: fastcl.siglip_loss(x, y, 10.0, -10.0, backend="triton"), 1, 16),
    ],
    ids=["nt_xent", "clip_loss", "info_nce", "info_nce, keys frozen", "siglip_loss"],
)
def test_no_more_launches(
    call: Callable[[Tensor, Tensor], Tensor], kernels: int, operators: int, launches: Launches
) -> None:
    features = [torch.randn(PAIRS, DIM, requires_grad=True) for _ in range(2)]
    with launches:
        call(*features).backward()
    assert launches.kernels.total() <= kernels, dict(launches.kernels)
    assert launches.operators.total() <= operators, dict(launches.operators)


LABELS = torch.arange(PAIRS) % 5


@interpreted
@pytest.mark.parametrize(
    ("call", "sweeps"),
    [
        # Values, and W; the counts of active pairs must be known before the slope.
        (lambda x, y: fastcl.contrastive_loss(x, LABELS, backend="triton"), 2),
        (lambda x, y: fastcl.triplet_loss(x, LABELS, mining="hard", backend="triton"), 1),
        # Log-sum-exps of negatives, then the pairs with their W, then the W of the former.
        (lambda x, y: fastcl.lifted_structure_loss(x, LABELS, backend="triton"), 3),
        # A log-sum-exp for the importance, then the energy with its W.
        (lambda x, y: fastcl.alpha_cl_loss(x, y, 0.1, backend="triton"), 2),
        (lambda x, y: fastcl.clip_distillation_loss(x, y, 10.0, x, y, 10.0, backend="triton"), 4),
    ],
    ids=["contrastive_loss", "triplet_loss, hard", "lifted_structure_loss", "alpha_cl_loss", "clip_distillation_loss"],
)
def test_no_more_sweeps(call: Callable[[Tensor, Tensor], Tensor], sweeps: int, launches: Launches) -> None:
    features = [torch.randn(PAIRS, DIM, requires_grad=True) for _ in range(2)]
    with launches:
        call(*features).backward()
    assert launches.kernels == {"panel_function_kernel": sweeps}
