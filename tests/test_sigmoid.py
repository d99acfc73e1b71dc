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
from fastcl.terms import NO_GRADIENTS, NO_TAGS, PanelGradients, PanelNeeds, PanelOperands, Tags
from tests.cases import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EVERYTHING = PanelNeeds(True, True, True, True, True)
OPTIONS = ("plain", "offsets", "labels", "ids", "everything")
EACH_OPTION = pytest.mark.parametrize("option", OPTIONS)
ON_CPU = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
LEVELS = cpu.levels() if cpu.unavailable() is None else []


def make(
    option: str,
    n: int,
    m: int,
    depth: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 10.0,
    bias: float = -3.0,
    row0: int | None = None,
) -> tuple[PanelOperands, Tensor]:
    """Operands with planted matches, and the gradient with respect to the rows' costs."""
    generator = torch.Generator().manual_seed(n + 7 * m)
    a, b = (torch.randn(rows, depth, generator=generator) for rows in (n, m))
    b[: min(n, m)] += a[: min(n, m)]
    a, b = (torch.nn.functional.normalize(x, dim=1).to(dtype) for x in (a, b))
    given: dict[str, object] = {"row_params": None, "column_params": None, "tags": NO_TAGS, "key_tags": NO_TAGS}
    if option in ("offsets", "everything"):
        given["row_params"] = torch.rand(1, n, generator=generator) + 0.5
        given["column_params"] = torch.randn(1, m, generator=generator)
    if option in ("labels", "ids", "everything"):
        # Differences that no narrower type holds.
        labels, ids = ([(torch.arange(k) * 5 // 3 + s) % 7 * 2**33 for k, s in ((n, 0), (m, 1))] for _ in range(2))
        ids = [torch.arange(len(x)) * 3 % 5 - 2**40 for x in ids]
        nothing = [None, None]
        both = zip(nothing if option == "ids" else labels, nothing if option == "labels" else ids, strict=True)
        given["tags"], given["key_tags"] = (Tags(*tags) for tags in both)
    first = None if row0 is None else torch.tensor(row0)
    x = PanelOperands(a, b, torch.tensor(scale), torch.tensor(bias), row0=first, **given)
    return x, torch.rand(n, generator=generator) / n


def judge(x: PanelOperands, incoming: Tensor) -> PanelGradients:
    """What the panel function makes of it in float64."""

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    names = ("a", "b", "scale", "bias", "row_params", "column_params")
    x = replace(x, **{name: wide(getattr(x, name)) for name in names})
    needs = [True, True, True, True, False, x.column_params is not None]
    rows = panels.values(sigmoid_rows, x, "dense")[0]
    _, (*gradients, _, columns) = panels.sweep(sigmoid_rows, x, None, incoming.double()[None], needs, "dense")
    return PanelGradients(*gradients, columns, rows)


def run(backend: str, x: PanelOperands, incoming: Tensor | None, needs: PanelNeeds) -> PanelGradients:
    chosen, kernel = engine.select_panels("sigmoid", x, backend)
    assert chosen == backend
    return kernel(x, incoming, needs)


def check(backend: str, x: PanelOperands, incoming: Tensor, tolerance: float = 3e-6, of_products: float = 1.0) -> None:
    needs = EVERYTHING._replace(columns=x.column_params is not None)
    want, got = judge(x, incoming), run(backend, x, incoming, needs)
    for name, exact, found in zip(PanelGradients._fields, want, got, strict=True):
        assert (exact is None) == (found is None), name
        if found is None:
            continue
        assert found.dtype is torch.float32
        # Sums of numbers of both signs, which cancel.
        size = max(float(exact.double().norm()), float(incoming.norm()) if name in ("scale", "bias") else 0.0)
        allowed = tolerance * (1.0 if name in ("rows", "bias", "columns") else of_products)
        assert float((found.double() - exact.reshape(found.shape)).norm()) <= allowed * max(size, 1e-30), name
    alone = run(backend, x, None, NO_GRADIENTS)
    torch.testing.assert_close(alone.rows, got.rows, rtol=1e-6, atol=0.0)
    assert all(found is None for found in alone[:5])


SHAPES = ((1, 1, 1), (1, 700, 3), (700, 1, 17), (97, 193, 513), (403, 301, 77))


@ON_CPU
@EACH_OPTION
@pytest.mark.parametrize(("n", "m", "depth"), SHAPES)
def test_agrees_with_float64(option: str, n: int, m: int, depth: int) -> None:
    check("cpu", *make(option, n, m, depth))


@ON_CPU
@EACH_OPTION
@pytest.mark.parametrize("row0", [5, 290, -3, 2**40])
def test_own_keys_of_a_shard(option: str, row0: int) -> None:
    check("cpu", *make(option, 130, 301, 8, row0=row0))


@ON_CPU
@EACH_OPTION
@pytest.mark.parametrize(("scale", "bias"), [(100.0, -10.0), (-100.0, 10.0), (0.0, -1.0)])
def test_large_logits(option: str, scale: float, bias: float) -> None:
    check("cpu", *make(option, 403, 301, 24, scale=scale, bias=bias), tolerance=1e-5)


@ON_CPU
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", ["offsets", "everything"])
def test_every_level(option: str, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CPU_LEVEL", level)
    rounds_w = dtype is torch.bfloat16 and level.endswith("bf16")
    check("cpu", *make(option, 403, 301, 77, dtype), of_products=1e3 if rounds_w else 1.0)


@ON_CPU
@pytest.mark.parametrize("option", ["offsets", "everything"])
def test_any_combination_of_gradients(option: str) -> None:
    x, incoming = make(option, 200, 110, 9)
    full = run("cpu", x, incoming, EVERYTHING)
    for flags in itertools.product((False, True), repeat=6):
        found = run("cpu", x, incoming, PanelNeeds(*flags))
        for name, needed, got, all_of_it in zip(PanelNeeds._fields, flags, found, full, strict=True):
            assert (got is not None) == needed, name
            if needed:
                torch.testing.assert_close(got, all_of_it, rtol=1e-4, atol=1e-6)


@ON_CPU
@pytest.mark.parametrize("option", ["offsets", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1500, 900), (100, 5000)])
def test_bits_do_not_depend_on_threads(option: str, dtype: torch.dtype, n: int, m: int) -> None:
    x, incoming = make(option, n, m, 64, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(run("cpu", x, incoming, EVERYTHING))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


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
    found = run("cpu", x, None, NO_GRADIENTS).rows.double()
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
    assert torch.equal(got.rows.isnan(), want.rows.isnan())
    assert torch.equal(got.a.isnan(), want.a.isnan())
    assert torch.equal(got.b.isnan(), want.b.isnan())


@ON_CPU
@pytest.mark.parametrize("offset", [-math.inf, math.inf])
def test_infinite_offsets(offset: float) -> None:
    """A noise that never draws a key, or draws nothing else: no NaN, and what is finite stays right."""
    x, incoming = make("offsets", 40, 50, 8)
    x.column_params[0, 45] = offset
    want, got = judge(x, incoming), run("cpu", x, incoming, EVERYTHING)
    assert not got.rows.isnan().any()
    assert relative_error(got.a, want.a) <= 1e-5
    if offset > 0:
        assert relative_error(got.rows, want.rows) <= 1e-5


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
        fastcl.contrastive_loss(z, torch.arange(4), 0.1, 0.9)
    assert [record.message for record in caplog.records] == [
        "backend cpu for cpu torch.float32 tensors, panel function: sigmoid",
        "backend tiled for cpu torch.float64 tensors, panel function: sigmoid",
        "backend tiled for cpu torch.float32 tensors, panel function: without a kernel",
    ]
    with pytest.raises(ValueError, match=r"backend 'cpu' can't compute this call: torch.float64 is not one of"):
        fastcl.siglip_loss(z.double(), z.double(), 1.0, 0.0, backend="cpu")
