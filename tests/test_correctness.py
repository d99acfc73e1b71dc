"""Every loss on every backend against the textbook formula in float64, within the dense formula's own error."""

from __future__ import annotations

import re

import pytest
import torch

from fastcl import panels
from fastcl.backends import tiled
from tests.cases import (
    DTYPES,
    TOLERANCE,
    available_backends,
    backends_of,
    each_loss_and_backend,
    make_features,
    refusal,
    relative_error,
    shapes_of,
    value_and_gradients,
)
from tests.losses import LOSSES, Loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _several_tiles_and_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plain PyTorch, the last ones ragged, at the largest shape that it is given."""
    monkeypatch.setattr(tiled, "_TILE_ON_CPU", 128)
    monkeypatch.setattr(panels, "_PANEL_ON_CPU", 40 * 129)
    monkeypatch.setattr(panels, "_FEWEST_ROWS", 16)


Computed = tuple[torch.Tensor, list[torch.Tensor]]
"""A value and its gradients with respect to features and temperature."""


def check_against_float64(
    loss: Loss, pairs: int, dim: int, dtype: torch.dtype, backend: str | None, tau: float = 0.1, device: str = "cpu"
) -> None:
    """Value and all gradients are within the error of the dense formula in the same dtype, plus TOLERANCE."""
    features = make_features(loss, pairs, dim, dtype, device)
    wide = [x.detach().double().requires_grad_() for x in features]
    temperature = torch.tensor(tau, device=device, requires_grad=True)
    wide_temperature = temperature.detach().double().requires_grad_()

    exact = value_and_gradients(lambda: loss.reference(wide, wide_temperature), [*wide, wide_temperature])
    dense = value_and_gradients(lambda: loss.reference(features, temperature), [*features, temperature])

    # The mean is one operator call, the losses of the rows are another one.
    for reduction in ("none", "mean"):
        got = value_and_gradients(
            lambda reduction=reduction: loss.call(features, temperature, backend=backend, reduction=reduction),
            [*features, temperature],
        )
        compare(loss, dtype, tau, got, exact, dense)


def compare(loss: Loss, dtype: torch.dtype, tau: float, got: Computed, exact: Computed, dense: Computed) -> None:
    names = ("value", *loss.features, "temperature")
    for name, x, y, z in zip(names, (got[0], *got[1]), (exact[0], *exact[1]), (dense[0], *dense[1]), strict=True):
        # Exact gradients that vanish (one pair, or one dimension) leave only rounding to compare.
        floor = 1e-7 if dtype is torch.float64 else 1e-4
        if name == "temperature":
            # A sum of terms of order 1 / tau^2 that cancel.
            floor = max(floor, TOLERANCE[dtype] / tau**2)
        if float(y.double().norm()) < floor:
            assert float((x.double() - y).norm()) <= max(float((z.double() - y).norm()), floor), name
            continue
        # The roundings of several sweeps add up.
        error, budget = relative_error(x, y), relative_error(z, y) + loss.sweeps * TOLERANCE[dtype]
        if name == "temperature":
            # One number, in which most of the sum cancels: a single draw of rounding noise, not the norm of many. Where
            # little is left of terms of order 1 / tau^2, it is their last bit.
            last_bit = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps / tau**2
            budget = 4 * budget + last_bit / float(y.double().norm())
            if loss.temperature_cancels:
                # A small rest of terms of order 1 / tau^2, in the temperature's float32 whatever the features are.
                budget += 2.4e-7 + floor / 4 / float(y.double().norm())
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def supported(dtype: torch.dtype, backend: str | None) -> bool:
    return dtype is not torch.float64 or backend in ("dense", "tiled", None)


CASES = [
    pytest.param(
        loss, *shape, dtype, backend, id=f"{loss.name}-{shape[0]}x{shape[1]}-{str(dtype)[6:]}-{backend or 'own'}"
    )
    for loss in LOSSES
    for backend in backends_of(loss)
    for shape in shapes_of(loss, backend)
    for dtype in DTYPES
    if supported(dtype, backend)
]


@pytest.mark.parametrize(("loss", "pairs", "dim", "dtype", "backend"), CASES)
def test_agrees_with_float64(loss: Loss, pairs: int, dim: int, dtype: torch.dtype, backend: str | None) -> None:
    check_against_float64(loss, pairs, dim, dtype, backend)


@each_loss_and_backend()
@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_agrees_at_extreme_temperatures(loss: Loss, backend: str | None, tau: float) -> None:
    check_against_float64(loss, 200, 24, torch.float32, backend, tau)


@each_loss_and_backend()
def test_strided_features(loss: Loss, backend: str | None) -> None:
    features = [x.detach() for x in make_features(loss, 70, 21, torch.float32)]
    transposed = [x.T.contiguous().T for x in features]
    spread = [torch.stack((x, x.flip(0)), dim=2).flatten(1)[:, ::2] for x in features]
    for reduction in ("none", "mean"):
        options = {"backend": backend, "reduction": reduction}
        value, gradients = differentiate(loss, features, options)
        for strided in (transposed, spread):
            other, others = differentiate(loss, strided, options)
            torch.testing.assert_close(other, value)
            torch.testing.assert_close(others, gradients)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_backend_computes_a_loss_or_says_why_not(loss: Loss) -> None:
    why_not = "plain PyTorch computes over panels of S|the loss is plain PyTorch|no backend tiles"
    for backend in (*available_backends(), None):
        reason = refusal(loss, backend)
        assert (reason is None) == (backend is None or backend in loss.backends), reason
        assert reason is None or re.search(why_not, reason)


def differentiate(loss: Loss, features: list[torch.Tensor], options: dict[str, str]) -> Computed:
    inputs = [x.detach().requires_grad_() for x in features]
    return value_and_gradients(lambda: loss.call(inputs, 0.2, **options), inputs)


@each_loss_and_backend()
def test_same_bits_every_time(loss: Loss, backend: str | None) -> None:
    features = make_features(loss, 530, 48, torch.float32)
    for options in ({"backend": backend}, {"backend": backend, "reduction": "mean"}):
        runs = [value_and_gradients(lambda o=options: loss.call(features, 0.1, **o), features) for _ in range(3)]
        for value, gradients in runs[1:]:
            assert torch.equal(value, runs[0][0])
            assert all(torch.equal(x, y) for x, y in zip(gradients, runs[0][1], strict=True))
