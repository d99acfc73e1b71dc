"""The Triton kernels reading their operands by TMA, or persistent, interpreted: the same bits as by default.

Started by ``test_triton_interpreter.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastcl import tuning
from fastcl.backends import triton
from fastcl.terms import Needs, Operands, Plan, Statistics
from tests.test_one_sweep import ALONG_ROWS, NO_POSITIVE, found_gradients, make
from tests.test_triton_interpreter import IN_PIECES, INTERPRETED, PLANS, SMALL_TILES, interpreted, make_operands

if INTERPRETED:
    import triton as compiler
    import triton.language as tl

    from fastcl.backends.triton import launch, panels
    from fastcl.backends.triton.kernels.sweep import super_tile

    @compiler.jit
    def _write_super_tiles(where_ptr):
        number = tl.program_id(0)
        r, c = super_tile(number, 1, True)
        tl.store(where_ptr + 2 * number, r)
        tl.store(where_ptr + 2 * number + 1, c)


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


VARIANTS = {
    "tma": {"tma": True},
    "persistent": {"persistent": True},
    "both": {"tma": True, "persistent": True},
}


@interpreted
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["nt_xent with max", "clip with max", "info_nce"])
def test_same_bits(name: str, variant: str, described: list[bool]) -> None:
    """Rows, columns and D are no whole number of tiles; two programs share several super-tiles and tiles of panels."""
    plan = PLANS[name]
    config = IN_PIECES if plan.symmetric else replace(IN_PIECES, block_m=16)
    operands = operands_of(plan, 70, 55, 24)
    want = found(plan, operands, config)
    assert not any(described)
    described.clear()
    got = found(plan, operands, replace(config, **VARIANTS[variant]))
    assert len(described) >= 2
    assert all(described) == ("tma" in VARIANTS[variant])
    assert all(map(torch.equal, got, want))


@interpreted
@pytest.mark.parametrize(("n", "m", "d"), [(128, 96, 32), (5, 7, 8)])
@pytest.mark.parametrize("name", ["nt_xent", "clip"])
def test_same_bits_in_float16(name: str, n: int, m: int, d: int) -> None:
    plan = PLANS[name]
    operands = operands_of(plan, n, m, d, torch.float16)
    got, want = (found(plan, operands, replace(IN_PIECES, tma=tma)) for tma in (True, False))
    assert all(map(torch.equal, got, want))


@interpreted
@pytest.mark.parametrize("plan", [ALONG_ROWS, NO_POSITIVE], ids=["along-rows", "no-positive"])
def test_same_bits_of_whole_rows(plan: Plan, described: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles over both edges are read whole, too; a panel's rows begin in the middle of the features."""
    monkeypatch.setattr(panels, "_LOWEST_PANEL", 32)
    operands, head = make(plan, 83, 70, 20)
    results = []
    for tma in (False, True):
        described.clear()
        with tuning.override(replace(SMALL_TILES, tma=tma), workspace_bytes=WORKSPACE):
            results.append(triton.cross_entropy(plan, operands, head, Needs(True, True, True)))
        assert described == [tma] * 3
    assert torch.equal(results[0].loss, results[1].loss)
    got, want = (found_gradients(result) for result in results)
    assert all(torch.equal(gradient, want[name]) for name, gradient in got.items())


@interpreted
def test_whole_tiles_are_read_through_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other features than the pointers', which only tiles with exceptional pairs look at."""
    plan, config = PLANS["clip"], replace(IN_PIECES, tma=True)
    operands = operands_of(plan, 96, 96, 16)
    want = found(plan, operands, config)
    original = launch.operand_tiles
    monkeypatch.setattr(launch, "operand_tiles", lambda x, config: original(x._replace(a=-x.a), config))
    with tuning.override(config):
        assert not torch.allclose(triton.statistics(plan, operands).rows, want[0])


@interpreted
@pytest.mark.parametrize("why", ["rows of 18 elements", "begins at the second element", "one row, repeated"])
def test_what_tma_cannot_read(why: str, described: list[bool]) -> None:
    """Read through pointers, as if the configuration had not asked for TMA."""
    plan = PLANS["clip"]
    operands = operands_of(plan, 45, 37, 16)
    a = {
        "rows of 18 elements": torch.nn.functional.pad(operands.a, (0, 2))[:, :16],
        "begins at the second element": torch.nn.functional.pad(operands.a, (1, 3))[:, 1:17],
        "one row, repeated": operands.a[:1].expand(45, 16),
    }[why]
    operands = replace(operands, a=a)
    got, want = (found(plan, operands, replace(IN_PIECES, tma=tma)) for tma in (True, False))
    assert not any(described)
    assert all(map(torch.equal, got, want))


@interpreted
@pytest.mark.parametrize(("capability", "reads"), [((8, 0), False), ((9, 0), True), ((12, 0), True)])
def test_which_devices_have_tma(capability: tuple[int, int], reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "capability", lambda x: capability)
    x = launch.inputs(make_operands(PLANS["clip"], 32, 32, 16))
    tiles = launch.operand_tiles(x, replace(IN_PIECES, tma=True))
    assert (tiles[0] is not None) == reads
    assert launch.operand_tiles(x, IN_PIECES) == (None, None)


@interpreted
def test_how_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1)
    assert launch.programs(100, x, IN_PIECES) == 100
    persistent = replace(IN_PIECES, persistent=True)
    assert launch.programs(100, x, persistent) == 2
    assert launch.programs(100, x, replace(persistent, num_warps=16)) == 1
    assert launch.programs(1, x, persistent) == 1


@interpreted
@pytest.mark.parametrize("slots", [1, 2, 31, 32])
def test_numbers_of_a_triangle(slots: int) -> None:
    """Every super-tile on and above the diagonal has one number, down the columns."""
    where = torch.empty(slots * (slots + 1) // 2, 2, dtype=torch.int32)
    _write_super_tiles[(len(where),)](where)
    assert where.tolist() == [[r, c] for c in range(slots) for r in range(c + 1)]
