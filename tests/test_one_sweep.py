"""Value and gradients of a softmax loss from one operator, on every backend: what the losses' own tests don't reach.

Those are shapes that make several panels, rows that the fixed shift loses, rows without weight, positives from outside,
and every combination of wanted gradients. The judge is the definition in float64, with autograd's gradients.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastcl.backends import cpu
from fastcl.engine import BACKENDS
from fastcl.terms import Axis, CrossEntropy, LossAndGradients, Mask, Needs, Operands, Plan, Reduce, Term
from tests.cases import available_backends, relative_error

NEGATIVES = Mask(self_pair=False, target=False)
ALONG_ROWS = Plan(
    (Term(Reduce.LSE, NEGATIVES), Term(Reduce.SUM, Mask(target=True)), Term(Reduce.MAX, Mask(target=False)))
)
NOT_TARGET = Plan((Term(Reduce.SUM, Mask(target=True)), Term(Reduce.LSE, Mask(target=False))))
NO_POSITIVE = Plan((Term(Reduce.LSE),))
BOTH_WAYS = Plan(
    (
        Term(Reduce.LSE, NEGATIVES),
        Term(Reduce.LSE, Mask(self_pair=False), Axis.COLUMN),
        Term(Reduce.SUM, Mask(target=True)),
    )
)
SYMMETRIC = Plan((Term(Reduce.LSE, NEGATIVES), Term(Reduce.SUM, Mask(target=True))), symmetric=True)
PLANS = {
    "along-rows": ALONG_ROWS,
    "not-target": NOT_TARGET,
    "no-positive": NO_POSITIVE,
    "both-ways": BOTH_WAYS,
    "symmetric": SYMMETRIC,
}
EACH_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
EACH_BACKEND = pytest.mark.parametrize("backend", available_backends())


def make(plan: Plan, n: int, m: int, depth: int, dtype=torch.float32, *, scale=10.0, normalize=True):
    generator = torch.Generator().manual_seed(n + 7 * m)
    if plan.symmetric or plan.columns:
        m = n
    a, b = (torch.randn(rows, depth, generator=generator) for rows in (n, m))
    b[: min(n, m)] += a[: min(n, m)]
    target = (torch.arange(n) * 7 + 3) % m
    operands = Operands(
        a.to(dtype), None if plan.symmetric else b.to(dtype), torch.tensor(scale), target, 1.0 if normalize else None
    )
    has_sum = any(term.reduce is Reduce.SUM for term in plan.terms)
    positive = None if has_sum else torch.randn(n, generator=generator)
    weights = torch.rand(n, generator=generator)
    weights[::5] = 0.0
    return operands, CrossEntropy(positive, weights, mean=True, normalize=normalize)


def judge(plan: Plan, operands: Operands, head: CrossEntropy) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients in float64, from the definition."""
    inputs = {"a": operands.a, "b": operands.keys, "scale": operands.scale, "positive": head.positive}
    wide = {name: x.double().requires_grad_() for name, x in inputs.items() if x is not None}
    if plan.symmetric:
        wide["b"] = wide["a"]
    x, y = wide["a"], wide["b"]
    if head.normalize:
        x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    logits = wide["scale"] * x @ y.T
    n, m = logits.shape
    is_self, is_target = torch.eye(n, m, dtype=torch.bool), operands.target[:, None] == torch.arange(m)
    losses, positive = [], wide.get("positive")
    if positive is None:
        positive = logits.gather(1, operands.target[:, None])[:, 0]
    for term in plan.terms:
        if term.reduce is not Reduce.LSE:
            continue
        admitted = torch.ones(n, m, dtype=torch.bool)
        for test, outcome in ((term.mask.self_pair, is_self), (term.mask.target, is_target)):
            if test is not None:
                admitted &= outcome == test
        value = logits.masked_fill(~admitted, -math.inf).logsumexp(1 if term.axis is Axis.ROW else 0)
        losses.append(torch.nn.functional.softplus(value - positive, threshold=800))
    loss = (torch.stack(losses).mean(0) * head.weights.double()).sum() / n
    names = [name for name in wide if not (plan.symmetric and name == "b")]
    gradients = torch.autograd.grad(loss, [wide[name] for name in names])
    return loss.detach(), dict(zip(names, gradients, strict=True))


def found_gradients(found: LossAndGradients) -> dict[str, Tensor]:
    named = {**found.gradients._asdict(), "positive": found.positive}
    return {name: x for name, x in named.items() if x is not None}


def check(plan: Plan, operands: Operands, head: CrossEntropy, backend: str, tolerance: float = 2e-5) -> None:
    needs = Needs(True, not plan.symmetric, True, head.positive is not None)
    assert BACKENDS[backend].supports(plan, operands) is None
    found = BACKENDS[backend].cross_entropy(plan, operands, head, needs)
    loss, gradients = judge(plan, operands, head)
    assert relative_error(found.loss, loss) <= tolerance
    got = found_gradients(found)
    assert got.keys() == gradients.keys()
    for name, exact in gradients.items():
        assert got[name].shape == exact.shape
        # The scale's is a sum of as many numbers of both signs as there are pairs.
        assert relative_error(got[name], exact) <= tolerance * (20 if name == "scale" else 1), name
    separate = BACKENDS[backend].statistics(plan, Operands(*normalized(operands, head)))
    for one, other in zip(found.statistics, separate, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if operands.a.dtype is torch.float32 else 3e-1)


def normalized(operands: Operands, head: CrossEntropy) -> tuple:
    def unit(x: Tensor | None) -> Tensor | None:
        return torch.nn.functional.normalize(x.float(), dim=1).to(x.dtype) if head.normalize and x is not None else x

    return unit(operands.a), unit(operands.b), operands.scale, operands.target, operands.norm_bound


@EACH_BACKEND
@EACH_PLAN
@pytest.mark.parametrize(("n", "m", "depth"), [(1, 2, 1), (5, 3, 7), (460, 1100, 33), (1300, 40, 5), (97, 97, 300)])
def test_agrees_with_the_definition(plan: Plan, n: int, m: int, depth: int, backend: str) -> None:
    check(plan, *make(plan, n, m, depth), backend)


@EACH_BACKEND
@EACH_PLAN
def test_rows_that_the_fixed_shift_loses(plan: Plan, backend: str) -> None:
    """At scale 100, a row whose candidates are all opposite to it lies 200 below the bound that sets the shift."""
    operands, head = make(plan, 700, 500, 16, scale=100.0)
    operands.a[::3] = operands.a[0] + 0.1 * operands.a[::3]
    if operands.b is not None:
        operands.b[:] = -operands.a[0] + 0.1 * operands.b
    check(plan, operands, head, backend, tolerance=1e-4)


@EACH_BACKEND
@EACH_PLAN
def test_rows_of_large_norm(plan: Plan, backend: str) -> None:
    operands, head = make(plan, 500, 300, 24, scale=1.0, normalize=False)
    operands.a.mul_(torch.linspace(0.01, 6.0, len(operands.a))[:, None])
    check(plan, operands, head, backend, tolerance=1e-4)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@EACH_PLAN
@pytest.mark.parametrize("level", cpu.levels() if cpu.unavailable() is None else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_level(plan: Plan, level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CPU_LEVEL", level)
    # Rounded once before normalisation and once after.
    check(plan, *make(plan, 403, 301, 77, dtype), "cpu", 2e-5 if dtype is torch.float32 else 1e-2)


@EACH_BACKEND
@EACH_PLAN
def test_any_combination_of_gradients(plan: Plan, backend: str) -> None:
    operands, head = make(plan, 300, 210, 9)
    everything = Needs(True, not plan.symmetric, True, head.positive is not None)
    full = found_gradients(BACKENDS[backend].cross_entropy(plan, operands, head, everything))
    for flags in itertools.product((False, True), repeat=4):
        needs = Needs(*(want and can for want, can in zip(flags, everything, strict=True)))
        found = found_gradients(BACKENDS[backend].cross_entropy(plan, operands, head, needs))
        assert found.keys() == {name for name, need in needs._asdict().items() if need}
        for name, x in found.items():
            torch.testing.assert_close(x, full[name], rtol=1e-4, atol=1e-6)


@EACH_BACKEND
@EACH_PLAN
def test_a_row_without_weight_has_no_say(plan: Plan, backend: str) -> None:
    operands, head = make(plan, 40, 30, 6)
    ignored = head.weights == 0
    found = BACKENDS[backend].cross_entropy(plan, operands, head, Needs(True, False, True))
    if not plan.symmetric and not plan.columns:
        assert (found.gradients.a[ignored] == 0).all()
    assert found.loss.isfinite()


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@EACH_PLAN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(plan: Plan, dtype: torch.dtype) -> None:
    operands, head = make(plan, 1500, 900, 64, dtype)
    needs = Needs(True, not plan.symmetric, True, head.positive is not None)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 2):
            torch.set_num_threads(count)
            found = cpu.cross_entropy(plan, operands, head, needs)
            results.append([found.loss, *found.statistics, *found_gradients(found).values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)
