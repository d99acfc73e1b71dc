"""Where naive formulas break: each test also shows that the naive rule would fail it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import engine
from fastcl.backends.shift import fixed_shift
from fastcl.losses.clip import reference as clip_reference
from fastcl.losses.info_nce import reference as info_nce_reference
from fastcl.losses.nt_xent import reference as nt_xent_reference
from fastcl.terms import Needs, Operands, Plan, Statistics
from tests.cases import available_backends, relative_error, seed_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKENDS = pytest.mark.parametrize("backend", available_backends())


def unit(rows: int, dim: int, *key: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(rows, dim, *key))
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


@BACKENDS
@pytest.mark.parametrize(("scale", "dim", "noise"), [(20.0, 64, 0.02), (50.0, 16, 0.05), (100.0, 16, 0.05)])
def test_no_cancellation_once_training_works(backend: str, scale: float, dim: int, noise: float) -> None:
    x = unit(1024, dim, "cancellation")
    y = torch.nn.functional.normalize(x + noise * unit(1024, dim, "noise"), dim=1)
    z = torch.cat((x, y)).requires_grad_()
    exact_z = z.detach().double().requires_grad_()

    exact = gradient(nt_xent_reference(exact_z[:1024], exact_z[1024:], 1 / scale, normalize=False).mean(), exact_z)
    got = gradient(fastcl.nt_xent(z[:1024], z[1024:], 1 / scale, normalize=False, backend=backend), z)
    assert relative_error(got, exact) < 2e-5

    logits = (z @ z.T * scale).fill_diagonal_(-math.inf)
    everything_minus_positive = logits.logsumexp(1) - logits.gather(1, torch.arange(2048).roll(1024)[:, None])[:, 0]
    assert relative_error(gradient(everything_minus_positive.mean(), z), exact) > 1e-3


@BACKENDS
@pytest.mark.parametrize("scale", [10.0, 100.0, 300.0])
def test_all_equal_rows(backend: str, scale: float) -> None:
    """Every logit sits at the bound: a shift that leaves too little headroom overflows or loses the gradient."""
    x = unit(1, 32, "equal").expand(400, 32)
    loss = fastcl.clip_loss(x, x, scale, backend=backend)
    assert math.isclose(loss.item(), math.log(400), rel_tol=1e-5)

    y = (x + 1e-3 * unit(400, 32, "jitter")).requires_grad_()
    exact_y = y.detach().double().requires_grad_()
    got = gradient(fastcl.clip_loss(y, x, scale, backend=backend), y)
    want = gradient(clip_reference(exact_y, x.double(), scale).mean(), exact_y)
    assert relative_error(got, want) < 1e-2

    # What a shift with a headroom of 88 in place of 80 multiplies by: exp(c - L), subnormal, flushed to zero on a GPU.
    lse = torch.logsumexp(scale * (x[0] @ x.T), dim=0)
    largest_norm = x.norm(dim=1).max() ** 2
    headroom_88 = scale * largest_norm * (1 + 2**-7) - (88 - math.log(400))
    tiny = torch.finfo(torch.float32).tiny
    shift = fixed_shift(Operands(x, x, torch.tensor(scale)), scale)
    assert float((shift - lse).exp()) > tiny
    if scale == 10.0:  # beyond, the margin for rounding in c lifts it again
        assert float((headroom_88 - lse).exp()) < tiny


@BACKENDS
def test_rows_far_below_the_bound(backend: str) -> None:
    """One row of large norm sets the bound, and all others underflow under one fixed shift."""
    a = unit(600, 16, "adversarial") * 3.0
    a[0] *= 40.0
    a = a.requires_grad_()
    b = unit(500, 16, "adversarial keys").requires_grad_()
    target = torch.arange(600) % 500
    exact_a, exact_b = (x.detach().double().requires_grad_() for x in (a, b))
    options = {"target": target, "normalize": False}

    got = fastcl.info_nce(a, b, 0.5, reduction="none", backend=backend, **options)
    exact = info_nce_reference(exact_a, exact_b, 0.5, **options)
    assert float((got - exact).detach().abs().max()) < 2e-4
    got_a, got_b = torch.autograd.grad(got[1:].mean(), (a, b))
    want_a, want_b = torch.autograd.grad(exact[1:].mean(), (exact_a, exact_b))
    assert relative_error(got_a, want_a) < 1e-5
    assert relative_error(got_b, want_b) < 1e-5

    logits = (a @ b.T * 2.0).detach()
    bound = 2.0 * a.norm(dim=1).max() * b.norm(dim=1).max()
    naive = (logits - bound).exp().sum(1).log() + bound
    assert not torch.isfinite(naive).all()


@BACKENDS
@pytest.mark.parametrize("scale", [80.0, 100.0, 400.0])
def test_adversarial_rows(backend: str, scale: float) -> None:
    """Rows whose best logit lies anywhere in [-scale, scale], so that every amount of underflow occurs."""
    n = 1000
    cosine = torch.linspace(-1.0, 1.0, n)
    a = torch.stack((cosine, (1 - cosine**2).clamp_min(0).sqrt()), dim=1)
    b = torch.tensor([[1.0, 0.0], [0.9999, 0.0141]]).repeat(40, 1)
    terms = [fastcl.Term(fastcl.Reduce.LSE), fastcl.Term(fastcl.Reduce.LSE, axis=fastcl.Axis.COLUMN)]
    a.requires_grad_()
    rows, columns = fastcl.pairwise(a, b, terms, scale, backend=backend)
    exact_a = a.detach().double().requires_grad_()
    logits = exact_a @ b.double().T * scale
    assert float((rows - logits.logsumexp(1)).detach().abs().max()) < 1e-4
    assert float((columns - logits.logsumexp(0)).detach().abs().max()) < 1e-4
    got = gradient(rows.sum() + 3 * columns.sum(), a)
    assert relative_error(got, gradient(logits.logsumexp(1).sum() + 3 * logits.logsumexp(0).sum(), exact_a)) < 1e-4


@BACKENDS
def test_many_more_rows_than_columns(backend: str) -> None:
    """The column sums run over N rows: headroom for M summands only would overflow them."""
    a = unit(1, 8, "row").expand(30_000, 8)
    b = unit(1, 8, "row").expand(3, 8)
    terms = [fastcl.Term(fastcl.Reduce.LSE), fastcl.Term(fastcl.Reduce.LSE, axis=fastcl.Axis.COLUMN)]
    rows, columns = fastcl.pairwise(a, b, terms, 120.0, backend=backend)
    torch.testing.assert_close(rows, torch.full((30_000,), 120 + math.log(3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(columns, torch.full((3,), 120 + math.log(30_000)), rtol=1e-5, atol=0)
    with_headroom_88 = torch.full((30_000,), 88.0 - math.log(3)).exp().sum()
    assert torch.isinf(with_headroom_88)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unnormalised_rows_of_large_norm(backend: str, dtype: torch.dtype) -> None:
    z1, z2 = ((1e3 * unit(150, 20, name)).to(dtype).requires_grad_() for name in ("large 1", "large 2"))
    exact = [x.detach().double().requires_grad_() for x in (z1, z2)]
    got = fastcl.nt_xent(z1, z2, 0.5, normalize=False, backend=backend)
    want = nt_xent_reference(*exact, 0.5, normalize=False).mean()
    assert relative_error(got, want) < 1e-5
    grads = torch.autograd.grad(got, (z1, z2))
    assert all(torch.isfinite(g).all() for g in grads)
    want_grads = torch.autograd.grad(want, exact)
    assert max(relative_error(g, w) for g, w in zip(grads, want_grads, strict=True)) < (
        2e-3 if dtype is torch.float32 else 2e-2
    )


@BACKENDS
def test_duplicated_rows(backend: str) -> None:
    z = unit(50, 12, "duplicates").repeat(4, 1).requires_grad_()
    exact = z.detach().double().requires_grad_()
    got = fastcl.nt_xent(z, z, 0.05, backend=backend)
    want = nt_xent_reference(exact, exact, 0.05).mean()
    assert relative_error(got, want) < 1e-5
    assert relative_error(gradient(got, z), gradient(want, exact)) < 1e-4


@BACKENDS
def test_rows_of_zeros(backend: str) -> None:
    z = torch.zeros(5, 4, dtype=torch.float16, requires_grad=True)
    loss = fastcl.nt_xent(z, z, 0.5, backend=backend)
    assert math.isclose(loss.item(), math.log(9), rel_tol=1e-6)
    assert torch.isfinite(gradient(loss, z)).all()


@BACKENDS
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_propagates(backend: str, poison: float) -> None:
    a, b = unit(90, 8, "a"), unit(70, 8, "b")
    a[3, 2] = poison
    loss = fastcl.info_nce(a, b, 0.1, target=torch.arange(90) % 70, normalize=False, reduction="none", backend=backend)
    assert not torch.isfinite(loss[3])
    if math.isnan(poison):
        z = unit(64, 8, "nan")
        z[5, 5] = math.nan
        assert torch.isnan(fastcl.nt_xent(z, z.flip(1), 0.1, backend=backend))


@BACKENDS
@pytest.mark.parametrize("pairs", [1, 2])
def test_tiny_batches(backend: str, pairs: int) -> None:
    z1, z2 = (unit(pairs, 4, name, pairs).requires_grad_() for name in ("tiny 1", "tiny 2"))
    loss = fastcl.nt_xent(z1, z2, 0.1, backend=backend) + fastcl.clip_loss(z1, z2, 10.0, backend=backend)
    assert torch.isfinite(loss)
    grads = torch.autograd.grad(loss, (z1, z2))
    assert all(torch.isfinite(g).all() for g in grads)
    if pairs == 1:
        assert loss.item() == 0
        assert all(g.abs().max() == 0 for g in grads)


@BACKENDS
@pytest.mark.parametrize("above", [70.0, 82.0, 88.0, 95.0, 101.0])
def test_statistic_far_above_the_shift(backend: str, above: float) -> None:
    """exp(S - L) is right where L, merged with others', is so far above the shift c that exp(c - L) underflows."""
    a, b = unit(16, 8, "rows"), unit(16, 8, "columns")
    plan = Plan.decode("general lse:row: lse:column:")
    operands = Operands(a, b, torch.tensor(1.0), norm_bound=1.0)
    value = fixed_shift(operands, 1.0) + above
    merged = Statistics(*(torch.full((1, 16), value) for _ in range(2)))
    incoming = Statistics(*(torch.full((1, 16), math.exp(value)) for _ in range(2)))
    exact = engine.products(plan, operands, merged, incoming, Needs(True, True, False), "dense")
    found = engine.products(plan, operands, merged, incoming, Needs(True, True, False), backend)
    for x, y in zip(found, exact, strict=True):
        assert relative_error(x, y) < 1e-5
