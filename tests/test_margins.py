"""Losses of distances, and binary NCE, where a batch is out of the ordinary: nothing to compare, duplicates, weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcl

LABELLED = {
    "contrastive": fastcl.contrastive_loss,
    "triplet-all": lambda z, labels, **o: fastcl.triplet_loss(z, labels, 0.2, **o),
    "triplet-semihard": lambda z, labels, **o: fastcl.triplet_loss(z, labels, 0.2, "semihard", **o),
    "triplet-hard": lambda z, labels, **o: fastcl.triplet_loss(z, labels, 0.2, "hard", **o),
    "triplet-swap": lambda z, labels, **o: fastcl.triplet_loss(z, labels, 0.2, "hard", swap=True, **o),
    "triplet-smooth": lambda z, labels, **o: fastcl.triplet_loss(z, labels, 0.2, "hard", smooth_loss=True, **o),
    "lifted_structure": fastcl.lifted_structure_loss,
}
EACH = pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
DISTANCE = pytest.mark.parametrize("distance", ["euclidean", "cosine"])


def value_and_gradient(loss, z: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z, labels, **options)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


@EACH
@DISTANCE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_with_nothing_to_compare(loss, distance: str, reduction: str) -> None:
    options = {"distance": distance, "reduction": reduction}
    for labels in (torch.tensor([0]), torch.zeros(5, dtype=torch.int64), torch.arange(5)):
        z = torch.randn(len(labels), 3)
        value, gradient = value_and_gradient(loss, z, labels, **options)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        if loss is not fastcl.contrastive_loss:
            assert value.abs().max() == 0
            assert gradient.abs().max() == 0


@EACH
@DISTANCE
def test_a_row_without_a_positive_has_no_loss(loss, distance: str) -> None:
    if loss is fastcl.contrastive_loss:
        pytest.skip("contrastive_loss asks something of pairs, and a row without a positive has negatives")
    z, labels = torch.randn(9, 3), torch.tensor([0, 0, 1, 1, 7, 0, 1, 2, 2])
    value, _ = value_and_gradient(loss, z, labels, distance=distance, reduction="none")
    assert value[4] == 0


@EACH
@DISTANCE
def test_duplicates_of_a_row(loss, distance: str) -> None:
    z = torch.randn(5, 3)[[0, 0, 0, 1, 1, 2, 3, 3, 4]]
    for normalize in (True, False):
        for labels in (torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1]), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])):
            value, gradient = value_and_gradient(loss, z, labels, distance=distance, normalize=normalize)
            assert torch.isfinite(value)
            assert torch.isfinite(gradient).all()
    zeros = value_and_gradient(loss, torch.zeros(4, 3), torch.tensor([0, 0, 1, 1]), distance=distance)
    assert all(torch.isfinite(x).all() for x in zeros)


@EACH
def test_weights_and_reductions(loss) -> None:
    z, labels = torch.randn(24, 4, dtype=torch.float64), torch.arange(24) % 5
    weight = torch.rand(24, dtype=torch.float64)
    rows, of_rows = value_and_gradient(loss, z, labels, reduction="none", weight=weight)
    plain, _ = value_and_gradient(loss, z, labels, reduction="none")
    torch.testing.assert_close(rows, plain * weight)
    for reduction, factor in (("sum", 1.0), ("mean", 1 / 24)):
        value, gradient = value_and_gradient(loss, z, labels, reduction=reduction, weight=weight)
        torch.testing.assert_close(value, rows.sum() * factor)
        torch.testing.assert_close(gradient, of_rows * factor)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_single_pair_has_no_noise(reduction: str) -> None:
    x, y = torch.randn(2, 1, 4, requires_grad=True)
    value = fastcl.binary_nce_loss(x, y, 0.1, reduction=reduction).sum()
    assert value == 0
    assert all((g == 0).all() for g in torch.autograd.grad(value, (x, y)))
    assert torch.isfinite(fastcl.spectral_contrastive_loss(x, y))


def test_the_normaliser_of_binary_nce_is_learned() -> None:
    x, y = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    for log_noise in (torch.tensor(0.3), torch.randn(9)):
        log_noise = log_noise.double().requires_grad_()
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda c, reduction=reduction: fastcl.binary_nce_loss(x, y, 0.5, log_noise=c, reduction=reduction),
                log_noise,
            )


def test_binary_nce_is_siglip_with_the_noise_as_its_bias() -> None:
    x, y = torch.randn(2, 9, 4, dtype=torch.float64)
    nce = fastcl.binary_nce_loss(x, y, 0.2, log_noise=-0.5)
    bias = 0.5 - torch.tensor(8.0, dtype=torch.float64).log()
    torch.testing.assert_close(nce, fastcl.siglip_loss(x, y, 5.0, bias, normalize=True))


X, LABELS = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastcl.contrastive_loss(X, LABELS[:3]), ValueError, r"labels must have shape \(6,\)"),
        (lambda: fastcl.contrastive_loss(X, LABELS, "1"), TypeError, r"pos_margin must be a float"),
        (lambda: fastcl.contrastive_loss(X, LABELS, X[0, 0]), TypeError, r"pos_margin must be a number, got a tensor"),
        (lambda: fastcl.contrastive_loss(X, LABELS, distance="l1"), ValueError, r"distance must be one of .* got 'l1'"),
        (lambda: fastcl.triplet_loss(X, LABELS, -0.1), ValueError, r"margin must be at least 0, got -0.1"),
        (lambda: fastcl.triplet_loss(X, LABELS, 0.1, "easy"), ValueError, r"mining must be one of .* got 'easy'"),
        (
            lambda: fastcl.triplet_loss(X, LABELS, smooth_loss=True),
            ValueError,
            r"smooth_loss must be False",
        ),
        (
            lambda: fastcl.triplet_loss(X, LABELS, mining="semihard", swap=True),
            ValueError,
            r"swap must be False with mining='semihard': .* takes time cubic",
        ),
        (
            lambda: fastcl.lifted_structure_loss(X.double(), LABELS, backend="cpu"),
            ValueError,
            r"backend 'cpu' can't compute this call: torch.float64 is not one of",
        ),
        (lambda: fastcl.binary_nce_loss(X, X, 0.1, noise_ratio=0.0), ValueError, r"noise_ratio must be positive"),
        (
            lambda: fastcl.binary_nce_loss(X, X, 0.1, log_noise=X[:3, 0]),
            ValueError,
            r"log_noise must have shape \(6,\)",
        ),
        (lambda: fastcl.spectral_contrastive_loss(X, X, mu=0.0), ValueError, r"mu must be positive, got 0.0"),
        (lambda: fastcl.nn.SigLipLoss()(X, X, 1.0), ValueError, r"logit_scale and logit_bias must be given"),
        (lambda: fastcl.nn.SigLipLoss(0.1)(X, X, 1.0), ValueError, r"must be None where SigLipLoss learns its own"),
    ],
)
def test_bad_input_names_the_argument_its_value_and_what_was_expected(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_siglip_learns_its_scale_and_bias() -> None:
    criterion = fastcl.nn.SigLipLoss(0.1, -10.0, normalize=True)
    torch.testing.assert_close(criterion(X, X), fastcl.siglip_loss(X, X, 10.0, -10.0, normalize=True))
    criterion(X, X).backward()
    assert criterion.logit_scale.grad is not None
    assert criterion.logit_bias.grad is not None
