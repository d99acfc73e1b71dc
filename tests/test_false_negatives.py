"""Pairs that are left out: ids, and the margin rule on the similarity itself."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.losses.clip import reference as clip_reference
from fastcl.losses.info_nce import reference as info_nce_reference
from fastcl.losses.nt_xent import reference as nt_xent_reference
from tests.cases import available_backends

MARGIN = -0.05


def grid(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows of four entries +-1/2: their length is 1 and their products are exact in every dtype."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.zeros(rows, dim, dtype=torch.float64)
    for row in x:
        places = torch.randperm(dim, generator=generator)[:4]
        row[places] = torch.randint(2, (4,), generator=generator, dtype=torch.float64) - 0.5
    return x.to(dtype).requires_grad_()


CALLS = {
    "nt_xent": (
        lambda x, y, **options: fastcl.nt_xent(x, y, 0.2, false_negative_margin=MARGIN, **options),
        lambda x, y: nt_xent_reference(x, y, 0.2, false_negative_margin=MARGIN),
    ),
    "info_nce": (
        lambda x, y, **options: fastcl.info_nce(x, y, 0.2, false_negative_margin=MARGIN, **options),
        lambda x, y: info_nce_reference(x, y, 0.2, false_negative_margin=MARGIN),
    ),
    "info_nce_target": (
        lambda x, y, **options: fastcl.info_nce(
            x, y, 0.2, target=torch.arange(len(x)).flip(0), false_negative_margin=MARGIN, **options
        ),
        lambda x, y: info_nce_reference(x, y, 0.2, target=torch.arange(len(x)).flip(0), false_negative_margin=MARGIN),
    ),
    "info_nce_negatives": (
        lambda x, y, **options: fastcl.info_nce(
            x, y, 0.2, negatives=y.detach().flip(0), false_negative_margin=MARGIN, **options
        ),
        lambda x, y: info_nce_reference(x, y, 0.2, negatives=y.detach().flip(0), false_negative_margin=MARGIN),
    ),
    "clip": (
        lambda x, y, **options: fastcl.clip_loss(x, y, 5.0, false_negative_margin=MARGIN, normalize=True, **options),
        lambda x, y: clip_reference(x, y, 5.0, false_negative_margin=MARGIN, normalize=True),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("name", CALLS)
def test_margin_rule(name: str, backend: str, dtype: torch.dtype) -> None:
    call, reference = CALLS[name]
    x, y = grid(40, 9, dtype), grid(41, 9, dtype)[:40].detach().requires_grad_()
    try:
        rows = call(x, y, reduction="none", backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = reference(*wide)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for reduction in ("none", "mean"):
        value = call(x, y, reduction=reduction, backend=backend).mean()
        torch.testing.assert_close(value.double(), expected.mean(), rtol=tolerance, atol=tolerance)
        exact = torch.autograd.grad(expected.mean(), wide, retain_graph=True)
        for got, want in zip(torch.autograd.grad(value, (x, y)), exact, strict=True):
            assert (got.double() - want).norm() <= 2 * tolerance * want.norm()
    assert (rows.double() - reference(*wide)).abs().max() <= 2 * tolerance


@pytest.mark.parametrize("backend", available_backends())
def test_exact_duplicates_are_within_rounding_of_a_margin_of_zero(backend: str) -> None:
    """A positive that is computed apart from S must not drop its own duplicates by a rounding."""
    z1 = torch.randn(300, 64)
    z2 = z1.clone()
    z2[150:] = z2[:150]  # each positive occurs twice
    z1[150:] = z1[:150]
    kept = fastcl.info_nce(z1, z2, 0.1, false_negative_margin=0.0, reduction="none", backend=backend)
    torch.testing.assert_close(kept, fastcl.info_nce(z1, z2, 0.1, reduction="none", backend=backend))
    assert (kept > 0.69).all(), "a duplicate of the positive leaves it at most half of the probability"
    dropped = fastcl.info_nce(z1, z2, 0.1, ids=torch.arange(150).repeat(2), reduction="none", backend=backend)
    assert (dropped < 0.2).all()


def test_compiles() -> None:
    x, y = grid(40, 9, torch.float32), grid(41, 9, torch.float32)[:40].detach()
    for call, _ in CALLS.values():
        torch._dynamo.reset()
        compiled = torch.compile(functools.partial(call), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, y), call(x, y))
