"""The Triton kernels under masks that test labels, ids and thresholds, interpreted, against float64.

Started by ``test_triton_interpreter.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastcl import tuning
from fastcl.backends import dense, triton
from fastcl.terms import Axis, Mask, Operands, Plan, Reduce, Statistics, Tags, Term
from tests.test_triton_interpreter import IN_PIECES, SMALL_TILES, check, exact, interpreted, make_operands

LSE, SUM, MAX = Reduce.LSE, Reduce.SUM, Reduce.MAX

NEGATIVES, POSITIVES, OTHERS = Mask(label=False), Mask(label=True), Mask(label=True, self_pair=False)
NOT_ABOVE = Mask(self_pair=False, id=False, above=False)
PLANS = {
    "sup_con": Plan((Term(LSE, NEGATIVES), Term(LSE, OTHERS), Term(SUM, OTHERS), Term(MAX, OTHERS)), symmetric=True),
    "nt_xent": Plan(
        (Term(LSE, Mask(self_pair=False, target=False, id=False, above=False)), Term(SUM, Mask(target=True))),
        symmetric=True,
    ),
    "clip, labels": Plan(
        tuple(Term(r, m, x) for x in Axis for r, m in ((LSE, NEGATIVES), (LSE, POSITIVES), (SUM, POSITIVES)))
    ),
    "clip, thresholds": Plan((*(Term(r, NOT_ABOVE, x) for x in Axis for r in (LSE, MAX)), Term(SUM, Mask(True)))),
    "info_nce": Plan((Term(LSE, Mask(target=False, id=False)), Term(LSE, NOT_ABOVE), Term(SUM, Mask(target=True)))),
    "what is required": Plan(
        (
            Term(LSE, Mask(above=True)),
            Term(LSE, Mask(id=True, above=True), Axis.COLUMN),
            Term(SUM, Mask(target=True, label=True)),
            Term(SUM, Mask(above=True, label=False), Axis.COLUMN),
        )
    ),
}
LABELS = torch.tensor([-(2**62), 1 - 2**62, -7, -6, 0, 2**40, 2**40 + 2])
"""Some are neighbours, some differ in the high half alone."""


@pytest.fixture(autouse=True)
def small_panels(poisoned_memory: None) -> Iterator[None]:
    with tuning.override(SMALL_TILES, workspace_bytes=4 * 32 * 48):
        yield


def with_tags(operands: Operands) -> Operands:
    """Random tags; the first row's label is nobody else's."""
    generator = torch.Generator().manual_seed(5)

    def draw(rows: int) -> Tags:
        labels = LABELS[torch.randint(len(LABELS), (rows,), generator=generator)]
        ids = torch.randint(-2, 3, (rows,), generator=generator) * 2**32
        return Tags(labels, ids, torch.randn(rows, generator=generator) * operands.scale / 5)

    n, m = operands.shape
    row_tags, column_tags = draw(n), draw(m)
    row_tags.labels[0] = 2**50
    return replace(operands, row_tags=row_tags, column_tags=Tags() if operands.b is None else column_tags)


@interpreted
@pytest.mark.parametrize("width", [0, 1])
@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, width: int) -> None:
    """Tiles of one piece, over the edge and within, in several super-tiles and panels."""
    plan = replace(PLANS[name], label_width=width)
    if width and not plan.tests("label"):
        return
    check(plan, with_tags(make_operands(plan, 45, 45 if plan.symmetric else 37)))


@interpreted
@pytest.mark.parametrize("name", ["sup_con", "nt_xent", "clip, labels", "clip, thresholds"])
def test_tiles_with_and_without_pairs(name: str) -> None:
    """Most tiles hold neither a self pair nor a target, and some are made in pieces because they do."""
    plan = PLANS[name]
    with tuning.override(IN_PIECES, workspace_bytes=4 * 32 * 64):
        operands = make_operands(plan, 64, 64 if plan.symmetric else 70)
        if plan.tests("target"):
            operands = replace(operands, target=(torch.arange(64) + 32) % 64)
        check(plan, with_tags(operands))


@interpreted
@pytest.mark.parametrize("name", ["sup_con", "clip, labels", "clip, thresholds"])
def test_rows_that_the_fixed_shift_loses(name: str) -> None:
    """Rows and columns that lie 200 below the bound, some of them with nothing admitted."""
    plan = PLANS[name]
    operands = make_operands(plan, 45, 45 if plan.symmetric else 37, scale=100.0)
    one_way = torch.nn.functional.normalize(operands.a[:1] + 0.02 * operands.keys, dim=1)
    other_way = one_way.clone()
    other_way[3::7] = -one_way[3::7]
    a = other_way if plan.symmetric else torch.nn.functional.normalize(operands.a[:1] + 0.02 * operands.a, dim=1)
    operands = with_tags(replace(operands, a=a, b=None if plan.symmetric else other_way))
    statistics = dense.statistics(plan, exact(operands))
    assert any((x[x.isfinite()] < -90).any() for x in (*statistics.rows, *statistics.columns))
    check(plan, operands, gradient_tolerance=5e-5)


@interpreted
@pytest.mark.parametrize("n", [32, 31])
@pytest.mark.parametrize("axis", Axis)
def test_a_pair_that_rounding_moved_over_the_threshold(axis: Axis, n: int) -> None:
    """The forward left out a pair whose exponential would dwarf all others; in the backward it weighs at most 1."""
    plan = Plan((Term(LSE, Mask(above=False), axis),))
    a = torch.eye(n, 40)
    threshold = torch.full((n,), 50.0)
    operands = Operands(a, a.clone(), torch.tensor(100.0), row_tags=Tags(threshold=threshold), norm_bound=1.0)
    operands = replace(operands, column_tags=operands.row_tags)
    statistics = triton.statistics(plan, operands)
    torch.testing.assert_close(torch.cat(tuple(statistics)), torch.full((1, n), math.log(n - 1)))
    moved = Tags(threshold=threshold + 100.0)
    moved = replace(operands, row_tags=moved, column_tags=moved)
    incoming = Statistics(*(torch.ones_like(x) for x in statistics))
    products = triton.gradient(plan, moved, statistics, incoming, True, True)
    for x in products:
        torch.testing.assert_close(x.diagonal(), torch.ones(n))


@interpreted
def test_float16() -> None:
    for name in ("sup_con", "clip, labels"):
        plan = PLANS[name]
        operands = with_tags(make_operands(plan, dtype=torch.float16))
        got, want = triton.statistics(plan, operands), dense.statistics(plan, exact(operands))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-3)
