"""The operators as torch sees them: gradcheck, opcheck, compile, autocast, partial gradients, no second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.cross_entropy import Options
from fastcl.terms import Mask, Needs, Plan, Reduce, Term
from tests.cases import available_backends, each_loss_and_backend, make_features
from tests.losses import LOSSES, Loss


@each_loss_and_backend([loss for loss in LOSSES if not loss.detached], without=("cpu",))
def test_gradcheck(loss: Loss, backend: str | None) -> None:
    features = make_features(loss, 5, 3, torch.float64)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand_like(loss.call(features, tau).detach())

    def weighted(*inputs: Tensor) -> Tensor:
        return (loss.call(inputs[:-1], inputs[-1], backend=backend) * weights).sum()

    assert torch.autograd.gradcheck(weighted, (*features, tau))
    for reduction in ("mean", "sum"):
        one = functools.partial(loss.call, backend=backend, reduction=reduction)
        assert torch.autograd.gradcheck(lambda *x, one=one: 3.0 * one(x[:-1], x[-1]), (*features, tau))


PLANS = {
    "symmetric": Plan(
        (Term(Reduce.LSE, Mask(self_pair=False, target=False)), Term(Reduce.SUM, Mask(target=True))), symmetric=True
    ),
    "general": Plan(
        (
            Term(Reduce.LSE, Mask(self_pair=False)),
            Term(Reduce.LSE, Mask(self_pair=False), fastcl.Axis.COLUMN),
            Term(Reduce.SUM, Mask(self_pair=True)),
        )
    ),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("backend", available_backends())
def test_opcheck(plan: Plan, backend: str) -> None:
    a = torch.randn(6, 4, requires_grad=True)
    b = None if plan.symmetric else torch.randn(6, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    target = torch.tensor([3, 4, 5, 0, 1, 2])
    no_tags = [None] * 6
    arguments = (a, b, scale, target, no_tags, plan.encode(), None, 0, 0, backend)
    torch.library.opcheck(torch.ops.fastcl.pairwise_statistics, arguments)

    rows, columns = (x.detach() for x in torch.ops.fastcl.pairwise_statistics(*arguments))
    a, b, scale = a.detach(), None if b is None else b.detach(), scale.detach()
    grads = (torch.randn_like(rows), torch.randn_like(columns))
    options = (plan.encode(), None, 0, 0, True, not plan.symmetric, True, backend)
    arguments = (a, b, scale, target, no_tags, rows, columns, *grads, *options)
    torch.library.opcheck(torch.ops.fastcl.pairwise_gradient, arguments)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("backend", available_backends())
def test_opcheck_of_the_softmax_operator(plan: Plan, backend: str) -> None:
    a = torch.randn(6, 4, requires_grad=True)
    b = None if plan.symmetric else torch.randn(6, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    target = torch.tensor([3, 4, 5, 0, 1, 2])
    needs = Needs(True, not plan.symmetric, True)
    options = Options(plan, mean=True, normalize=True, norm_bound=None, needs=needs, backend=backend)
    assert Options.decode(options.encode()) == options
    arguments = (a, b, scale, target, None, torch.rand(6), options.encode(), [None] * 6)
    # The gradients that are made with the value are not for a caller to differentiate, as the check would do.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fastcl.cross_entropy, arguments, test_utils=checks)


ONE_OF_EACH = (
    *("nt_xent", "info_nce", "clip", "sup_con_out", "dcl", "macl", "debiased", "hard_negative", "siglip", "binary_nce"),
    *("ranking_every_direction", "clip_distillation", "alpha_cl_softmax", "spectral_duplicates", "contrastive"),
    *("triplet_all", "lifted_structure", "info_nce_own_negatives"),
)
"""losses whose backward graphs are traced as well; what an option adds breaks a forward graph or none"""


@pytest.mark.parametrize(
    ("loss", "reduction", "compiler"),
    [
        pytest.param(loss, reduction, compiler, id=f"{loss.name}-{reduction}-{compiler}")
        for loss in LOSSES
        for reduction in (("none", "mean") if loss.name in ("nt_xent", "info_nce", "clip") else ("mean",))
        for compiler in ["aot_eager" if loss.name in ONE_OF_EACH else "eager"]
    ],
)
def test_compiles_without_graph_breaks_for_any_batch(loss: Loss, reduction: str, compiler: str) -> None:
    torch._dynamo.reset()

    def step(features: list[Tensor], tau: Tensor) -> Tensor:
        return loss.call(features, tau, reduction=reduction).mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for pairs in (16, 24, 40):
        features = make_features(loss, pairs, 12, torch.float32)
        tau = torch.tensor(0.2, requires_grad=True)
        inputs = [*features, tau]
        expected, got = step(features, tau), compiled(features, tau)
        torch.testing.assert_close(got, expected)
        for x, y in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(x, y)


def test_compiles_with_a_float_temperature() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fastcl.nt_xent, fullgraph=True, backend="aot_eager")
    z1, z2 = torch.randn(2, 10, 6)
    for tau in (0.5, 0.25):
        torch.testing.assert_close(compiled(z1, z2, tau), fastcl.nt_xent(z1, z2, tau))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "call", [fastcl.nt_xent, fastcl.info_nce, lambda x, y, tau, **o: fastcl.clip_loss(x, y, 1 / tau, **o)]
)
def test_autocast_lowers_the_features_only(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in torch.randn(2, 40, 16))
    tau = torch.tensor(0.07)
    with torch.autocast("cpu", dtype=dtype):
        got = call(x, y, tau, normalize=False)
    assert got.dtype is torch.float32
    lowered = [z.to(dtype).float() for z in (x, y)]
    torch.testing.assert_close(got, call(*lowered, tau, normalize=False), rtol=1e-5, atol=1e-6)
    # 1 / 0.07 = 14.2857 is 14.3125 in bfloat16: a scale that was lowered would show.
    wrong = call(*lowered, torch.tensor(1 / 14.3125), normalize=False)
    assert (got - wrong).abs() > 1e-4


def test_autocast_leaves_float64_alone() -> None:
    x, y = torch.randn(2, 9, 4, dtype=torch.float64)
    expected = fastcl.nt_xent(x, y, 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fastcl.nt_xent(x, y, 0.2)
    assert got.dtype is torch.float64
    assert torch.equal(got, expected)


@each_loss_and_backend()
def test_any_subset_of_inputs(loss: Loss, backend: str | None) -> None:
    features = make_features(loss, 20, 7, torch.float32)
    tau = torch.tensor(0.2, requires_grad=True)
    inputs = [*features, tau]
    full = torch.autograd.grad(loss.call(features, tau, backend=backend).mean(), inputs)
    for k in range(len(inputs)):
        alone = [x.detach().requires_grad_(i == k) for i, x in enumerate(inputs)]
        for reduction in ("none", "mean"):
            value = loss.call(alone[:-1], alone[-1], backend=backend, reduction=reduction).mean()
            torch.testing.assert_close(torch.autograd.grad(value, alone[k])[0], full[k], rtol=1e-4, atol=1e-7)


def test_gradient_that_nobody_asked_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcl.backends import tiled

    asked: list[tuple[bool, bool]] = []
    original: Callable = tiled.gradient

    def spy(*args):
        asked.append(args[-2:])
        return original(*args)

    monkeypatch.setattr(tiled, "gradient", spy)
    a, b = torch.randn(2, 8, 4)
    for needs_a, needs_b in ((True, False), (False, True), (True, True)):
        x, y = a.clone().requires_grad_(needs_a), b.clone().requires_grad_(needs_b)
        fastcl.clip_loss(x, y, 5.0, backend="tiled").backward()
        assert asked.pop() == (needs_a, needs_b)
    assert not fastcl.clip_loss(a, b, 5.0, backend="tiled").requires_grad
    assert not asked


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.passes], ids=lambda loss: loss.name)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivative_raises(loss: Loss, reduction: str) -> None:
    features = make_features(loss, 6, 4, torch.float32)
    value = loss.call(features, 0.5, reduction=reduction).mean()
    first = torch.autograd.grad(value, features[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(first.square().sum(), features[0])


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.one_operator], ids=lambda loss: loss.name)
def test_functional_gradient(loss: Loss) -> None:
    """torch.func, whose gradients are graphs themselves."""
    features = make_features(loss, 12, 5, torch.float32)
    tau = torch.tensor(0.5, requires_grad=True)
    expected = torch.autograd.grad(loss.call(features, tau, reduction="mean"), features[0])[0]
    others = [x.detach() for x in features[1:]]
    got = torch.func.grad(lambda x: loss.call([x, *others], tau.detach(), reduction="mean"))(features[0].detach())
    torch.testing.assert_close(got, expected)
