"""The cost model of many ranks counts what the exchanges do: messages, bytes, and the matrices held at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from benchmarks.scaling_model import H100, RANKS, Link, Machine, Problem, draw, predict, table
from fastcl import distributed
from fastcl.exchange import Ranks
from fastcl.terms import Operands, Plan
from tests.ranks import World

DIM = 8
PLANS = {
    "clip": "general lse:row:-self_pair lse:column:-self_pair sum:row:+self_pair",
    "nt_xent": "symmetric lse:row:-self_pair,-target sum:row:+target",
}


@pytest.fixture(params=[2, 3, 4])
def world(request: pytest.FixtureRequest, worlds: Callable[[int], World]) -> World:
    return worlds(request.param)


def traffic(rank: int, loss: str, exchange: str, rows: int) -> tuple[int, int]:
    """Messages that this rank sends in a step, and their bytes; a collective is one message to each other rank."""
    seen, size = [], dist.get_world_size()
    swap, collective = Ranks.swap, Ranks._collective

    def counted_swap(ranks, send, *arguments):
        seen.extend(x.nbytes for x in send)
        return swap(ranks, send, *arguments)

    def counted_collective(ranks, name, x, *arguments):
        share = x.nbytes if name == "all_gather_into_tensor" else x.nbytes // size
        seen.append((size - 1) * share)
        return collective(ranks, name, x, *arguments)

    Ranks.swap, Ranks._collective = counted_swap, counted_collective
    try:
        plan = Plan.decode(PLANS[loss])
        a, b = torch.randn(2, rows, DIM)
        operands = Operands(a, None if plan.symmetric else b, torch.tensor(1.0), torch.arange(rows))
        ranks = Ranks.of(dist.group.WORLD.group_name)
        shards = distributed.Shards(plan, operands, ranks, [rows] * size, [rows] * size, exchange, "tiled")
        found = shards.statistics()
        shards.products(found, found, needs_a=True, needs_b=not plan.symmetric)
    finally:
        Ranks.swap, Ranks._collective = swap, collective
    return len(seen), sum(seen)


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize("loss", PLANS)
def test_messages_and_bytes(world: World, loss: str, exchange: str) -> None:
    rows = 12
    pairs = rows * world.size // (2 if loss == "nt_xent" else 1)
    expected = predict(Problem(loss, pairs, DIM, 4), H100, world.size, exchange).traffic
    assert world.run(traffic, loss, exchange, rows) == [(expected.messages, expected.bytes)] * world.size


def test_one_rank_is_the_floor_of_the_work() -> None:
    machine = Machine("", 1e12, 0.0, 8, Link(0, 1e12), Link(0, 1e12))
    for loss, passes in (("clip", 4), ("nt_xent", 2)):
        problem = Problem(loss, 1000, 10)
        for exchange in ("ring", "gather"):
            for ranks in (1, 2, 5, 8):
                found = predict(problem, machine, ranks, exchange)
                assert found.compute == pytest.approx(passes * 2 * problem.rows**2 * 10 / ranks / 1e12)


def test_large_batches_hide_the_ring_and_small_ones_do_not() -> None:
    large, small = Problem("clip", 100_000_000, 768), Problem("clip", 32_768, 768)
    ring = predict(large, H100, 1024, "ring")
    assert ring.exposed < 0.01 * ring.seconds
    assert predict(small, H100, 1024, "gather").seconds < predict(small, H100, 1024, "ring").seconds


def test_table_and_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    lines = table([Problem("clip", 1 << 20, 768)], H100, RANKS)
    assert len(lines) == 2 + len(RANKS)
    draw(H100, 768, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
