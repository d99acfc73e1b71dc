"""Similarities that are dot products of transformed features, through a loss, against their dense formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcl
from tests.cases import available_backends

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def dense(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def check(got: Tensor, expected: Tensor, inputs: list[Tensor], wide: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    for x, y in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


@DTYPES
def test_distances_keep_their_precision(dtype: torch.dtype) -> None:
    """Squared norms of some 600, which a single bfloat16 column would round by 2."""
    a, b = (features(*shape, seed=k, dtype=dtype) for k, shape in enumerate([(40, 600), (30, 600)]))
    x, y = fastcl.similarity.negative_squared_distance(a, b)
    assert x.dtype is y.dtype is dtype
    exact = -(a.double()[:, None] - b.double()).square().sum(dim=2)
    accumulated = (x.double() @ y.double().T).detach()
    assert float((accumulated - exact).abs().max()) < (1e-9 if dtype is torch.float64 else 1e-3)


@DTYPES
def test_info_nce_of_distances(dtype: torch.dtype) -> None:
    inputs = [features(37, 9, seed=k, dtype=dtype) for k in range(2)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    transformed = fastcl.similarity.negative_squared_distance(*inputs)
    got = fastcl.info_nce(*transformed, 2.0, normalize=False)
    expected = dense(-(wide[0][:, None] - wide[1]).square().sum(dim=2) / 2.0)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    check(got, expected, inputs, wide, tolerance)


@pytest.mark.parametrize("backend", available_backends())
def test_every_backend_takes_distances(backend: str) -> None:
    """Rows so far apart that every logit is far below the bound that the norms give."""
    inputs = [features(150, 64, seed=k) for k in range(2)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    transformed = fastcl.similarity.negative_squared_distance(*inputs)
    got = fastcl.info_nce(*transformed, 1.0, normalize=False, backend=backend)
    expected = dense(-(wide[0][:, None] - wide[1]).square().sum(dim=2))
    check(got, expected, inputs, wide, 1e-4)


def test_bilinear() -> None:
    inputs = [features(*shape, seed=k, dtype=torch.float64) for k, shape in enumerate([(21, 7), (21, 4), (7, 4)])]
    query, key, matrix = inputs
    got = fastcl.info_nce(*fastcl.similarity.bilinear(*inputs), 0.7, normalize=False)
    check(got, dense(query @ matrix @ key.T / 0.7), inputs, inputs, 1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a, b: fastcl.similarity.bilinear(a, b, torch.eye(3)),
            "matrix must have a row for each of the 4",
        ),
        (lambda a, b: fastcl.similarity.bilinear(a, b, torch.ones(4, 2)), "a @ matrix and b must have the same dim"),
        (lambda a, b: fastcl.similarity.negative_squared_distance(a, b[:, :2]), "a and b must have the same dim"),
    ],
)
def test_features_that_do_not_fit_are_named(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 4), torch.randn(6, 4))
