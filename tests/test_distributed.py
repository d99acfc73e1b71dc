"""Losses over many ranks against the textbook formula of the global batch in float64: values, gradients, work, memory
and determinism. Every function whose first argument is ``rank`` runs on each rank of a gloo world.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastcl
from fastcl import Axis, Mask, Reduce, Term, distributed, engine
from fastcl.backends import tiled
from fastcl.exchange import Ranks
from fastcl.losses.clip import reference as clip_reference
from fastcl.losses.multiple_negatives import DIRECTIONS
from fastcl.losses.nt_xent import reference as nt_xent_reference
from fastcl.terms import Operands, Plan
from tests.cases import available_backends, relative_error
from tests.sharded_losses import DIM, LOSSES, local_lengths

SIZES = (1, 2, 3, 4)
EXACT = 1e-10


def shards_of(size: int) -> list[list[int]]:
    """Pairs on each rank: equal, unequal, an empty one, all on one, odd halves."""
    patterns = ([4, 4, 4, 4], [2, 5, 3, 1], [3, 0, 5, 2], [0, 0, 0, 3][-size:], [7, 1, 1, 8])
    return [pattern[:size] for pattern in patterns if sum(pattern[:size])]


class Batch(NamedTuple):
    """A global batch of raw inputs, two encoders (or three) shared by the ranks, a scale and a bias: all leaves."""

    inputs: list[Tensor]
    encoders: list[Tensor]
    scale: Tensor
    bias: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.encoders, self.scale, self.bias]


def make_batch(lengths: Sequence[int], dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [draw(length, DIM) for length in lengths]
    for x in inputs[1:]:  # planted signal: matching rows resemble each other
        shared = min(len(x), len(inputs[0]))
        x[:shared] = inputs[0][:shared] + 0.5 * x[:shared]
    encoders = [torch.eye(DIM, dtype=dtype) + 0.1 * draw(DIM, DIM) for _ in inputs]
    batch = Batch(inputs, encoders, torch.tensor(3.7, dtype=dtype), torch.tensor(-0.7, dtype=dtype))
    for x in (*inputs, *batch.parameters):
        x.requires_grad_()
    return batch


def encode(inputs: Sequence[Tensor], encoders: Sequence[Tensor]) -> list[Tensor]:
    return [x @ encoder for x, encoder in zip(inputs, encoders, strict=True)]


def split(x: Tensor, lengths: Sequence[int], rank: int) -> Tensor:
    return x.detach().split(list(lengths))[rank].clone().requires_grad_()


def check_against_the_global_batch(rank: int, name: str, pairs: list[int], exchange: str, reduction: str) -> None:
    loss, size = LOSSES[name], dist.get_world_size()
    lengths = local_lengths(loss, pairs)
    batch = make_batch([sum(of_ranks) for of_ranks in lengths])
    rows = loss.reference(encode(batch.inputs, batch.encoders), batch.scale, batch.bias)
    expected = rows.mean() if reduction == "mean" else rows.sum()
    exact = torch.autograd.grad(expected, (*batch.inputs, *batch.parameters), allow_unused=True)

    inputs = [split(x, of_ranks, rank) for x, of_ranks in zip(batch.inputs, lengths, strict=True)]
    parameters = [x.detach().clone().requires_grad_() for x in batch.parameters]
    *encoders, scale, bias = parameters
    keys = sum(lengths[-1])
    value = loss.call(
        encode(inputs, encoders),
        scale,
        bias,
        sum(pairs[:rank]),
        keys,
        reduction=reduction,
        group=dist.group.WORLD,
        exchange=exchange,
        backend="tiled",
    )
    found = torch.autograd.grad(value, (*inputs, *parameters), allow_unused=True)

    torch.testing.assert_close(value, expected, rtol=EXACT, atol=EXACT)
    for x, gradient, of_ranks in zip(exact, found, lengths, strict=False):
        # The other ranks' gradients of these rows are 0, so that their mean over ranks is a sum divided by size.
        torch.testing.assert_close(gradient / size, x.split(of_ranks)[rank], rtol=EXACT, atol=EXACT)
    for x, gradient in zip(exact[len(inputs) :], found[len(inputs) :], strict=True):
        if x is None:
            assert gradient is None
            continue
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient / size, x, rtol=EXACT, atol=EXACT)


# An option changes nothing in how shards meet: three ranks, equal and unequal and empty shards, say all of it.
EVERY_WORLD = ("nt_xent", "info_nce", "info_nce_target", "info_nce_negatives", "clip")
WORLDS = [(name, size) for name in LOSSES for size in (SIZES if name in EVERY_WORLD else (3,))]


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_value_and_gradients_are_those_of_the_global_batch(worlds, size: int, exchange: str, name: str) -> None:
    for k, pairs in enumerate(shards_of(size)):
        worlds(size).run(check_against_the_global_batch, name, pairs, exchange, ("mean", "sum")[k % 2])


def check_rows(rank: int, exchange: str) -> None:
    """reduction="none": the objective is the mean over ranks of what each makes of its rows, here a weighted sum."""
    pairs = [2, 5, 3]
    x, y = (t.detach() for t in make_batch([10, 10]).inputs)
    z = [split(t, pairs, rank) for t in (x, y)]
    weights = torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # The reference's rows are all of z1, then all of z2; a rank's are its own of z1, then its own of z2.
    own = torch.cat([part.split(pairs)[rank] for part in weights.split(10)])
    rows = fastcl.nt_xent(*z, 0.3, reduction="none", group=dist.group.WORLD, exchange=exchange, backend="tiled")
    assert rows.shape == (2 * pairs[rank],)
    found = torch.autograd.grad((rows * own).sum(), z)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    exact = torch.autograd.grad((nt_xent_reference(*leaves, 0.3) * weights).sum(), leaves)
    for gradient, everything in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient, everything.split(pairs)[rank], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_rows_carry_gradients_to_every_rank(worlds, exchange: str) -> None:
    worlds(3).run(check_rows, exchange)


def check_subgroups(rank: int) -> float | None:
    three, one = dist.new_group([0, 2, 3]), dist.new_group([1])
    x, y = (t.detach() for t in make_batch([9, 9]).inputs)
    group, pairs = (one, [9]) if rank == 1 else (three, [4, 2, 3])
    z = [split(t, pairs, group.rank()) for t in (x, y)]
    loss = fastcl.clip_loss(*z, 3.0, group=group, exchange="ring", backend="tiled")
    loss.backward()
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    expected = clip_reference(*leaves, 3.0).mean()
    torch.testing.assert_close(loss, expected, rtol=EXACT, atol=EXACT)
    for t, exact in zip(z, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(t.grad / group.size(), exact.split(pairs)[group.rank()], rtol=EXACT, atol=EXACT)
    other = three if rank == 1 else one
    with pytest.raises(TypeError, match="that this rank belongs to"):
        fastcl.clip_loss(*z, 3.0, group=other)


def test_any_subgroup(worlds) -> None:
    worlds(4).run(check_subgroups)


def check_primitive(rank: int, exchange: str) -> None:
    """Every kind of term, a bias, and ranks with fewer rows than keys, against the same call on one rank."""
    rows, keys = [3, 0, 2], [2, 4, 3]
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(sum(n), DIM, generator=generator, dtype=torch.float64) for n in (rows, keys))
    target = torch.tensor([8, 3, -1, 0, 3])
    masks = (Mask(), Mask(self_pair=False), Mask(self_pair=True), Mask(target=True), Mask(False, False))
    terms = [Term(reduce, mask, axis) for reduce in Reduce for mask in masks for axis in Axis]
    unknown = [Term(Reduce.SUM, mask, Axis.COLUMN) for mask in masks if mask.target is not None]
    with_bias = [term for term in terms if term not in unknown]
    for chosen, bias in ((terms, None), (with_bias, 0.3)):
        everything = fastcl.pairwise(a, b, chosen, 2.0, bias, target=target, backend="dense")
        shard = [x.split(n)[rank] for x, n in ((a, rows), (b, keys))]
        found = fastcl.pairwise(
            *shard,
            chosen,
            2.0,
            bias,
            target=target.split(rows)[rank],
            group=dist.group.WORLD,
            exchange=exchange,
            backend="tiled",
        )
        for term, mine, whole in zip(chosen, found, everything, strict=True):
            lengths = rows if term.axis is Axis.ROW else keys
            torch.testing.assert_close(mine, whole.split(lengths)[rank], rtol=EXACT, atol=EXACT, msg=str(term))
    symmetric = [t for t in terms if t.axis is Axis.ROW]
    partner = torch.tensor([1, 0, 1, 2, 0])  # within each rank's own rows
    own = partner.split(rows)[rank]
    everything = fastcl.pairwise(
        a, None, symmetric, 2.0, 0.3, target=partner + torch.tensor([0, 0, 0, 3, 3]), backend="dense"
    )
    found = fastcl.pairwise(
        a.split(rows)[rank], None, symmetric, 2.0, 0.3, target=own.clamp(max=max(rows[rank] - 1, 0)),
        group=dist.group.WORLD, exchange=exchange, backend="tiled",
    )  # fmt: skip
    if rank == 0:  # whose partners are all in range
        for term, mine, whole in zip(symmetric, found, everything, strict=True):
            torch.testing.assert_close(mine, whole.split(rows)[0], rtol=EXACT, atol=EXACT, msg=str(term))


@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_primitive(worlds, exchange: str) -> None:
    worlds(3).run(check_primitive, exchange)


def check_stats(rank: int) -> None:
    pairs = [3, 0, 6]
    x, y = (t.detach() for t in make_batch([9, 9]).inputs)
    z = [t.split(pairs)[rank] for t in (x, y)]
    target = torch.tensor([1, -1, 0, -100, 5, 2, 8, 7, 3])
    for call in (
        lambda x, y, _, **options: fastcl.nt_xent(x, y, 0.3, **options),
        lambda x, y, _, **options: fastcl.clip_loss(x, y, 3.0, 0.5, **options),
        lambda x, y, target, **options: fastcl.info_nce(x, y, 0.3, target=target, **options),
        lambda x, y, _, **options: fastcl.clip_distillation_loss(x, y, 3.0, y, x, 2.0, **options),
        lambda x, y, _, **options: fastcl.alpha_cl_loss(x, y, 0.3, **options),
        lambda x, y, _, backend, **options: fastcl.spectral_contrastive_loss(x, y, **options),
        lambda x, y, _, **options: fastcl.multiple_negatives_ranking_loss(x, y, 0.3, directions=DIRECTIONS, **options),
        lambda x, _, target, **options: fastcl.contrastive_loss(x, target.clamp_min(0) // 3, **options),
    ):
        options = {"return_stats": True, "backend": "tiled"}
        loss, stats = call(*z, target.split(pairs)[rank], group=dist.group.WORLD, **options)
        whole, expected = call(x, y, target, **options)
        torch.testing.assert_close(loss, whole, rtol=EXACT, atol=EXACT)
        for mine, theirs in zip(stats, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=EXACT, atol=EXACT)


def test_diagnostics_are_those_of_the_global_batch(worlds) -> None:
    worlds(3).run(check_stats)


def count_passes(rank: int, plan: str, exchange: str, rows: int) -> tuple[float, float]:
    """This rank's forward and backward work, in sweeps of the global N * N * D."""
    tiled._TILE_ON_CPU = 4
    decoded, size = Plan.decode(plan), dist.get_world_size()
    a, b = torch.randn(2, rows, DIM)
    operands = Operands(a, None if decoded.symmetric else b, torch.tensor(2.0), torch.arange(rows).roll(1))
    shards = distributed.Shards(
        decoded, operands, Ranks.of(dist.group.WORLD.group_name), [rows] * size, [rows] * size, exchange, "tiled"
    )
    found = shards.statistics()
    passes = []
    for run in (
        shards.statistics,
        lambda: shards.products(found, found, needs_a=True, needs_b=not decoded.symmetric),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        passes.append(counter.get_total_flops() / (2 * (rows * size) ** 2 * DIM))
    return passes[0], passes[1]


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("plan", "passes"),
    [
        ("general lse:row:-self_pair lse:column:-self_pair sum:row:+self_pair", (1.0, 3.0)),
        ("general lse:row:-self_pair sum:row:+self_pair", (1.0, 3.0)),
        ("symmetric lse:row:-self_pair,-target sum:row:+target", (0.5, 1.5)),
    ],
    ids=["clip", "info_nce", "nt_xent"],
)
def test_each_tile_is_computed_once_over_all_ranks(worlds, size: int, exchange: str, plan: str, passes) -> None:
    rows = 8
    of_ranks = worlds(size).run(count_passes, plan, exchange, rows)
    symmetric = plan.startswith("symmetric")
    # The tiles on the diagonal are computed whole, and are one product backward where others are two.
    diagonal = 4 / (rows * size) / 2 if symmetric else 0.0
    forward, backward = (sum(which) for which in zip(*of_ranks, strict=True))
    assert forward == pytest.approx(passes[0] + diagonal)
    assert backward == pytest.approx(passes[1] + diagonal)
    for mine in of_ranks:
        assert mine == pytest.approx((forward / size, backward / size))


class LargestTensor(TorchDispatchMode):
    """Sees the rows of the longest matrix of features or gradients that any operation makes."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == DIM:
                self.rows = max(self.rows, x.shape[0])
        return result


def longest_matrix(rank: int, plan: str, exchange: str, rows: int) -> int:
    decoded, size = Plan.decode(plan), dist.get_world_size()
    a, b = torch.randn(2, rows, DIM)
    operands = Operands(a, None if decoded.symmetric else b, torch.tensor(2.0), torch.arange(rows))
    shards = distributed.Shards(
        decoded, operands, Ranks.of(dist.group.WORLD.group_name), [rows] * size, [rows] * size, exchange, "tiled"
    )
    with LargestTensor() as seen, torch.no_grad():
        found = shards.statistics()
        shards.products(found, found, needs_a=True, needs_b=not decoded.symmetric)
    return seen.rows


@pytest.mark.parametrize(
    "plan", ["general lse:row:-self_pair lse:column:-self_pair", "symmetric lse:row:-self_pair sum:row:+target"]
)
def test_a_ring_holds_no_more_than_a_shard_at_a_time(worlds, plan: str) -> None:
    assert worlds(4).run(longest_matrix, plan, "ring", 32) == [32] * 4
    assert worlds(4).run(longest_matrix, plan, "gather", 32) == [128] * 4


def chosen(rank: int, limit: int) -> str:
    operands = Operands(torch.zeros(8, 4), torch.zeros(8, 4), torch.tensor(1.0))
    shards = distributed.Shards(Plan(()), operands, Ranks.of(dist.group.WORLD.group_name), [8, 8], [8, 8], "auto", None)
    before, distributed.GATHER_LIMIT = distributed.GATHER_LIMIT, limit
    try:
        return type(shards._travel()).__name__
    finally:
        distributed.GATHER_LIMIT = before


def test_auto_gathers_while_keys_and_their_accumulators_are_small(worlds) -> None:
    needed = 16 * 4 * (4 + 4)
    assert worlds(2).run(chosen, needed) == ["Gather"] * 2
    assert worlds(2).run(chosen, needed - 1) == ["Ring"] * 2


def bits(rank: int, name: str, exchange: str, sleepers: tuple[int, ...]) -> list[bytes]:
    """Loss and gradients in float32, as bytes, with these ranks late at every tile."""
    loss, pairs = LOSSES[name], [5, 2, 6, 3]
    lengths = local_lengths(loss, pairs)
    batch = make_batch([sum(of_ranks) for of_ranks in lengths], torch.float32)
    inputs = [split(x, of_ranks, rank) for x, of_ranks in zip(batch.inputs, lengths, strict=True)]
    originals = engine.statistics, engine.products
    if rank in sleepers:
        engine.statistics, engine.products = (_late(original) for original in originals)
    try:
        value = loss.call(
            inputs,
            batch.scale,
            batch.bias,
            sum(pairs[:rank]),
            sum(lengths[1]),
            group=dist.group.WORLD,
            exchange=exchange,
        )
        gradients = torch.autograd.grad(value, (*inputs, batch.scale))
    finally:
        engine.statistics, engine.products = originals
    return [x.detach().numpy().tobytes() for x in (value, *gradients)]


def _late(function: Callable) -> Callable:
    def late(*args, **kwargs):
        time.sleep(0.03)
        return function(*args, **kwargs)

    return late


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize("name", ["nt_xent", "clip"])
def test_order_of_arrival_changes_no_bit(worlds, name: str, exchange: str) -> None:
    on_time = worlds(4).run(bits, name, exchange, ())
    assert len({result[0] for result in on_time}) == 1, "the loss is the same on every rank"
    for sleepers in ((0,), (1, 2), (3,)):
        assert worlds(4).run(bits, name, exchange, sleepers) == on_time


def adversarial(rank: int, backend: str, exchange: str) -> float:
    """The largest relative error of float32 gradients at a temperature of 0.01, where ranks differ in norm by 30."""
    generator = torch.Generator().manual_seed(3)
    x = torch.nn.functional.normalize(torch.randn(24, 8, generator=generator, dtype=torch.float64), dim=1)
    y = torch.nn.functional.normalize(x + 0.3 * torch.randn(24, 8, generator=generator, dtype=torch.float64), dim=1)
    norms = torch.tensor([1.0, 0.03, 0.5]).double().repeat_interleave(8)[:, None]
    x, y = (norms * x).float().double(), (norms.flip(0) * y).float().double()
    y[3], x[20] = y[12], -x[12]  # a duplicate, and an opposite
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    exact = torch.autograd.grad(clip_reference(*leaves, 100.0).sum(), leaves)
    z = [t.float().split(8)[rank].clone().requires_grad_() for t in (x, y)]
    loss = fastcl.clip_loss(*z, 100.0, reduction="sum", group=dist.group.WORLD, exchange=exchange, backend=backend)
    found = torch.autograd.grad(loss, z)
    assert math.isfinite(loss)
    return max(relative_error(g / 3, e.split(8)[rank]) for g, e in zip(found, exact, strict=True))


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize("backend", available_backends())
def test_tiles_whose_logits_are_far_apart(worlds, backend: str, exchange: str) -> None:
    assert max(worlds(3).run(adversarial, backend, exchange)) < 1e-5


def half_precision(rank: int, dtype: torch.dtype, exchange: str) -> float:
    pairs = [9, 4, 12]
    x, y = (t.detach().to(dtype) for t in make_batch([25, 25]).inputs)
    leaves = [t.double().requires_grad_() for t in (x, y)]
    exact = torch.autograd.grad(clip_reference(*leaves, 2.0, normalize=True).mean(), leaves)
    z = [t.split(pairs)[rank].clone().requires_grad_() for t in (x, y)]
    loss = fastcl.clip_loss(*z, 2.0, normalize=True, group=dist.group.WORLD, exchange=exchange)
    found = torch.autograd.grad(loss, z)
    assert all(g.dtype is dtype for g in found)
    return max(relative_error(g / 3, e.split(pairs)[rank]) for g, e in zip(found, exact, strict=True))


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_half_precision(worlds, dtype: torch.dtype, tolerance: float, exchange: str) -> None:
    assert max(worlds(3).run(half_precision, dtype, exchange)) < tolerance


def check_second_derivative(rank: int) -> None:
    z = [t.detach().clone().requires_grad_() for t in make_batch([4, 4]).inputs]
    loss = fastcl.clip_loss(*z, 2.0, group=dist.group.WORLD)
    (gradient, _) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_second_derivative_is_refused(worlds) -> None:
    worlds(2).run(check_second_derivative)
