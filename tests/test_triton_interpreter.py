"""The Triton kernels in Triton's interpreter, on CPU tensors, against the dense formula in float64.

Triton decides when it is imported whether to interpret, so the cases run in a process of their own, which
:func:`test_cases_in_the_interpreter` starts. By hand: ``TRITON_INTERPRET=1 pytest tests/test_triton_interpreter.py``.
bfloat16 is left to the tests on a GPU: the interpreter's ``tl.dot`` is silently wrong in it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastcl import tuning
from fastcl.backends import dense, triton
from fastcl.terms import Axis, Mask, Operands, Plan, Reduce, Statistics, Term

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(case: Callable[..., None]) -> Callable[..., None] | None:
    """Leaves nothing to collect in a process that doesn't interpret."""
    return case if INTERPRETED else None


LSE, SUM, MAX = Reduce.LSE, Reduce.SUM, Reduce.MAX
COLUMN = Axis.COLUMN
NOT_SELF, NOT_TARGET = Mask(self_pair=False), Mask(target=False)
NEITHER = Mask(self_pair=False, target=False)
SELF, TARGET = Mask(self_pair=True), Mask(target=True)

PLANS = {
    "nt_xent": Plan((Term(LSE, NEITHER), Term(SUM, TARGET)), symmetric=True),
    "nt_xent with max": Plan((Term(LSE, NEITHER), Term(SUM, TARGET), Term(MAX, NEITHER)), symmetric=True),
    "every other row": Plan((Term(LSE, NOT_SELF),), symmetric=True),
    "uniformity": Plan((Term(LSE),), symmetric=True),
    "clip": Plan((Term(LSE, NOT_SELF), Term(LSE, NOT_SELF, COLUMN), Term(SUM, SELF))),
    "clip with max": Plan(
        (Term(LSE, NOT_SELF), Term(LSE, NOT_SELF, COLUMN), Term(SUM, SELF), Term(MAX), Term(MAX, NOT_SELF, COLUMN))
    ),
    "info_nce": Plan((Term(LSE, NOT_TARGET), Term(SUM, TARGET))),
    "in-batch info_nce": Plan((Term(LSE, NOT_SELF), Term(SUM, SELF))),
    "whole rows": Plan((Term(LSE),)),
    "columns only": Plan((Term(LSE, NOT_TARGET, COLUMN), Term(SUM, Mask(), COLUMN))),
    "several masks on an axis": Plan((Term(LSE), Term(LSE, NOT_TARGET), Term(LSE, TARGET), Term(LSE, SELF, COLUMN))),
    "symmetric, several masks": Plan((Term(LSE, TARGET), Term(SUM), Term(LSE), Term(SUM, SELF)), symmetric=True),
}
SMALL_TILES = tuning.Config(block_m=16, block_n=16, block_d=16, num_warps=4, num_stages=2)
IN_PIECES = dataclasses.replace(SMALL_TILES, block_m=32, block_n=32, piece=16)
WIDE_TILES = dataclasses.replace(SMALL_TILES, block_n=32)


@pytest.fixture(autouse=True)
def small_panels(poisoned_memory: None) -> Iterator[None]:
    """Several tiles, super-tiles and panels in tiny shapes, and NaN wherever nothing was written."""
    with tuning.override(SMALL_TILES, workspace_bytes=4 * 32 * 48):
        yield


def make_operands(
    plan: Plan,
    n: int = 45,
    m: int = 45,
    d: int = 20,
    *,
    scale: float = 10.0,
    norm: float | None = None,
    noise: float = 0.3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **fields: object,
) -> Operands:
    """Rows with planted positives (b[:n] is a[:n] and noise); a target is a random map, never an involution."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, d, generator=generator), dim=1)

    a = draw(n)
    b = draw(m)
    planted = min(n, m)
    b[:planted] = torch.nn.functional.normalize(a[:planted] + noise * b[:planted], dim=1)
    length = 1.0 if norm is None else norm
    target = torch.randint(0, n if plan.symmetric else m, (n,), generator=generator)
    operands = Operands(
        a=(a * length).to(dtype),
        b=None if plan.symmetric else (b * length).to(dtype),
        scale=torch.tensor(scale),
        target=target if plan.tests("target") else None,
        norm_bound=1.01 if norm is None else None,
    )
    return dataclasses.replace(operands, **fields)


def exact(operands: Operands) -> Operands:
    b = operands.b
    return dataclasses.replace(
        operands, a=operands.a.double(), b=None if b is None else b.double(), scale=operands.scale.double()
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check(plan: Plan, operands: Operands, tolerance: float = 5e-6, gradient_tolerance: float = 2e-5) -> None:
    """Values within ``tolerance`` of the largest logit, gradients of a random loss within a relative norm."""
    assert triton.supports(plan, operands) is None
    judge = exact(operands)
    got, want = triton.statistics(plan, operands), dense.statistics(plan, judge)
    size = judge.scale.abs().item() * (judge.a.norm(dim=1).max() * judge.keys.norm(dim=1).max()).item()
    for terms, g, w in zip((plan.rows, plan.columns), got, want, strict=True):
        assert g.shape == w.shape
        assert g.dtype is torch.float32
        for term, x, y in zip(terms, g, w, strict=True):
            count = len(x) if term.reduce is SUM and not term.mask.is_sparse else 1
            torch.testing.assert_close(
                x.double(), y, rtol=1e-6, atol=tolerance * max(1.0, size) * count, equal_nan=True, msg=str(term)
            )
    generator = torch.Generator().manual_seed(1)
    incoming = Statistics(*(torch.rand(x.shape, generator=generator) / x.shape[1] for x in got))
    needs_b = not plan.symmetric
    got_products = triton.gradient(plan, operands, got, incoming, True, needs_b)
    want_products = dense.gradient(plan, judge, want, Statistics(*(x.double() for x in incoming)), True, needs_b)
    for x, y in zip(got_products, want_products, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype is torch.float32
            assert x.isfinite().all()
            assert relative_error(x, y) <= gradient_tolerance


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the process it would start is this one")
@pytest.mark.parametrize(
    "name", ["interpreter", "masks", "panels", "sigmoid", "panel_functions", "launches", "variants"]
)
def test_cases_in_the_interpreter(name: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(f"Triton's interpreter does not work with numpy {numpy.__version__}")
    process = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"),
            Path(__file__).with_name(f"test_triton_{name}.py"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr


@interpreted
@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str) -> None:
    plan = PLANS[name]
    check(plan, make_operands(plan, m=45 if plan.symmetric else 37))


@interpreted
def test_strided_target() -> None:
    operands = make_operands(PLANS["info_nce"], m=37)
    apart = torch.stack((operands.target, operands.target.flip(0)), dim=1)[:, 0]
    assert not apart.is_contiguous()
    check(PLANS["info_nce"], dataclasses.replace(operands, target=apart))


SYMMETRIC_PLANS = [name for name, plan in PLANS.items() if plan.symmetric]
IN_REGISTERS = tuning.Config(block_m=16, block_n=16, block_d=32, num_warps=4, num_stages=2)
REGISTERS = [IN_REGISTERS, dataclasses.replace(IN_REGISTERS, block_n=32), dataclasses.replace(IN_REGISTERS, block_m=32)]


@interpreted
@pytest.mark.parametrize("config", REGISTERS, ids=["square", "wide", "tall"])
@pytest.mark.parametrize("name", SYMMETRIC_PLANS)
def test_sums_in_registers(name: str, config: tuning.Config) -> None:
    """Targets that are no involution, so that most tiles hold one; the last tiles hang over both edges."""
    with tuning.override(SMALL_TILES, registers=config):
        check(PLANS[name], make_operands(PLANS[name], 45))


@interpreted
@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plain_tiles_in_registers(scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """SimCLR's positives leave most tiles plain; at scale 100 a row is opposed to all others and flagged.

    Several tiles are remembered together, and not all of them are rare.
    """
    monkeypatch.setattr("fastcl.backends.triton.kernels.registers._GROUPS", 2)
    plan = PLANS["nt_xent"]
    operands = make_operands(plan, 96, 96, 32, scale=scale)
    operands = dataclasses.replace(operands, target=(torch.arange(96) + 48) % 96)
    if scale > 10.0:
        operands.a[:] = torch.nn.functional.normalize(operands.a[:1] + 0.1 * operands.a, dim=1)
        operands.a[70] = -operands.a[3]
    operands = dataclasses.replace(operands, a=operands.a.to(dtype))
    statistics = triton.statistics(plan, operands)
    incoming = Statistics(*(torch.full_like(x, 1 / 96) for x in statistics))
    judge = exact(operands)
    want = dense.gradient(
        plan, judge, dense.statistics(plan, judge), Statistics(*(x.double() for x in incoming)), True, False
    )
    with tuning.override(SMALL_TILES, registers=IN_REGISTERS):
        got = triton.gradient(plan, operands, statistics, incoming, True, False)
    assert relative_error(got.a, want.a) < (5e-5 if dtype is torch.float32 else 5e-4)


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "clip", "info_nce"])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (2, 3, 5), (16, 48, 16), (33, 17, 47), (17, 70, 8)])
def test_shapes(name: str, n: int, m: int, d: int) -> None:
    plan = PLANS[name]
    check(plan, make_operands(plan, n, n if plan.symmetric else m, d))


@interpreted
@pytest.mark.parametrize("name", ["clip", "info_nce"])
def test_tiles_that_are_not_square(name: str) -> None:
    with tuning.override(WIDE_TILES, workspace_bytes=4 * 16 * 64):
        check(PLANS[name], make_operands(PLANS[name], 50, 70))


@interpreted
@pytest.mark.parametrize("n", [83, 96])
@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("name", ["nt_xent with max", "symmetric, several masks", "clip with max"])
def test_exceptional_tiles_in_pieces(name: str, scale: float, n: int) -> None:
    """Several pieces to a tile, with tiles that hold nothing exceptional beside them."""
    plan = PLANS[name]
    with tuning.override(IN_PIECES, workspace_bytes=4 * 32 * 64):
        operands = make_operands(plan, n, n if plan.symmetric else 130, scale=scale)
        if plan.tests("target"):
            operands = dataclasses.replace(operands, target=(torch.arange(n) + n // 2) % n)
        check(plan, operands, gradient_tolerance=5e-5)


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "clip"])
def test_more_tiles_than_super_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each super-tile then holds several tiles, in an order that must not matter to the result."""
    plan = PLANS[name]
    monkeypatch.setattr("fastcl.backends.triton.forward._MOST_SUPER_TILES", 2)
    check(plan, make_operands(plan, 83, 83 if plan.symmetric else 70))


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "clip", "info_nce"])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_scale_100(name: str, noise: float) -> None:
    check(PLANS[name], make_operands(PLANS[name], scale=100.0, noise=noise), gradient_tolerance=5e-5)


@interpreted
@pytest.mark.parametrize("opposed", ["rows", "columns"])
@pytest.mark.parametrize("name", ["nt_xent", "every other row", "clip", "several masks on an axis"])
def test_far_below_the_bound(name: str, opposed: str) -> None:
    """All vectors point one way but for some that point the other: the logits of those underflow under any fixed shift.

    Some underflow to a sum of 0, and some, more treacherous, to a sum of a few subnormal numbers.
    """
    plan = PLANS[name]
    operands = make_operands(plan, scale=100.0)
    one_way = torch.nn.functional.normalize(operands.a[:1] + 0.02 * operands.a, dim=1)
    other_way = one_way.clone()
    # in a symmetric plan two of them would be each other's large logit
    cosines = (0.775,) if plan.symmetric else (0.5, 0.7, 0.75, 0.775, 0.8, 0.9, 1.0)
    for i, cosine in enumerate(cosines):
        across = torch.nn.functional.normalize(operands.a[i + 1] - operands.a[i + 1] @ one_way[0] * one_way[0], dim=0)
        other_way[3 * i + 7] = math.sqrt(1 - cosine**2) * across - cosine * one_way[0]
    a, b = (other_way, one_way) if opposed == "rows" else (one_way, other_way)
    operands = dataclasses.replace(operands, a=other_way if plan.symmetric else a, b=None if plan.symmetric else b)
    statistics = dense.statistics(plan, exact(operands))
    assert any((x < -70).any() and (x > 80).any() for x in (*statistics.rows, *statistics.columns))
    check(plan, operands, gradient_tolerance=5e-5)


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "clip"])
def test_norm_1e3(name: str) -> None:
    plan = PLANS[name]
    operands = make_operands(plan, norm=1e3, scale=0.1)
    got, want = triton.statistics(plan, operands), dense.statistics(plan, exact(operands))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=0.1)
    incoming = Statistics(*(torch.ones_like(x) for x in got))
    assert triton.gradient(plan, operands, got, incoming, True, False).a.isfinite().all()


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "clip"])
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_all_rows_equal(name: str, scale: float) -> None:
    operands = make_operands(PLANS[name], scale=scale)
    a = operands.a[:1].expand_as(operands.a).contiguous()
    check(PLANS[name], dataclasses.replace(operands, a=a, b=None if operands.b is None else a.clone()))


@interpreted
@pytest.mark.parametrize("name", ["clip", "info_nce", "in-batch info_nce"])
@pytest.mark.parametrize(("row0", "col0"), [(0, 20), (20, 0), (7, 7), (1000, 0), (2**40, 2**40 + 3)])
def test_offsets(name: str, row0: int, col0: int) -> None:
    """A shard: self pairs lie on another diagonal or nowhere, and many targets lie outside."""
    plan = PLANS[name]
    operands = make_operands(plan, 45, 37, row0=row0, col0=col0)
    if plan.tests("target"):
        operands = dataclasses.replace(operands, target=operands.target + col0 - 10)
    check(plan, operands)


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "info_nce"])
def test_targets_outside_match_nothing(name: str) -> None:
    operands = make_operands(PLANS[name])
    target = operands.target.clone()
    target[::4] = -1
    target[1::4] = 2**33 + 5
    check(PLANS[name], dataclasses.replace(operands, target=target))


@interpreted
def test_targets_that_are_an_involution() -> None:
    """SimCLR's own: rows i and i + n/2 are each other's positives. Most tiles then hold no exceptional pair."""
    operands = make_operands(PLANS["nt_xent"], 96)
    check(PLANS["nt_xent"], dataclasses.replace(operands, target=(torch.arange(96) + 48) % 96))


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "clip"])
@pytest.mark.parametrize("size", [1.0, 65536.0])
def test_float16(name: str, size: float) -> None:
    """W is about 1/N, and 65536/N under a loss scaler: float16 holds neither as it is."""
    plan = PLANS[name]
    operands = make_operands(plan, dtype=torch.float16)
    judge = exact(operands)
    got, want = triton.statistics(plan, operands), dense.statistics(plan, judge)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-4)
    incoming = Statistics(*(torch.full_like(x, size / x.shape[1]) for x in got))
    got_products = triton.gradient(plan, operands, got, incoming, True, not plan.symmetric)
    want_products = dense.gradient(
        plan, judge, want, Statistics(*(x.double() for x in incoming)), True, not plan.symmetric
    )
    for x, y in zip(got_products, want_products, strict=True):
        assert x is None or relative_error(x, y) < 5e-4


@interpreted
@pytest.mark.parametrize(("needs_a", "needs_b"), [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(needs_a: bool, needs_b: bool) -> None:
    plan = PLANS["clip"]
    operands = make_operands(plan, 30, 40)
    statistics = triton.statistics(plan, operands)
    incoming = Statistics(*(torch.ones_like(x) for x in statistics))
    both = triton.gradient(plan, operands, statistics, incoming, True, True)
    some = triton.gradient(plan, operands, statistics, incoming, needs_a, needs_b)
    for needed, x, y in zip((needs_a, needs_b), some, both, strict=True):
        assert torch.equal(x, y) if needed else x is None


@interpreted
@pytest.mark.parametrize("layout", ["every other row", "every other column", "transposed", "broadcast"])
def test_strides(layout: str) -> None:
    plan = PLANS["clip"]
    operands = make_operands(plan, 40, 40, 20)
    a = {
        "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
        "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "transposed": lambda x: x.t().contiguous().t(),
        "broadcast": lambda x: x[:1].expand(40, 20),
    }[layout](operands.a)
    check(plan, dataclasses.replace(operands, a=a))


@interpreted
def test_empty_rows_have_no_gradient() -> None:
    plan = PLANS["info_nce"]
    operands = make_operands(plan, 20, 1)
    statistics = triton.statistics(plan, dataclasses.replace(operands, target=torch.zeros(20, dtype=torch.long)))
    assert (statistics.rows[0] == -math.inf).all()
    check(plan, dataclasses.replace(operands, target=torch.zeros(20, dtype=torch.long)))


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "clip"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_propagate(name: str, bad: float) -> None:
    operands = make_operands(PLANS[name])
    operands.a[3, 2] = bad
    assert not triton.statistics(PLANS[name], operands).rows[0].isfinite().all()


@interpreted
@pytest.mark.parametrize("name", ["nt_xent", "clip"])
def test_same_bits_twice(name: str) -> None:
    operands = make_operands(PLANS[name], scale=100.0)
    first, second = (triton.statistics(PLANS[name], operands) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_reasons() -> None:
    if triton.unavailable() is not None:
        operands = make_operands(PLANS["clip"])
        assert triton.supports(PLANS["clip"], operands) == triton.unavailable()
        return
    operands = make_operands(PLANS["clip"])
    assert "float64" in triton.supports(PLANS["clip"], exact(operands))
    mirrored = Plan((Term(LSE, NOT_SELF, COLUMN),), symmetric=True)
    assert "rows" in triton.supports(mirrored, make_operands(mirrored))
    shifted = make_operands(PLANS["nt_xent"], col0=3)
    assert "row0" in triton.supports(PLANS["nt_xent"], shifted)


def test_devices_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda"))
    monkeypatch.setattr(triton, "_is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert triton.takes(on_gpu) == "it needs compute capability 8.0 or higher"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert triton.takes(on_gpu) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton.takes(on_gpu) == "its tables are for NVIDIA's devices"


def test_import_needs_no_triton() -> None:
    """A None in sys.modules makes ``import triton`` fail."""
    code = (
        "import sys; sys.modules['triton'] = None; import fastcl.backends.triton as t;"
        "assert t.unavailable() == 'triton is not installed', t.unavailable()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
