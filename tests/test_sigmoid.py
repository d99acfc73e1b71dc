"""The kernels that stand for the panel function of losses/sigmoid.py, on every backend, against float64.

The judge is the panel function in plain PyTorch, which the losses' textbook formulas judge in test_correctness.py.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import engine, panels
from fastcl.backends import cpu
from fastcl.losses.sigmoid import sigmoid_rows
from fastcl.terms import NO_GRADIENTS, PanelGradients, PanelNeeds, PanelOperands, Tags
from tests import panel_kernels
from tests.cases import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EVERYTHING = PanelNeeds(True, True, True, True, False, True)
OPTIONS = ("plain", "offsets", "labels", "ids", "everything")
EACH_OPTION = pytest.mark.parametrize("option", OPTIONS)
ON_CPU = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
LEVELS = cpu.levels() if cpu.unavailable() is None else []


def make(option: str, *shape: object, **options: object) -> tuple[PanelOperands, Tensor]:
    return panel_kernels.make("sigmoid", option, *shape, **options)


def run(backend: str, x: PanelOperands, incoming: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    return panel_kernels.run(backend, "sigmoid", x, incoming, needs)


def check(backend: str, x: PanelOperands, incoming: Tensor, **tolerances: float) -> None:
    panel_kernels.check(backend, "sigmoid", x, incoming, **tolerances)


def judge(x: PanelOperands, incoming: Tensor) -> PanelGradients:
    return panel_kernels.judge("sigmoid", x, incoming)


@ON_CPU
@EACH_OPTION
@pytest.mark.parametrize(("scale", "bias"), [(100.0, -10.0), (-100.0, 10.0), (0.0, -1.0)])
def test_large_logits(option: str, scale: float, bias: float) -> None:
    check("cpu", *make(option, 403, 301, 24, scale=scale, bias=bias), tolerance=1e-5)


@ON_CPU
@pytest.mark.parametrize("option", ["offsets", "everything"])
def test_any_combination_of_gradients(option: str) -> None:
    x, incoming = make(option, 200, 110, 9)
    full = run("cpu", x, incoming, EVERYTHING)
    for flags in itertools.product(*((False, True) if wanted else (False,) for wanted in EVERYTHING)):
        found = run("cpu", x, incoming, PanelNeeds(*flags))
        for name, needed, got, all_of_it in zip(PanelNeeds._fields, flags, found, full, strict=True):
            assert (got is not None) == needed, name
            if needed:
                torch.testing.assert_close(got, all_of_it, rtol=1e-4, atol=1e-6)


@ON_CPU
@pytest.mark.parametrize("level", LEVELS)
def test_error_of_the_softplus(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a single pair costs the softplus itself: 3 ulp of the logarithm and 2 of the exponential.

    The exponent is |x| log2(e), rounded; below -126 it is cut off.
    """
    monkeypatch.setenv("FASTCL_CPU_LEVEL", level)
    logits = torch.cat((torch.linspace(-86.0, 86.0, 4093), torch.linspace(-1.0, 1.0, 2001)))
    one, zero = torch.ones(()), torch.zeros(())
    x = PanelOperands(logits[:, None], torch.ones(1, 1), one, zero, None, None, torch.tensor(10**6), Tags(), Tags())
    found = run("cpu", x, None, NO_GRADIENTS).values[0].double()
    exact = torch.nn.functional.softplus(logits.double(), threshold=800)
    ulp = 2.0**-23
    assert ((found - exact).abs() / exact <= (5 + logits.abs().double().clamp(max=87) * 1.5) * ulp).all()
    near = logits.abs() < 1
    assert ((found - exact).abs() / exact)[near].max() <= 4 * ulp


@ON_CPU
@EACH_OPTION
def test_nan_propagates(option: str) -> None:
    x, incoming = make(option, 40, 50, 8)
    x.a[7, 3] = math.nan
    x.b[11, 2] = math.nan
    want, got = judge(x, incoming), run("cpu", x, incoming, EVERYTHING)
    assert torch.equal(got.values.isnan(), want.values.isnan())
    assert torch.equal(got.a.isnan(), want.a.isnan())
    assert torch.equal(got.b.isnan(), want.b.isnan())


@ON_CPU
@pytest.mark.parametrize("offset", [-math.inf, math.inf])
def test_infinite_offsets(offset: float) -> None:
    """A noise that never draws a key, or draws nothing else: no NaN, and what is finite stays right."""
    x, incoming = make("offsets", 40, 50, 8)
    x.column_params[0, 45] = offset
    want, got = judge(x, incoming), run("cpu", x, incoming, EVERYTHING)
    assert not got.values.isnan().any()
    assert relative_error(got.a, want.a) <= 1e-5
    if offset > 0:
        assert relative_error(got.values, want.values) <= 1e-5


def test_both_operands_may_be_one() -> None:
    z = torch.nn.functional.normalize(torch.randn(60, 9), dim=1)
    x = PanelOperands(z, None, torch.tensor(5.0), torch.tensor(-1.0), None, None, None, Tags(), Tags())
    needs = [True, False, True, True, False, False]
    for weights in (None, torch.rand(60)):
        found = [panels.sweep(sigmoid_rows, x, weights, None, needs, name) for name in (None, "tiled")]
        (value, gradients), (other, others) = found
        torch.testing.assert_close(value, other)
        for one, two in zip(gradients, others, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_no_rows_need_no_kernel() -> None:
    x = make("plain", 5, 3, 4)[0]
    x = replace(x, a=x.a[:0])
    for backend in (None, "tiled", "dense", *(["cpu"] if cpu.unavailable() is None else [])):
        assert panels.values(sigmoid_rows, x, backend).shape == (1, 0)
        _, gradients = panels.sweep(sigmoid_rows, x, None, None, [True] * 4 + [False] * 2, backend)
        assert (gradients[1] == 0).all()


PAIRS_OF_RANKS = (30, 0, 45)


def leaves(pairs: int) -> list[Tensor]:
    x, y = make("plain", pairs, pairs, 6)[0].a, make("plain", pairs, pairs, 6)[0].b
    return [x.requires_grad_(), y.requires_grad_(), *(torch.tensor(t, requires_grad=True) for t in (4.0, -2.0))]


def loss_of(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, ids: Tensor, **options: object) -> Tensor:
    siglip = fastcl.siglip_loss(x, y, scale, bias, ids=ids, **options)
    return siglip + fastcl.binary_nce_loss(x, y, 1 / scale, log_noise=bias, noise_ratio=2.0, **options)


def shard_of(rank: int, backend: str) -> list[Tensor]:
    """The loss over all ranks, and the gradients of this rank's leaves."""
    x, y, scale, bias = leaves(sum(PAIRS_OF_RANKS))
    own = slice(sum(PAIRS_OF_RANKS[:rank]), sum(PAIRS_OF_RANKS[: rank + 1]))
    given = [x[own].detach().requires_grad_(), y[own].detach().requires_grad_(), scale, bias]
    ids = torch.arange(len(x))[own] % 7
    loss = loss_of(*given, ids, group=torch.distributed.group.WORLD, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, given)]


@ON_CPU
def test_ranks_with_and_without_rows(worlds) -> None:
    found = worlds(3).run(shard_of, "cpu")
    given = [x.detach().double().requires_grad_() for x in leaves(sum(PAIRS_OF_RANKS))]
    loss = loss_of(*given, torch.arange(len(given[0])) % 7)
    x, y, *scalars = torch.autograd.grad(loss, given)
    for of_rank in found:
        assert relative_error(of_rank[0], loss) <= 1e-6
    for k, want in ((1, x), (2, y)):
        assert relative_error(torch.cat([of_rank[k] for of_rank in found]) / 3, want) <= 1e-5
    for k, want in zip((3, 4), scalars, strict=True):
        assert relative_error(sum(of_rank[k] for of_rank in found) / 3, want) <= 1e-5


@ON_CPU
def test_the_kernel_is_chosen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCL_BACKEND", raising=False)
    z = torch.randn(4, 3)
    engine._log_choice.cache_clear()
    with caplog.at_level("INFO", logger="fastcl"):
        fastcl.siglip_loss(z, z, 1.0, 0.0)
        fastcl.siglip_loss(z.double(), z.double(), 1.0, 0.0)
    assert [record.message for record in caplog.records] == [
        "backend cpu for cpu torch.float32 tensors, panel function: sigmoid",
        "backend tiled for cpu torch.float64 tensors, panel function: sigmoid",
    ]
    with pytest.raises(ValueError, match=r"backend 'cpu' can't compute this call: torch.float64 is not one of"):
        fastcl.siglip_loss(z.double(), z.double(), 1.0, 0.0, backend="cpu")
