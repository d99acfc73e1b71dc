"""The Triton kernels reading their operands by TMA, interpreted: the same bits as through pointers.

Started by ``test_triton_interpreter.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastcl import tuning
from fastcl.backends import triton
from fastcl.terms import Needs, Operands, Plan, Statistics
from tests.test_one_sweep import ALONG_ROWS, NO_POSITIVE, found_gradients, make
from tests.test_triton_interpreter import IN_PIECES, INTERPRETED, PLANS, interpreted, make_operands

if INTERPRETED:
    from fastcl.backends.triton import launch, panels

NAMES = ["nt_xent", "nt_xent with max", "clip with max", "info_nce"]
TILES = {"in pieces": IN_PIECES, "wide": replace(IN_PIECES, block_m=16)}
WORKSPACE = 4 * 32 * 112


@pytest.fixture
def described(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each launch whether it was given descriptors. NaN is wherever nothing was written."""
    found: list[bool] = []
    original = launch.operand_tiles

    def record(*args):
        tiles = original(*args)
        found.append(tiles[0] is not None)
        return tiles

    monkeypatch.setattr(launch, "operand_tiles", record)
    return found


def operands_of(plan: Plan, n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> Operands:
    """Targets lie on two diagonals, so that most tiles hold nothing exceptional and are read whole."""
    operands = make_operands(plan, n, n if plan.symmetric else m, d, dtype=dtype)
    return operands if operands.target is None else replace(operands, target=(torch.arange(n) + n // 2) % n)


def found(plan: Plan, operands: Operands, config: tuning.Config) -> list[Tensor]:
    """Statistics and products, forward and backward."""
    with tuning.override(config, workspace_bytes=WORKSPACE):
        statistics = triton.statistics(plan, operands)
        incoming = Statistics(*(torch.full_like(x, 1 / x.shape[1]) for x in statistics))
        products = triton.gradient(plan, operands, statistics, incoming, True, not plan.symmetric)
    return [x for x in (*statistics, *products) if x is not None and x.numel()]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(128, 96, 32), (83, 109, 24), (5, 7, 8)])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits(name: str, n: int, m: int, d: int, dtype: torch.dtype, described: list[bool]) -> None:
    """D of no whole number of steps, and rows and columns of no whole number of tiles."""
    plan = PLANS[name]
    config = IN_PIECES if plan.symmetric else replace(IN_PIECES, block_m=16)
    operands = operands_of(plan, n, m, d, dtype)
    want = found(plan, operands, config)
    assert not any(described)
    described.clear()
    got = found(plan, operands, replace(config, tma=True))
    assert all(described)
    assert len(described) >= 2
    for x, y in zip(got, want, strict=True):
        assert x.isfinite().any()
        assert torch.equal(x, y)
