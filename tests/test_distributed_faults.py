"""A rank that calls with something else, or is late, or dies, is an error on every rank: no hang, no wrong number.

Every function whose first argument is ``rank`` runs on each rank of a gloo world.
"""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

import fastcl
from fastcl import engine
from tests.ranks import Failure, World
from tests.test_distributed import check_stats, make_batch

MISTAKES = {
    "dim": (lambda x, y, **o: fastcl.clip_loss(x[:, :4], y[:, :4], 2.0, **o), "dim 5 on rank 0, 2 and 4 on rank 1"),
    "dtype": (lambda x, y, **o: fastcl.clip_loss(x.float(), y.float(), 2.0, **o), "torch.float32 on rank 1"),
    "loss": (lambda x, y, **o: fastcl.info_nce(x, y, 0.5, **o), "loss clip_loss on rank 0, 2 and info_nce on rank 1"),
    "reduction": (lambda x, y, **o: fastcl.clip_loss(x, y, 2.0, reduction="none", **o), "and none on rank 1"),
    "scale": (lambda x, y, **o: fastcl.clip_loss(x, y, 3.0, **o), "scale 2.0 on rank 0, 2 and 3.0 on rank 1"),
    "bias": (lambda x, y, **o: fastcl.clip_loss(x, y, 2.0, 1.0, **o), "logit_bias None on rank 0, 2 and 1.0 on rank 1"),
    "stats": (lambda x, y, **o: fastcl.clip_loss(x, y, 2.0, return_stats=True, **o), "return_stats False on rank 0, 2"),
    "exchange": (lambda x, y, **o: fastcl.clip_loss(x, y, 2.0, **o | {"exchange": "ring"}), "exchange auto on rank 0"),
    "frozen": (lambda x, y, **o: fastcl.clip_loss(x, y.detach(), 2.0, **o), "gradient of rows, keys on rank 0, 2"),
}  # fmt: skip


def mistaken(rank: int, mistake: str) -> float:
    z = [t.detach().clone().requires_grad_() for t in make_batch([4, 4]).inputs]
    correct = lambda x, y, **options: fastcl.clip_loss(x, y, 2.0, **options)  # noqa: E731
    call = MISTAKES[mistake][0] if rank == 1 else correct
    return call(*z, group=dist.group.WORLD, exchange="auto")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_rank_is_an_error_on_every_rank(worlds, mistake: str) -> None:
    for failure in worlds(3).outcomes(mistaken, mistake):
        assert isinstance(failure, Failure)
        assert failure.kind == "ValueError", failure.text
        assert failure.message.startswith("all ranks of the group must make the same call, got ")
        assert MISTAKES[mistake][1] in failure.message
    worlds(3).run(check_stats)  # the group is still of use


SIGLIP_MISTAKES = {
    "dim": (lambda x, y, **o: fastcl.siglip_loss(x[:, :4], y[:, :4], 2.0, -1.0, **o), "shape of a row (5,) on rank 0"),
    "scale": (lambda x, y, **o: fastcl.siglip_loss(x, y, 3.0, -1.0, **o), "scale 2.0 on rank 0, 2 and 3.0 on rank 1"),
    "frozen": (lambda x, y, **o: fastcl.siglip_loss(x, y.detach(), 2.0, -1.0, **o), "gradient of rows, keys on rank 0"),
    "reduction": (lambda x, y, **o: fastcl.siglip_loss(x, y, 2.0, -1.0, reduction="sum", **o), "and sum on rank 1"),
}


def mistaken_panels(rank: int, mistake: str) -> float:
    z = [t.detach().clone().requires_grad_() for t in make_batch([4, 4]).inputs]
    call = SIGLIP_MISTAKES[mistake][0] if rank == 1 else lambda x, y, **o: fastcl.siglip_loss(x, y, 2.0, -1.0, **o)
    return call(*z, group=dist.group.WORLD)


@pytest.mark.parametrize("mistake", SIGLIP_MISTAKES)
def test_a_mistaken_rank_of_a_loss_of_pairs(worlds, mistake: str) -> None:
    for failure in worlds(3).outcomes(mistaken_panels, mistake):
        assert isinstance(failure, Failure)
        assert failure.kind == "ValueError", failure.text
        assert SIGLIP_MISTAKES[mistake][1] in failure.message
    worlds(3).run(check_stats)


def out_of_range(rank: int) -> None:
    x, y = make_batch([4, 4]).inputs
    target = torch.full((4,), 7 + (rank == 1))
    fastcl.info_nce(x, y, 0.5, target=target, group=dist.group.WORLD)


def nobody_has_a_row(rank: int) -> None:
    fastcl.clip_loss(torch.empty(0, 3), torch.empty(0, 3), 1.0, group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (out_of_range, "target must hold indices below 8, got 8 on rank 1"),
        (nobody_has_a_row, "the ranks must hold at least one row"),
    ],
)
def test_bad_input_on_one_rank_is_an_error_on_every_rank(worlds, function, message: str) -> None:
    for failure in worlds(2).outcomes(function):
        assert isinstance(failure, Failure)
        assert failure.kind == "ValueError", failure.text
        assert message in failure.message


def absent(rank: int, where: str) -> None:
    z = [t.detach().clone().requires_grad_() for t in make_batch([4, 4]).inputs]
    if rank == 1 and where == "killed before":
        os._exit(1)
    if rank == 1 and where == "late":
        time.sleep(6)
        return
    if rank == 1 and where == "killed within":
        engine.statistics = lambda *_: os._exit(1)
    loss = fastcl.clip_loss(*z, 2.0, group=dist.group.WORLD, exchange="ring")
    if rank == 1 and where == "killed between":
        os._exit(1)
    loss.backward()


@pytest.mark.parametrize("where", ["killed before", "killed within", "killed between", "late"])
def test_an_absent_rank_is_an_error_on_every_other(where: str) -> None:
    world = World(3, timeout=2.0)
    try:
        began = time.monotonic()
        outcomes = world.outcomes(absent, where)
        assert time.monotonic() - began < 30
        for rank in (0, 2):
            assert isinstance(outcomes[rank], Failure)
            assert outcomes[rank].kind == "RuntimeError", outcomes[rank].text
            assert f"failed on rank {rank} of a group of 3. Either a rank died" in outcomes[rank].message
        assert outcomes[1] is None
    finally:
        world.close()
