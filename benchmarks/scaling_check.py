"""The terms of :mod:`benchmarks.scaling_model` against gloo ranks that share one core of this machine.

The time is CPU time, of all ranks together: on one core nothing overlaps and the ranks take turns, and the machine's
other processes don't count. So what is checked is that the model counts the right tiles, messages, bytes and buffers,
with the rates of this machine measured apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import fastcl
from benchmarks.environment import cpu_name
from benchmarks.measure import peak_memory
from benchmarks.scaling_model import Link, Machine, Problem, predict
from fastcl import distributed
from fastcl.exchange import Ranks
from fastcl.terms import Operands, Plan
from tests.ranks import World

SIZES = (1 << 12, 1 << 18, 1 << 22, 1 << 24)
PROBLEMS = [Problem(loss, pairs, 256, 4) for loss in ("clip", "nt_xent") for pairs in (768, 3072)]
REPEATS = 5


def _seconds(step: Callable[[], object]) -> float:
    """This rank's CPU time for a step: the least of a few runs, which the machine's other work disturbed the least."""
    samples = []
    for _ in range(REPEATS):
        dist.barrier()
        began = time.process_time()
        step()
        dist.barrier()
        samples.append(time.process_time() - began)
    return min(samples)


def barrier_seconds(rank: int) -> float:
    return _seconds(lambda: None)


def swap_seconds(rank: int, size: int) -> float:
    ranks, message = Ranks.of(dist.group.WORLD.group_name), torch.zeros(size // 4)
    return _seconds(lambda: ranks.swap([message], rank + 1, [torch.empty_like(message)], rank - 1).wait())


def collective_seconds(rank: int, size: int) -> float:
    ranks, message = Ranks.of(dist.group.WORLD.group_name), torch.zeros(size // 4)
    return _seconds(lambda: ranks.all_gather(message, [len(message)] * ranks.size))


def step_seconds(rank: int, problem: Problem, exchange: str) -> float:
    step = _step(problem, exchange)
    step()
    return _seconds(step)


def step_memory(rank: int, problem: Problem, exchange: str) -> int:
    step = _step(problem, exchange)
    step()
    dist.barrier()
    return peak_memory(step, "cpu")


def tile_seconds(rank: int, problem: Problem) -> float:
    """A pass over one rank's tile, the engine alone, in a world of one."""
    plan = Plan.decode("general lse:row:-* lse:column:-* sum:row:+*")
    a, b = (torch.nn.functional.normalize(torch.randn(problem.pairs, problem.dim), dim=1) for _ in range(2))
    shards = distributed.Shards(
        plan, Operands(a, b, torch.tensor(10.0), norm_bound=1.0), Ranks.of(dist.group.WORLD.group_name),
        [problem.pairs], [problem.pairs], "ring", None,
    )  # fmt: skip
    found = shards.statistics()
    return _seconds(lambda: (shards.statistics(), shards.products(found, found, needs_a=True, needs_b=True))) / 4


def _step(problem: Problem, exchange: str) -> Callable[[], object]:
    pairs = problem.pairs // dist.get_world_size()
    x, y = (torch.nn.functional.normalize(torch.randn(pairs, problem.dim), dim=1).requires_grad_() for _ in range(2))
    options = {"group": dist.group.WORLD, "exchange": exchange, "normalize": False}
    if problem.loss == "clip":
        return lambda: torch.autograd.grad(fastcl.clip_loss(x, y, 10.0, **options), (x, y))
    return lambda: torch.autograd.grad(fastcl.nt_xent(x, y, 0.1, **options), (x, y))


def _fit(points: list[tuple[int, float]]) -> Link:
    """Latency from the smallest message, bandwidth from the largest."""
    (small, fast), (large, slow) = points[0], points[-1]
    bandwidth = (large - small) / (slow - fast)
    return Link(max(fast - small / bandwidth, 1e-7), bandwidth)


def validate() -> list[str]:
    """Runs worlds of 1 to 4 ranks; Markdown lines with the prediction beside the measurement."""
    # Freed blocks go back to the system, so that resident memory is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    lines = [
        f"{cpu_name()}, one core, gloo; CPU time of all ranks, float32, dim 256",
        "",
        "| ranks | GFLOP/s | loss | pairs | exchange | predicted, ms | measured, ms | ratio |",
        "| --: | --: | --- | --: | --- | --: | --: | --: |",
    ]
    for size in (2, 3, 4):
        flops, per_tile = _engine()
        world = World(size)
        idle = sum(world.run(barrier_seconds))
        swap, collective = (
            _fit([(length, sum(world.run(seconds, length)) - idle) for length in SIZES])
            for seconds in (swap_seconds, collective_seconds)
        )
        # An all-gather of b bytes from each rank receives (size - 1) * b, which is what the model counts.
        collective = Link(collective.latency, collective.bandwidth * (size - 1))
        for problem in PROBLEMS:
            for exchange, link in (("ring", swap), ("gather", collective)):
                per_step = Link(link.latency / (1 if exchange == "ring" else size - 1), link.bandwidth)
                machine = Machine("this core", flops / size, size * per_tile, size, per_step, per_step, overlaps=False)
                expected = predict(problem, machine, size, exchange).seconds
                found = sum(world.run(step_seconds, problem, exchange)) - idle
                case = f"| {size} | {flops / 1e9:.0f} | `{problem.loss}` | {problem.pairs:,} | {exchange} "
                lines.append(f"{case}| {1e3 * expected:.1f} | {1e3 * found:.1f} | {found / expected:.2f} |")
        world.close()
    return [*lines, "", *_memory()]


def _engine() -> tuple[float, float]:
    """The rate of the tile engine alone, and the seconds to start it on a tile."""
    world, pairs = World(1), 1024
    tiny, large = (world.run(tile_seconds, Problem("clip", n, 256, 4))[0] for n in (8, pairs))
    world.close()
    return 2 * pairs**2 * 256 / (large - tiny), 2 * tiny


def _memory() -> list[str]:
    lines = ["| ranks | loss | exchange | predicted, MB | measured, MB |", "| --: | --- | --- | --: | --: |"]
    world = World(4)
    for problem in (Problem("clip", 2048, 4096, 4), Problem("nt_xent", 1024, 4096, 4)):
        for exchange in ("ring", "gather"):
            expected = predict(problem, Machine("", 1, 0, 4, Link(0, 1), Link(0, 1)), 4, exchange).memory
            found = max(world.run(step_memory, problem, exchange))
            lines.append(f"| 4 | `{problem.loss}` | {exchange} | {expected / 1e6:.0f} | {found / 1e6:.0f} |")
    world.close()
    return lines
