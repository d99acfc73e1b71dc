"""What is particular to the C++ engine: instruction-set levels, determinism, the border of the fixed shift, exp2.

Correctness of every plan, dtype and shape on every backend is the business of the tests that iterate over cases.py.
"""

import math

import pytest
import torch

from fastcl.backends import cpu
from fastcl.backends.shift import fixed_shift, flag_threshold
from fastcl.terms import Axis, Mask, Operands, Plan, Reduce, Statistics, Term

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
LEVELS = cpu.levels() if cpu.unavailable() is None else []
NOT_SELF = Mask(self_pair=False)

NT_XENT = Plan(
    (
        Term(Reduce.LSE, Mask(self_pair=False, target=False)),
        Term(Reduce.SUM, Mask(target=True)),
        Term(Reduce.MAX, NOT_SELF),
    ),
    symmetric=True,
)
CLIP = Plan(
    (
        Term(Reduce.LSE, NOT_SELF),
        Term(Reduce.LSE, NOT_SELF, Axis.COLUMN),
        Term(Reduce.SUM, Mask(self_pair=True)),
        Term(Reduce.MAX, Mask(), Axis.COLUMN),
    )
)
TARGETED = Plan(
    (
        Term(Reduce.LSE, Mask(target=False)),
        Term(Reduce.LSE, Mask(target=False), Axis.COLUMN),
        Term(Reduce.SUM, Mask(target=True), Axis.COLUMN),
    )
)


def unit_rows(n, depth, seed, dtype=torch.float32):
    rows = torch.randn(n, depth, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1).to(dtype)


def operands(plan, n, m, depth, dtype=torch.float32, scale=20.0, **kwargs):
    a = unit_rows(n, depth, 1, dtype)
    b = None if plan.symmetric else unit_rows(m, depth, 2, dtype)
    # Not an involution, not injective, and partly out of range.
    target = torch.randint(-2, m + 2, (n,), generator=torch.Generator().manual_seed(3))
    return Operands(a, b, torch.tensor(scale), target, 1.0, **kwargs)


def incoming_for(statistics):
    generator = torch.Generator().manual_seed(4)
    return Statistics(*(torch.randn(v.shape, generator=generator) / max(1, v.shape[-1]) for v in statistics))


def run(plan, given):
    assert cpu.supports(plan, given) is None
    statistics = cpu.statistics(plan, given)
    products = cpu.gradient(plan, given, statistics, incoming_for(statistics), True, True)
    return [*statistics, *(p for p in products if p is not None)]


def dense(plan, given):
    """The same in float64, from the definition."""
    x, y = given.a.double(), given.keys.double()
    logits = (given.scale.double() * x @ y.T).requires_grad_()
    row = torch.arange(x.shape[0])[:, None]
    column = torch.arange(y.shape[0]) + given.col0
    values = {Axis.ROW: [], Axis.COLUMN: []}
    for term in plan.terms:
        admitted = torch.ones_like(logits, dtype=torch.bool)
        if term.mask.self_pair is not None:
            admitted &= (row + given.row0 == column) == term.mask.self_pair
        if term.mask.target is not None:
            admitted &= (given.target[:, None] == column) == term.mask.target
        dim = 1 if term.axis is Axis.ROW else 0
        if term.reduce is Reduce.SUM:
            value = torch.where(admitted, logits, 0.0).sum(dim)
        else:
            masked = torch.where(admitted, logits, -math.inf)
            value = masked.logsumexp(dim) if term.reduce is Reduce.LSE else masked.detach().amax(dim)
        values[term.axis].append(value)
    outputs = [torch.stack(values[axis]) for axis in Axis if values[axis]]
    columns = outputs[1] if len(outputs) > 1 else torch.zeros(0, y.shape[0])
    incoming = incoming_for(Statistics(outputs[0], columns))
    (w,) = torch.autograd.grad(outputs, logits, incoming[: len(outputs)])
    w = w.nan_to_num(0.0)
    products = [(w + w.T) @ x] if plan.symmetric else [w @ y, w.T @ x]
    return [outputs[0].detach(), columns.detach(), *products]


def assert_close(actual, expected, statistics_error=1e-5, product_error=2e-5):
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        if want.numel() == 0:
            continue
        if i < 2:
            torch.testing.assert_close(got.double(), want.double(), rtol=statistics_error, atol=statistics_error)
        else:
            assert (got - want).abs().max() <= product_error * want.abs().max()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", [NT_XENT, CLIP, TARGETED], ids=["nt_xent", "clip", "targeted"])
def test_every_level_computes_the_same(monkeypatch, level, dtype, plan):
    monkeypatch.setenv("FASTCL_CPU_LEVEL", level)
    assert cpu.level() == level
    given = operands(plan, 403, 403 if plan.symmetric else 301, 77, dtype)
    rounds_w = dtype is torch.bfloat16 and level.endswith("bf16")
    assert_close(run(plan, given), dense(plan, given), product_error=1e-2 if rounds_w else 2e-5)


def test_unknown_level_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTCL_CPU_LEVEL", "mmx")
    with pytest.raises(ValueError, match="mmx"):
        cpu.level()


@pytest.mark.parametrize("level", LEVELS)
def test_peak_of_every_level(monkeypatch, level):
    """A rate that a thread can have; a loop that the compiler took away would have any."""
    monkeypatch.setenv("FASTCL_CPU_LEVEL", level)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert 1e7 < cpu.peak_flops(dtype) < 1e13


def test_peak_of_what_the_engine_does_not_take():
    with pytest.raises(ValueError, match=r"dtype is float64, expected float32"):
        cpu.peak_flops(torch.float64)


@pytest.mark.parametrize(("n", "m", "depth"), [(1, 1, 1), (1, 700, 3), (700, 1, 17), (97, 193, 513), (30, 40, 4096)])
def test_ragged_shapes_and_offsets(n, m, depth):
    given = operands(CLIP, n, m, depth, row0=5, col0=3)
    assert_close(run(CLIP, given), dense(CLIP, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strides(dtype):
    given = operands(CLIP, 130, 120, 64, dtype)
    transposed = given.a.T.contiguous().T
    spread = torch.full((240, 192), math.nan, dtype=dtype)
    spread[::2, ::3] = given.b
    other = Operands(transposed, spread[::2, ::3], given.scale, given.target, 1.0)
    for one, two in zip(run(CLIP, given), run(CLIP, other), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("plan", [NT_XENT, CLIP, TARGETED], ids=["nt_xent", "clip", "targeted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(plan, dtype):
    given = operands(plan, 1500, 1500 if plan.symmetric else 900, 64, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7, 2):
            torch.set_num_threads(count)
            results.append(run(plan, given))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for one, two in zip(results[0], result, strict=True):
            assert torch.equal(one.nan_to_num(), two.nan_to_num())


@pytest.mark.parametrize("offset", [-0.75, -0.01, 0.01, 0.75])
def test_border_of_the_fixed_shift(offset):
    """Rows whose log-sum-exp lies just below and above the threshold of the shift rule."""
    n, m, depth, scale = 24, 400, 8, 100.0
    probe = Operands(torch.zeros(n, depth), torch.zeros(m, depth), torch.tensor(scale), None, 1.0)
    border = float(fixed_shift(probe, probe.scale)) + flag_threshold(probe) + offset
    cosine = (border - math.log(m)) / scale
    assert -1 < cosine < 0
    a = torch.zeros(n, depth)
    a[:, 0] = 1.0
    b = torch.zeros(m, depth)
    b[:, 0] = cosine
    b[:, 1:] = unit_rows(m, depth - 1, 5) * math.sqrt(1 - cosine**2)
    plan = Plan((Term(Reduce.LSE), Term(Reduce.LSE, Mask(), Axis.COLUMN)))
    given = Operands(a, b, torch.tensor(scale), None, 1.0)
    assert_close(run(plan, given), dense(plan, given))


def test_rows_far_below_the_bound_are_not_lost():
    given = operands(CLIP, 300, 200, 16, scale=100.0)
    given.a[::3] = given.a[0] + 0.01 * given.a[::3]
    given.b[:] = -given.a[0] + 0.01 * given.b
    expected = dense(CLIP, given)
    assert (expected[0][0] < -60).any()
    assert_close(run(CLIP, given), expected)


@pytest.mark.parametrize("depth", [3, 40])
@pytest.mark.parametrize("mask", [Mask(), NOT_SELF, Mask(target=False)], ids=["all", "not_self", "not_target"])
def test_symmetric_rows_of_large_norm(mask, depth):
    """Every row is flagged; each pair must count once whichever sweep it is in."""
    given = operands(NT_XENT, 450, 450, depth)
    plan = Plan((Term(Reduce.LSE, mask),), symmetric=True)
    given = Operands(given.a * 30, None, torch.tensor(1.0), given.target, None)
    assert_close(run(plan, given), dense(plan, given), statistics_error=1e-6, product_error=1e-3)


@pytest.mark.parametrize("reduce", [Reduce.LSE, Reduce.SUM], ids=["lse", "sum"])
def test_plan_of_sparse_terms_only(reduce):
    plan = Plan((Term(reduce, Mask(target=True)),), symmetric=True)
    given = operands(plan, 203, 203, 9)
    assert_close(run(plan, given), dense(plan, given))


@pytest.mark.parametrize("level", LEVELS)
def test_exp2_error(monkeypatch, level):
    """The sum of a single pair is exp2 itself: within 2 ulp, and the rounding of its argument, over the used range."""
    monkeypatch.setenv("FASTCL_CPU_LEVEL", level)
    n = 4096
    logits = torch.linspace(-55.0, 80.0, n)
    given = Operands(logits[:, None], torch.ones(1, 1), torch.tensor(1.0), None, 80.0)
    plan = Plan((Term(Reduce.LSE),))
    (rows, _) = cpu.statistics(plan, given)
    argument_error = 160 * 2.0**-24 * 3
    assert (rows[0].double() - logits.double()).abs().max() <= argument_error + 2 * 2.0**-23 + 80 * 2.0**-24


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("plan", [NT_XENT, CLIP], ids=["nt_xent", "clip"])
def test_nan_and_inf_propagate(plan, bad):
    given = operands(plan, 40, 40, 8)
    given = Operands(given.a, given.b, given.scale, given.target, None)
    given.a[7, 3] = bad
    for got, want in zip(cpu.statistics(plan, given), dense(plan, given)[:2], strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_what_is_refused():
    given = operands(CLIP, 4, 4, 4)
    for reduce, name in ((Reduce.LSE, "log-sum-exp"), (Reduce.SUM, "sum")):
        assert cpu.supports(Plan((Term(reduce),) * 4), given) is None
        assert f"more than 4 {name} terms" in cpu.supports(Plan((Term(reduce),) * 5), given)
    double = Operands(given.a.double(), given.b.double(), given.scale)
    assert "float64" in cpu.supports(CLIP, double)
