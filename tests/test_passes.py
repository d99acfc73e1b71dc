"""The cost of each loss in sweeps of N * M * D multiply-adds, counted in the products that plain PyTorch calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastcl import engine, panels
from fastcl.backends import tiled
from fastcl.terms import Needs, Operands, Plan, Statistics
from tests.cases import make_features
from tests.losses import LOSSES, Loss

TILES = 6
DIM = 4


def count_passes(run: Callable[[], object], sweep: int) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    return counter.get_total_flops() / (2 * sweep)


class Call(NamedTuple):
    run: Callable[[], object]
    pairs: int
    """of rows and keys"""


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is called of ``tiled`` and ``panels`` from outside of them from now on."""
    calls: list[Call] = []
    inside = False
    functions = {"statistics": tiled, "gradient": tiled, "cross_entropy": tiled, "values": panels, "sweep": panels}
    for name, module in functions.items():
        original = getattr(module, name)

        def record(*args, original=original):
            nonlocal inside
            if inside:
                return original(*args)
            calls.append(Call(functools.partial(original, *args), math.prod(args[1].shape)))
            inside = True
            try:
                return original(*args)
            finally:
                inside = False

        monkeypatch.setattr(module, name, record)
    return calls


def passes_of(calls: list[Call]) -> list[float]:
    """The passes that each call takes."""
    return [count_passes(call.run, call.pairs * DIM) for call in list(calls)]


def small_features(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Features that make TILES tiles along the rows of S; losses that take no backend shall use ``tiled``, too."""
    monkeypatch.setenv("FASTCL_BACKEND", "tiled")
    monkeypatch.setattr(tiled, "_TILE_ON_CPU", 8)
    monkeypatch.setattr(tiled, "_LOWEST_PANEL", 1)
    monkeypatch.setattr(panels, "_FEWEST_ROWS", 8)
    monkeypatch.setattr(panels, "_PANEL_ON_CPU", 8)
    return make_features(loss, 8 * TILES // (len(loss.features) if loss.symmetric else 1), DIM, torch.float32)


EACH_LOSS = pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.passes], ids=lambda loss: loss.name)


@EACH_LOSS
def test_passes_of_the_rows(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    features = small_features(loss, monkeypatch)
    calls = record_calls(monkeypatch)
    tau = torch.tensor(0.1, requires_grad=True)
    loss.call(features, tau, backend="tiled").sum().backward()

    passes = passes_of(calls)
    forward, backward = sum(passes[: len(passes) // 2]), sum(passes[len(passes) // 2 :])
    # Diagonal tiles of half a matrix are computed whole: n * (n + tile) / 2 in place of n^2 / 2.
    diagonal = (1 + 1 / TILES) if loss.symmetric else 1
    assert forward == pytest.approx(loss.passes_of_rows[0] * diagonal)
    # A diagonal tile is one product where an off-diagonal one is two.
    expected = loss.passes_of_rows[1] if diagonal == 1 else loss.sweeps * (0.5 * diagonal + 1.0)
    assert backward == pytest.approx(expected)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "first-only"])
@EACH_LOSS
def test_passes_of_the_mean(loss: Loss, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    features = small_features(loss, monkeypatch)
    if frozen and not loss.symmetric:
        features = [features[0], *(x.detach() for x in features[1:])]
    calls = record_calls(monkeypatch)
    loss.call(features, torch.tensor(0.1, requires_grad=True), backend="tiled", reduction="mean").backward()

    expected = loss.frozen_passes if frozen else loss.passes
    assert sum(passes_of(calls)) == pytest.approx(expected + (loss.sweeps / TILES if loss.symmetric else 0))


@pytest.mark.parametrize(
    ("needs", "passes"),
    [((True, True, True), 3), ((True, False, True), 2), ((False, True, True), 2), ((False, False, True), 2)],
)
def test_scale_costs_no_sweep(needs: tuple[bool, bool, bool], passes: int) -> None:
    plan = Plan.decode("general lse:row: lse:column:")
    a, b = torch.randn(2, 64, DIM)
    operands = Operands(a, b, torch.tensor(2.0))
    statistics = engine.statistics(plan, operands, "tiled")
    incoming = Statistics(torch.rand(1, 64), torch.rand(1, 64))
    counted = count_passes(
        lambda: engine.gradient(plan, operands, statistics, incoming, Needs(*needs), "tiled"), 64 * 64 * DIM
    )
    assert counted == passes
