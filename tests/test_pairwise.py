"""The primitive with any mask, offset, bias and axis, against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastcl import Axis, Mask, Reduce, Term, pairwise
from fastcl.engine import BACKENDS
from fastcl.terms import NO_TAGS, Operands, Plan, Tags
from tests.cases import available_backends

MASKS = [Mask(*tests) for tests in itertools.product((None, True, False), repeat=2)]
N, M, D, ROW0, COL0 = 13, 11, 5, 4, 6


def definition(
    term: Term,
    logits: Tensor,
    target: Tensor,
    row0: int,
    col0: int,
    tags: Tags = NO_TAGS,
    key_tags: Tags = NO_TAGS,
    label_width: int = 0,
) -> Tensor:
    i = torch.arange(logits.shape[0])[:, None] + row0
    j = torch.arange(logits.shape[1])[None, :] + col0
    admits = torch.ones_like(logits, dtype=torch.bool)
    if term.mask.self_pair is not None:
        admits &= (i == j) == term.mask.self_pair
    if term.mask.target is not None:
        admits &= (target[:, None] == j) == term.mask.target
    if term.mask.label is not None:
        admits &= ((tags.labels[:, None] - key_tags.labels).abs() <= label_width) == term.mask.label
    if term.mask.id is not None:
        admits &= (tags.ids[:, None] == key_tags.ids) == term.mask.id
    if term.mask.above is not None:
        threshold = tags.threshold[:, None] if term.axis is Axis.ROW else key_tags.threshold
        admits &= (logits > threshold) == term.mask.above
    dim = 1 if term.axis is Axis.ROW else 0
    if term.reduce is Reduce.SUM:
        return logits.where(admits, 0.0).sum(dim)
    masked = logits.masked_fill(~admits, -math.inf)
    return masked.logsumexp(dim) if term.reduce is Reduce.LSE else masked.amax(dim)


def supported(terms: list[Term], symmetric: bool, backend: str) -> str | None:
    x = torch.randn(2, 2)
    plan = Plan(tuple(terms), symmetric=symmetric)
    operands = Operands(x, None if symmetric else x, torch.tensor(1.0), torch.zeros(2, dtype=torch.int64))
    return BACKENDS[backend].supports(plan, operands)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"self={mask.self_pair},target={mask.target}")
@pytest.mark.parametrize("reduce", list(Reduce), ids=lambda reduce: reduce.value)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_term(reduce: Reduce, mask: Mask, symmetric: bool, backend: str) -> None:
    terms = [Term(reduce, mask)] if symmetric else [Term(reduce, mask), Term(reduce, mask, Axis.COLUMN)]
    assert supported(terms, symmetric, backend) is None
    a = torch.randn(N, D, requires_grad=True)
    b = None if symmetric else torch.randn(M, D, requires_grad=True)
    scale, bias = torch.tensor(1.7, requires_grad=True), torch.tensor(-0.3, requires_grad=True)
    row0 = col0 = 2
    if not symmetric:
        row0, col0 = ROW0, COL0
    # Not an involution, and with indices that name no key.
    target = (torch.arange(N) * 5 + 1) % (N + 3) + col0 - 1

    got = pairwise(a, b, terms, scale, bias, target=target, row0=row0, col0=col0, backend=backend)
    logits = scale.double() * a.double() @ (a if b is None else b).double().T + bias.double()
    want = [definition(term, logits, target, row0, col0) for term in terms]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    if reduce is Reduce.MAX:
        assert not got[0].requires_grad
        return
    weights = [torch.rand_like(x) for x in want]

    def loss(statistics) -> Tensor:
        return sum((w * x.masked_fill(x == -math.inf, 0.0)).sum() for w, x in zip(weights, statistics, strict=True))

    inputs = [x for x in (a, b, scale, bias) if x is not None]
    for x, y in zip(torch.autograd.grad(loss(got), inputs), torch.autograd.grad(loss(want), inputs), strict=True):
        torch.testing.assert_close(x, torch.nan_to_num(y), rtol=1e-4, atol=1e-4)


TAG_MASKS = [
    Mask(label=True),
    Mask(label=False, self_pair=False),
    Mask(label=True, self_pair=False, id=False),
    Mask(id=False, target=False),
    Mask(id=True, above=True),
    Mask(above=True, self_pair=False),
    Mask(above=False, target=False, label=False),
]


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("label_width", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mask", TAG_MASKS, ids=Mask.encode)
def test_masks_that_test_tags(mask: Mask, symmetric: bool, label_width: int, backend: str) -> None:
    terms = [Term(reduce, mask, axis) for reduce in Reduce for axis in (Axis if not symmetric else (Axis.ROW,))]
    if reason := supported(terms, symmetric, backend):
        pytest.skip(f"{backend}: {reason}")
    generator = torch.Generator().manual_seed(3)

    def draw_tags(rows: int) -> Tags:
        # Large numbers, so that a narrower type would show, and a label that only one row has.
        labels = torch.randint(4, (rows,), generator=generator) + 2**40
        labels[0] = 7
        return Tags(labels, torch.randint(5, (rows,), generator=generator), torch.randn(rows, generator=generator))

    n, m = 150, 70
    tags = draw_tags(n)
    key_tags = tags if symmetric else draw_tags(m)
    a = torch.randn(n, D, generator=generator).requires_grad_()
    b = None if symmetric else torch.randn(m, D, generator=generator).requires_grad_()
    target = (torch.arange(n) * 5 + 1) % (n if symmetric else m)
    options = {} if symmetric else {"key_tags": key_tags}
    got = pairwise(a, b, terms, 0.7, target=target, tags=tags, label_width=label_width, backend=backend, **options)
    logits = 0.7 * a.double() @ (a if b is None else b).double().T
    want = [definition(term, logits, target, 0, 0, tags, key_tags, label_width) for term in terms]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)

    def loss(statistics) -> Tensor:
        kept = (x for x, term in zip(statistics, terms, strict=True) if term.reduce is not Reduce.MAX)
        return sum((x.masked_fill(x == -math.inf, 0.0) * torch.arange(len(x))).sum() for x in kept)

    inputs = [x for x in (a, b) if x is not None]
    for x, y in zip(torch.autograd.grad(loss(got), inputs), torch.autograd.grad(loss(want), inputs), strict=True):
        torch.testing.assert_close(x, torch.nan_to_num(y), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", available_backends())
def test_several_log_sum_exps_in_one_plan(backend: str) -> None:
    terms = [
        Term(Reduce.LSE),
        Term(Reduce.LSE, Mask(self_pair=False)),
        Term(Reduce.LSE, Mask(target=True), Axis.COLUMN),
        Term(Reduce.MAX, Mask(target=False)),
        Term(Reduce.LSE, Mask(target=False), Axis.COLUMN),
    ]
    if reason := supported(terms, False, backend):
        pytest.skip(f"{backend}: {reason}")
    a, b = torch.randn(40, 9, requires_grad=True), torch.randn(33, 9, requires_grad=True)
    target = torch.arange(40) % 33
    got = pairwise(a, b, terms, 2.0, target=target, backend=backend)
    want = [definition(term, 2.0 * a.double() @ b.double().T, target, 0, 0) for term in terms]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    grads = [
        torch.autograd.grad(sum((k + 1) * x.sum() for k, x in enumerate(s) if x.requires_grad), (a, b))
        for s in (got, [*want[:3], want[3].detach(), *want[4:]])
    ]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_plan_round_trip() -> None:
    plan = Plan(tuple(Term(r, m, x) for r in Reduce for m in MASKS + TAG_MASKS for x in Axis), label_width=3)
    assert Plan.decode(plan.encode()) == plan
    assert Plan.decode(Plan((Term(Reduce.LSE),), symmetric=True).encode()).symmetric


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: pairwise(x, None, [Term(Reduce.LSE, axis=Axis.COLUMN)]), "terms must lie along rows"),
        (lambda x: pairwise(x, x, [Term(Reduce.LSE, Mask(target=True))]), "target must be given"),
        (lambda x: pairwise(x, x, [Term(Reduce.LSE, Mask(id=True))], tags=Tags(ids=torch.arange(3))), "key_tags.ids"),
        (lambda x: pairwise(x, None, [Term(Reduce.LSE, Mask(label=True))], tags=Tags(torch.arange(2))), "tags.labels"),
        (lambda x: pairwise(x, x, []), "at least one Term"),
        (lambda x: pairwise(x, None, [Term(Reduce.LSE)], row0=1), "row0 and col0 must be equal"),
        (lambda x: pairwise(x, x, [Term(Reduce.LSE)], scale=x), "scale must be a float or a 0-d tensor"),
    ],
)
def test_bad_plans(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.randn(3, 2))
