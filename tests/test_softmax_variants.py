"""What the variants of NT-Xent and CLIP promise beyond their formula: rows without negatives, extremes, identities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.losses.debiased import reference as debiased_reference
from tests.cases import available_backends

BACKENDS = pytest.mark.parametrize("backend", available_backends())
OF_VIEWS = {
    "dcl": fastcl.dcl_loss,
    "dclw": lambda z1, z2, tau, **o: fastcl.dcl_loss(z1, z2, tau, sigma=0.5, **o),
    "debiased": lambda z1, z2, tau, **o: fastcl.debiased_loss(z1, z2, tau, 0.1, **o),
    "hard_negative": lambda z1, z2, tau, **o: fastcl.hard_negative_loss(z1, z2, tau, 0.1, 1.0, **o),
}
EACH_OF_VIEWS = pytest.mark.parametrize("loss", OF_VIEWS.values(), ids=OF_VIEWS)


def views(rows: int, dim: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Two views without planted signal, which require grad."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64).to(dtype)
    return [x.clone().requires_grad_() for x in drawn]


@EACH_OF_VIEWS
@BACKENDS
def test_one_pair_has_loss_and_gradient_zero(loss: Callable[..., Tensor], backend: str) -> None:
    z = views(1, dtype=torch.float32)
    for reduction in ("none", "mean"):
        value = loss(*z, 0.1, backend=backend, reduction=reduction)
        assert torch.equal(value, torch.zeros_like(value))
        for gradient in torch.autograd.grad(value.sum(), z):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@EACH_OF_VIEWS
def test_rows_whose_negatives_are_all_duplicates(loss: Callable[..., Tensor]) -> None:
    z, ids = views(4), torch.tensor([5, 5, 5, 5])
    value = loss(*z, 0.1, ids=ids, reduction="none")
    assert torch.equal(value, torch.zeros_like(value))
    for gradient in torch.autograd.grad(value.sum(), z):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@EACH_OF_VIEWS
def test_weights_multiply_the_losses_of_both_views(loss: Callable[..., Tensor]) -> None:
    z, weight = views(7), torch.linspace(0, 2, 7, dtype=torch.float64)
    rows = loss(*z, 0.4, reduction="none")
    torch.testing.assert_close(loss(*z, 0.4, weight=weight), (rows * weight.repeat(2)).mean())


@EACH_OF_VIEWS
@BACKENDS
def test_statistics_are_those_of_nt_xent(loss: Callable[..., Tensor], backend: str) -> None:
    z = views(9, dtype=torch.float32)
    value, stats = loss(*z, 0.3, return_stats=True, backend=backend)
    torch.testing.assert_close(value, loss(*z, 0.3, backend=backend))
    expected = fastcl.nt_xent(*z, 0.3, return_stats=True)[1]
    for x, y in zip(stats, expected, strict=True):
        torch.testing.assert_close(x, y)


@BACKENDS
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_corrected_negatives_do_not_overflow(beta: float, backend: str) -> None:
    """exp(100 (1 + beta)) is infinite in float32."""
    z = views(40, dim=3, dtype=torch.float32)
    wide = [x.detach().double().requires_grad_() for x in z]
    got = fastcl.hard_negative_loss(*z, 0.01, 0.1, beta, backend=backend)
    expected = debiased_reference(*wide, 0.01, 0.1, beta).mean()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    for x, y in zip(torch.autograd.grad(got, z), torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))


def test_corrections_that_correct_nothing() -> None:
    z = views(11)
    torch.testing.assert_close(fastcl.debiased_loss(*z, 0.3, 0.0), fastcl.nt_xent(*z, 0.3))
    torch.testing.assert_close(fastcl.hard_negative_loss(*z, 0.3, 0.2, 0.0), fastcl.debiased_loss(*z, 0.3, 0.2))
    hard = fastcl.hard_negative_loss(*z, 0.3, 0.0, 2.0, reduction="none")
    assert (hard > fastcl.nt_xent(*z, 0.3, reduction="none")).all()


def test_debiased_loss_as_its_authors_compute_it() -> None:
    """By an independent route: from the products of probabilities, one row at a time."""
    z1, z2 = (torch.nn.functional.normalize(x, dim=1) for x in views(6))
    z, tau, tau_plus, beta = torch.cat((z1, z2)), 0.5, 0.1, 1.5
    losses = []
    for i in range(12):
        others = [j for j in range(12) if j % 6 != i % 6]
        p = (z[i] @ z[(i + 6) % 12] / tau).exp()
        n = torch.stack([(z[i] @ z[j] / tau).exp() for j in others])
        reweighted = (n ** (1 + beta)).sum() / (n**beta).mean()
        g = (reweighted - len(others) * tau_plus * p) / (1 - tau_plus)
        g = g.clamp(min=len(others) * float(torch.exp(torch.tensor(-1 / tau, dtype=torch.float64))))
        losses.append(-(p / (p + g)).log())
    torch.testing.assert_close(
        fastcl.hard_negative_loss(z1, z2, tau, tau_plus, beta, reduction="none"), torch.stack(losses)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: fastcl.dcl_loss(*z, 0.1, sigma=0.0), "sigma must be positive, got 0.0"),
        (lambda z: fastcl.debiased_loss(*z, 0.1, 1.0), "tau_plus must be a number from 0.0 to 0.99.*, got 1.0"),
        (lambda z: fastcl.hard_negative_loss(*z, 0.1, 0.1, -1.0), "beta must be a number from 0.0 to inf, got -1.0"),
    ],
)
def test_bad_options_are_named(call: Callable[[list[Tensor]], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(views(4))
