"""What the variants of NT-Xent and CLIP promise beyond their formula: rows without negatives, extremes, identities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.backends import tiled
from fastcl.losses.alpha_cl import reference as alpha_cl_reference
from fastcl.losses.debiased import reference as debiased_reference
from fastcl.losses.multiple_negatives import DIRECTIONS
from tests.cases import available_backends
from tests.test_passes import DIM, passes_of, record_calls

BACKENDS = pytest.mark.parametrize("backend", available_backends())
OF_VIEWS = {
    "dcl": fastcl.dcl_loss,
    "dclw": lambda z1, z2, tau, **o: fastcl.dcl_loss(z1, z2, tau, sigma=0.5, **o),
    "alpha_cl": lambda z1, z2, tau, **o: fastcl.alpha_cl_loss(z1, z2, tau, importance="power", **o),
    "debiased": lambda z1, z2, tau, **o: fastcl.debiased_loss(z1, z2, tau, 0.1, **o),
    "macl": lambda z1, z2, tau, **o: fastcl.macl_loss(z1, z2, tau, alpha=0.0, **o),
    "hard_negative": lambda z1, z2, tau, **o: fastcl.hard_negative_loss(z1, z2, tau, 0.1, 1.0, **o),
}
EACH_OF_VIEWS = pytest.mark.parametrize("loss", OF_VIEWS.values(), ids=OF_VIEWS)


def views(rows: int, dim: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Two views without planted signal, which require grad."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64).to(dtype)
    return [x.clone().requires_grad_() for x in drawn]


WITH_STATISTICS = pytest.mark.parametrize(
    "loss",
    [loss for name, loss in OF_VIEWS.items() if name != "alpha_cl"],
    ids=[x for x in OF_VIEWS if x != "alpha_cl"],
)


@EACH_OF_VIEWS
def test_one_pair_has_loss_and_gradient_zero(loss: Callable[..., Tensor]) -> None:
    z = views(1, dtype=torch.float32)
    for reduction in ("none", "mean"):
        value = loss(*z, 0.1, reduction=reduction)
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


@WITH_STATISTICS
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


def test_importance_of_info_nce_has_the_gradient_of_info_nce() -> None:
    z, tau = views(13), 0.3
    energy = fastcl.alpha_cl_loss(*z, tau, importance="softmax")
    expected = torch.autograd.grad(tau * fastcl.nt_xent(*z, tau), z)
    for x, y in zip(torch.autograd.grad(energy, z), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_importance_with_a_power_of_two_has_the_gradient_of_the_decoupled_loss() -> None:
    z, tau = views(13), 0.3
    energy = fastcl.alpha_cl_loss(*z, tau, importance="power", power=2.0)
    expected = torch.autograd.grad(tau * fastcl.dcl_loss(*z, tau), z)
    for x, y in zip(torch.autograd.grad(energy, z), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("importance", ["softmax", "uniform", "power"])
def test_energy_of_features_of_any_length(importance: str) -> None:
    z = views(8)
    options = {"importance": importance, "normalize": False}
    got = fastcl.alpha_cl_loss(*z, 2.0, **options, reduction="none")
    expected = alpha_cl_reference(*z, 2.0, **options)
    torch.testing.assert_close(got, expected)
    weights = torch.linspace(1, 2, 16, dtype=torch.float64)
    gradients = [torch.autograd.grad((rows * weights).sum(), z) for rows in (got, expected)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


def test_a_query_alone_has_loss_and_gradient_zero() -> None:
    x = views(1)
    for directions in (("query_to_doc",), DIRECTIONS):
        value = fastcl.multiple_negatives_ranking_loss(*x, 0.1, directions=directions)
        torch.testing.assert_close(value, torch.zeros_like(value) + math.log(1 + ("doc_to_query" in directions)))
        for gradient in torch.autograd.grad(value, x):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": ("doc_to_doc",)}, "directions must hold 'query_to_doc'"),
        ({"directions": ("query_to_doc", "both")}, "directions must be one of .* got 'both'"),
        (
            {"directions": DIRECTIONS, "partition_mode": "per_direction"},
            "partition_mode must be 'joint' with doc_to",
        ),
        ({"hardness_mode": "all_negatives"}, "hardness_strength must be positive with a hardness_mode"),
        ({"hardness_strength": 1.0}, "hardness_strength must be positive with a hardness_mode, and 0 without"),
        ({"negatives": [torch.zeros(3, 6, dtype=torch.float64)]}, r"query and negatives\[0\] must have the same shape"),
    ],
)
def test_options_of_the_ranking_loss_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastcl.multiple_negatives_ranking_loss(*views(4), 0.1, **options)


def test_passes_of_every_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions 4, queries 2, documents 2, and each matrix of hard negatives 4 twice."""
    monkeypatch.setattr(tiled, "_TILE_ON_CPU", 8)
    calls = record_calls(monkeypatch)
    x = [torch.randn(128, DIM, requires_grad=True) for _ in range(4)]
    options = {"negatives": x[2:], "directions": DIRECTIONS, "backend": "tiled"}
    fastcl.multiple_negatives_ranking_loss(x[0], x[1], 0.1, **options).backward()
    assert sum(passes_of(calls)) == pytest.approx(4 + 2 * (2 + 1 / 16) + 2 * (4 + 4))
