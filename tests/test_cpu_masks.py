"""Masks of labels, ids and thresholds in the C++ CPU engine, and its sums over all pairs, against dense float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastcl.backends import cpu, dense
from fastcl.backends.shift import fixed_shift, flag_threshold
from fastcl.terms import Axis, CrossEntropy, Mask, Needs, Operands, Plan, Reduce, Statistics, Tags, Term
from tests.cases import relative_error

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
LEVELS = cpu.levels() if cpu.unavailable() is None else []
ROWS = Axis.ROW
COLUMNS = Axis.COLUMN

POSITIVES = Mask(label=True, self_pair=False)
SUP_CON = Plan(
    (
        Term(Reduce.LSE, Mask(label=False, id=False)),
        Term(Reduce.LSE, POSITIVES),
        Term(Reduce.SUM, POSITIVES),
        Term(Reduce.MAX, Mask(label=False, id=False)),
        Term(Reduce.MAX, POSITIVES),
    ),
    symmetric=True,
    label_width=1,
)
THRESHOLDS = Plan(
    (
        Term(Reduce.LSE, Mask(self_pair=False, above=False)),
        Term(Reduce.LSE, Mask(target=False, above=True, label=False)),
        Term(Reduce.SUM, Mask(above=True)),
        Term(Reduce.SUM, Mask(target=True, id=False)),
        Term(Reduce.LSE, Mask(target=True, above=False)),
        Term(Reduce.MAX, Mask(above=False, target=False)),
    ),
    symmetric=True,
)
FOUR_EACH = Plan(
    (
        Term(Reduce.LSE),
        Term(Reduce.LSE, Mask(id=False, self_pair=False)),
        Term(Reduce.LSE, Mask(label=True, id=True)),
        Term(Reduce.LSE, Mask(label=False, above=False, target=False)),
        Term(Reduce.SUM, Mask(label=True)),
        Term(Reduce.SUM),
        Term(Reduce.MAX, Mask(id=True)),
        Term(Reduce.LSE, Mask(above=False, target=False), COLUMNS),
        Term(Reduce.LSE, Mask(label=True, id=False), COLUMNS),
        Term(Reduce.SUM, Mask(id=True), COLUMNS),
        Term(Reduce.SUM, Mask(target=True, above=True), COLUMNS),
        Term(Reduce.MAX, Mask(above=False), COLUMNS),
        Term(Reduce.LSE, Mask(self_pair=False), COLUMNS),
        Term(Reduce.LSE, Mask(label=False, id=False, above=True), COLUMNS),
    ),
    label_width=2,
)
SMOOTHING = Plan((Term(Reduce.LSE, Mask(self_pair=False)), Term(Reduce.SUM, Mask(self_pair=True)), Term(Reduce.SUM)))
COLUMNS_ONLY = Plan((Term(Reduce.LSE, Mask(id=False), COLUMNS), Term(Reduce.SUM, Mask(label=True), COLUMNS)))
PLANS = {
    "sup_con": SUP_CON,
    "thresholds": THRESHOLDS,
    "four_each": FOUR_EACH,
    "smoothing": SMOOTHING,
    "columns_only": COLUMNS_ONLY,
}
EACH_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def unit_rows(rows: int, depth: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, depth, generator=generator), dim=1)


def make(plan: Plan, n: int, m: int, depth: int, dtype=torch.float32, scale: float = 20.0, **kwargs) -> Operands:
    generator = torch.Generator().manual_seed(n + 3 * m)
    m = n if plan.symmetric else m
    a, b = unit_rows(n, depth, generator).to(dtype), unit_rows(m, depth, generator).to(dtype)
    target = torch.randint(-2, m + 2, (n,), generator=generator)

    def draw_tags(rows: int) -> Tags:
        # Differences that no narrower type holds; the first row's label and id are its alone.
        labels = torch.randint(6, (rows,), generator=generator) * 2 + 2**50
        labels[0] = -(2**62)
        ids = torch.randint(9, (rows,), generator=generator) - 2**40
        ids[0] = 2**62 + rows
        return Tags(labels, ids)

    given = Operands(a, None if plan.symmetric else b, torch.tensor(scale), target, 1.0, **kwargs)
    row_tags, column_tags = draw_tags(n), Tags() if plan.symmetric else draw_tags(m)
    return with_thresholds(replace(given, row_tags=row_tags, column_tags=column_tags))


def with_thresholds(given: Operands) -> Operands:
    """Thresholds in the widest gap that the middle half of a row's or column's logits has, away from all roundings."""
    logits = given.scale.double() * given.a.double() @ given.keys.double().T

    def in_gaps(values: Tensor) -> Tensor:
        values = values.sort(dim=1).values
        quarter = values.shape[1] // 4
        middle = values[:, quarter : max(values.shape[1] - quarter, quarter + 2)]
        if middle.shape[1] < 2:
            return middle[:, 0].float() + 1
        at = middle.diff(dim=1).argmax(dim=1, keepdim=True)
        return ((middle.gather(1, at) + middle.gather(1, at + 1)) / 2)[:, 0].float()

    columns = given.column_tags if given.b is None else given.column_tags._replace(threshold=in_gaps(logits.T))
    return replace(given, row_tags=given.row_tags._replace(threshold=in_gaps(logits)), column_tags=columns)


def wide(given: Operands) -> Operands:
    b = None if given.b is None else given.b.double()
    return replace(given, a=given.a.double(), b=b, scale=given.scale.double())


def check(plan: Plan, given: Operands, statistics_error: float = 1e-5, product_error: float = 2e-5) -> Statistics:
    """The engine's statistics, which agree with the definition, and so do the products."""
    assert cpu.supports(plan, given) is None
    got, want = cpu.statistics(plan, given), dense.statistics(plan, wide(given))
    # The rounding of a sum's single logits adds up.
    for terms, x, y in zip((plan.rows, plan.columns), got, want, strict=True):
        for term, one, other in zip(terms, x, y, strict=True):
            size = max(given.shape) * abs(float(given.scale)) / 20 if term.reduce is Reduce.SUM else 1.0
            error = statistics_error * max(1.0, size)
            torch.testing.assert_close(one.double(), other, rtol=error, atol=error, msg=lambda m, t=term: f"{t}\n{m}")
    generator = torch.Generator().manual_seed(4)
    incoming = Statistics(*(torch.randn(v.shape, generator=generator) / max(1, v.shape[-1]) for v in got))
    wide_incoming = Statistics(*(v.double() for v in incoming))
    products = cpu.gradient(plan, given, got, incoming, True, True)
    exact = dense.gradient(plan, wide(given), want, wide_incoming, True, not plan.symmetric)
    for x, y in zip(products, exact, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x - y).abs().max() <= product_error * y.abs().max()
    return got


@pytest.mark.parametrize("level", LEVELS)
@EACH_DTYPE
@EACH_PLAN
def test_every_level_computes_the_same(monkeypatch, level: str, dtype: torch.dtype, plan: Plan) -> None:
    monkeypatch.setenv("FASTCL_CPU_LEVEL", level)
    rounds_w = dtype is torch.bfloat16 and level.endswith("bf16")
    check(plan, make(plan, 403, 301, 77, dtype), product_error=1e-2 if rounds_w else 2e-5)


@pytest.mark.parametrize(("n", "m", "depth"), [(1, 1, 1), (1, 700, 3), (700, 1, 17), (97, 193, 513), (1300, 1170, 40)])
@EACH_PLAN
def test_ragged_shapes_and_offsets(plan: Plan, n: int, m: int, depth: int) -> None:
    given = make(plan, n, m, depth, row0=5, col0=5 if plan.symmetric else 3)
    check(plan, given)


@pytest.mark.parametrize("scale", [0.0, -15.0])
@EACH_PLAN
def test_scales_that_are_not_positive(plan: Plan, scale: float) -> None:
    check(plan, make(plan, 150, 140, 12, scale=scale))


@EACH_PLAN
def test_logits_far_apart(plan: Plan) -> None:
    """Within their masks, most rows' largest logits lie so far below the bound that exp(S - c) underflows."""
    given = make(plan, 300, 260, 16, scale=100.0)
    given.a[::3] = given.a[0] + 0.01 * given.a[::3]
    if given.b is not None:
        given.b[:] = -given.a[0] + 0.01 * given.b
    given = with_thresholds(given)
    got = check(plan, given, product_error=1e-4)
    lost = float(fixed_shift(given, given.scale)) + flag_threshold(given)
    assert any((v.isfinite() & (v < lost)).any() for v in got if v.numel())


@EACH_PLAN
def test_rows_of_large_norm(plan: Plan) -> None:
    """Every row is flagged; a symmetric pair must count once whichever sweep it is in."""
    given = make(plan, 450, 310, 40)
    b = None if given.b is None else given.b * 30
    given = with_thresholds(replace(given, a=given.a * 30, b=b, scale=torch.tensor(1.0), norm_bound=None))
    check(plan, given, statistics_error=1e-4, product_error=1e-3)


@EACH_DTYPE
@EACH_PLAN
def test_bits_do_not_depend_on_threads(plan: Plan, dtype: torch.dtype) -> None:
    given = make(plan, 1500, 900, 64, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            statistics = cpu.statistics(plan, given)
            incoming = Statistics(*(torch.ones_like(v) for v in statistics))
            products = cpu.gradient(plan, given, statistics, incoming, True, True)
            results.append([*statistics, *(p for p in products if p is not None)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("scale", [10.0, 300.0])
def test_rows_that_admit_nothing(scale: float) -> None:
    """Where the shift can't lose a logit, an empty row isn't looked at twice; nor does it weigh anything anywhere."""
    plan = Plan((Term(Reduce.LSE, Mask(label=True)), Term(Reduce.MAX, Mask(label=True)), Term(Reduce.LSE)))
    given = make(plan, 200, 150, 12, scale=scale)
    given = replace(given, row_tags=given.row_tags._replace(labels=torch.arange(200)))
    given = replace(given, column_tags=given.column_tags._replace(labels=torch.arange(0, 300, 2)))
    rows, _ = check(plan, given)
    empty = torch.arange(200) % 2 == 1
    assert (rows[:2] == -torch.inf).equal(empty.expand(2, 200))
    only_first = Statistics(torch.ones_like(rows) * torch.tensor([[1.0], [0.0], [0.0]]), torch.zeros(0, 150))
    product, _ = cpu.gradient(plan, given, Statistics(rows, torch.zeros(0, 150)), only_first, True, False)
    assert (product[empty] == 0).all()


@pytest.mark.parametrize("width", [0, 1, 3, 2**40])
def test_labels_anywhere(width: int) -> None:
    """Ranks stand for labels of which neither the values nor the differences fit into 64 bits."""
    lowest, highest = -(2**63), 2**63 - 1
    rows = [lowest, lowest + 1, lowest + 3, lowest + width, -1, 0, 2, 5, 2**40, 2**41, highest - width, highest]
    columns = [highest, highest - 2, 2**40 + 2, 3, 1, -4, lowest + 2, lowest]
    near = torch.tensor([[abs(x - y) <= width for y in columns] for x in rows])
    plan = Plan((Term(Reduce.SUM, Mask(label=True)), Term(Reduce.SUM, Mask(label=True), COLUMNS)), label_width=width)
    given = Operands(torch.ones(len(rows), 1), torch.ones(len(columns), 1), torch.tensor(1.0), None, 1.0)
    given = replace(given, row_tags=Tags(torch.tensor(rows)), column_tags=Tags(torch.tensor(columns)))
    along_rows, along_columns = cpu.statistics(plan, given)
    assert along_rows[0].equal(near.sum(1).float())
    assert along_columns[0].equal(near.sum(0).float())


IN_ONE_SWEEP = {
    "id": Plan((Term(Reduce.LSE, Mask(target=False, id=False)), Term(Reduce.SUM, Mask(target=True)))),
    "above": Plan((Term(Reduce.SUM, Mask(self_pair=True)), Term(Reduce.LSE, Mask(self_pair=False, above=False)))),
    "maximum": Plan((Term(Reduce.LSE, Mask(id=False)), Term(Reduce.MAX, Mask(above=False)))),
    "unmasked maximum": Plan((Term(Reduce.MAX), Term(Reduce.LSE, Mask(above=False, label=False)))),
}
IN_TWO_SWEEPS = {
    "both axes": Plan(
        (
            Term(Reduce.LSE, Mask(self_pair=False, above=False)),
            Term(Reduce.LSE, Mask(self_pair=False, above=False), COLUMNS),
            Term(Reduce.SUM, Mask(self_pair=True)),
        )
    ),
    "symmetric": Plan(
        (Term(Reduce.LSE, Mask(self_pair=False, target=False, above=False)), Term(Reduce.SUM, Mask(target=True))),
        symmetric=True,
    ),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("name", IN_ONE_SWEEP | IN_TWO_SWEEPS)
def test_cross_entropy(monkeypatch, name: str, far: bool, level: str) -> None:
    monkeypatch.setenv("FASTCL_CPU_LEVEL", level)
    plan = (IN_ONE_SWEEP | IN_TWO_SWEEPS)[name]
    given = make(plan, 420, 420 if plan.columns else 560, 33, scale=100.0 if far else 10.0)
    target = (torch.arange(420) * 7 + 3) % given.shape[1]
    if far:
        given.a[::3] = given.a[0] + 0.1 * given.a[::3]
        if given.b is not None:
            given.b[:] = -given.a[0] + 0.1 * given.b
    given = with_thresholds(replace(given, target=target, norm_bound=None))
    has_sum = any(term.reduce is Reduce.SUM for term in plan.terms)
    weights = torch.rand(420)
    weights[::5] = 0.0
    head = CrossEntropy(None if has_sum else torch.randn(420), weights)
    needs = Needs(True, not plan.symmetric, True, not has_sum)
    found = cpu.cross_entropy(plan, given, head, needs)
    positive = None if has_sum else head.positive.double()
    exact = dense.cross_entropy(plan, wide(given), CrossEntropy(positive, weights.double()), needs)
    tolerance = 1e-4 if far else 2e-5
    assert relative_error(found.loss, exact.loss) <= tolerance
    for x, y in zip(found.statistics, exact.statistics, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-4)
    got, want = ((*result.gradients, result.positive) for result in (found, exact))
    for key, x, y in zip(needs._fields, got, want, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert relative_error(x, y) <= tolerance * (20 if key == "scale" else 1), key
