"""The kernel of panel functions in Triton's interpreter, against float64. Started by ``test_triton_interpreter.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastcl import tuning
from fastcl.backends import triton
from fastcl.terms import PanelNeeds
from tests import panel_kernels
from tests.panel_kernels import KERNELS
from tests.test_triton_interpreter import WIDE_TILES, interpreted

HAS = [name for name in KERNELS if name != "sigmoid" and KERNELS[name].function.kernel in triton.PANEL_KERNELS]
EACH_OPTION = pytest.mark.parametrize(("name", "option"), [(name, o) for name in HAS for o in KERNELS[name].options])
EACH = pytest.mark.parametrize(("name", "option"), [(name, KERNELS[name].options[-1]) for name in HAS])
WITH_GRADIENTS = [name for name in HAS if not KERNELS[name].values_only]


@pytest.fixture(autouse=True)
def _small_panels(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and panels in tiny shapes, and NaN wherever nothing was written."""
    monkeypatch.setattr("fastcl.backends.triton.partials._MOST", 1)
    with tuning.override(WIDE_TILES, workspace_bytes=4 * 32 * 64):
        yield


@interpreted
@EACH_OPTION
def test_agrees_with_float64(name: str, option: str) -> None:
    panel_kernels.check("triton", name, *panel_kernels.make(name, option, 75, 69, 20))


@interpreted
@EACH
@pytest.mark.parametrize(("n", "m", "depth"), [(1, 1, 1), (2, 33, 5), (33, 2, 17)])
def test_shapes(name: str, option: str, n: int, m: int, depth: int) -> None:
    panel_kernels.check("triton", name, *panel_kernels.make(name, option, n, m, depth))


@interpreted
@EACH
def test_float16(name: str, option: str) -> None:
    """With gradients that W could not hold as they are, nor times what a small distance makes of them."""
    x, incoming = panel_kernels.make(name, option, 40, 69, 20, torch.float16)
    x.b[5] = x.a[5] * 0.99
    panel_kernels.check("triton", name, x, incoming * 65536.0, of_products=300.0)


@interpreted
@EACH
@pytest.mark.parametrize("row0", [60, -3, 2**40])
def test_own_keys_of_a_shard(name: str, option: str, row0: int) -> None:
    panel_kernels.check("triton", name, *panel_kernels.make(name, option, 40, 69, 8, row0=row0))


@interpreted
@pytest.mark.parametrize("name", [name for name in HAS if name != "soft_targets"])
def test_equal_distances(name: str) -> None:
    """On a grid, so that they are equal in every arithmetic, and many are 0: the first of several is the hardest."""
    x, incoming = panel_kernels.make(name, "ids", 75, 69, 3)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-2, 3, part.shape, generator=generator) / 4 for part in (x.a, x.b))
    of_norms = 0 if name.startswith("energy") or name == "nearest" else -1
    for part, params in ((a, x.row_params), (b, x.column_params)):
        params[of_norms] = part.square().sum(dim=1)
    panel_kernels.check("triton", name, replace(x, a=a, b=b), incoming)


@interpreted
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_any_gradient_alone(name: str) -> None:
    x, incoming = panel_kernels.make(name, KERNELS[name].options[0], 17, 40, 5)
    needs = panel_kernels.needs_of(name, x)
    full = panel_kernels.run("triton", name, x, incoming, needs)
    for k in range(len(needs)):
        flags = PanelNeeds(*(need and i == k for i, need in enumerate(needs)))
        found = panel_kernels.run("triton", name, x, incoming if any(flags[:6]) else None, flags)
        for field, needed, got, all_of_it in zip(PanelNeeds._fields, flags, found, full, strict=True):
            assert (got is not None) == needed, field
            if needed:
                torch.testing.assert_close(got, all_of_it, rtol=1e-4, atol=1e-6)


@interpreted
@EACH
def test_strides(name: str, option: str) -> None:
    x, incoming = panel_kernels.make(name, option, 33, 40, 20)
    guide = [*(features.repeat_interleave(2, 1)[:, ::2] for features in x.guide[:2]), *x.guide[2:]]
    strided = replace(x, a=x.a.t().contiguous().t(), b=x.b.repeat_interleave(2, 1)[:, ::2], guide=guide)
    panel_kernels.check("triton", name, strided, incoming.repeat_interleave(2, 1)[:, ::2])


@interpreted
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_nan_propagates(name: str) -> None:
    x, incoming = panel_kernels.make(name, KERNELS[name].options[-1], 40, 50, 8)
    x.a[7, 3] = math.nan
    found = panel_kernels.run("triton", name, x, incoming, panel_kernels.needs_of(name, x))
    others = torch.arange(len(x.a)) != 7
    assert found.values[:, 7].isnan().any()
    if name != "energy_uniform":  # whose W knows nothing of S
        assert found.a[7].isnan().all()
        assert found.b.isnan().any()
    assert not found.values[:, others].isnan().any()
    assert not found.a[others].isnan().any()


@interpreted
def test_teacher_in_another_precision() -> None:
    x, incoming = panel_kernels.make("soft_targets", "ids", 40, 69, 20)
    for dtype in (torch.float64, torch.float16):
        guide = [*(features.to(dtype) for features in x.guide[:2]), *x.guide[2:]]
        panel_kernels.check("triton", "soft_targets", replace(x, guide=guide), incoming)
