"""Time and memory of one loss step over many ranks, from a machine's latencies (α) and bandwidths (β).

    python -m benchmarks.scaling_model               # the tables and the picture of docs/many-ranks.md
    python -m benchmarks.scaling_model --validate    # the model's terms against gloo runs on this machine

Nothing here was run on a GPU: the machine's figures are inputs, and `tests/test_scaling_model.py` holds the number of
messages, their bytes and the memory against what the exchanges of :mod:`fastcl.exchange` do.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANKS = (8, 32, 128, 512, 1024, 4096)
BATCHES = (1 << 15, 1 << 18, 1 << 20, 12 << 20, 100_000_000)


@dataclass(frozen=True)
class Link:
    """A message of b bytes takes ``latency + b / bandwidth`` seconds."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """What the model knows of a machine; bandwidths are of one direction of one rank."""

    name: str
    flops: float
    """floating-point operations a second of the tile engine on one rank"""
    per_tile: float
    """seconds to start the engine on a tile"""
    per_node: int
    inside: Link
    """between two ranks of a node"""
    between: Link
    """from a rank of one node to a rank of the next, over its own adapter"""
    overlaps: bool = True
    """whether messages travel while tiles are computed"""

    def neighbours(self, ranks: int) -> Link:
        """The slowest link of a ring over all ranks."""
        return self.inside if ranks <= self.per_node else self.between

    def collective(self, ranks: int) -> Link:
        """Of a collective, whose rings use every adapter of a node; the latency is that of all its steps."""
        nodes = math.ceil(ranks / self.per_node)
        latency = (ranks - nodes) * self.inside.latency + (nodes - 1) * self.between.latency
        fastest = self.inside.bandwidth
        return Link(latency, fastest if nodes == 1 else min(fastest, self.per_node * self.between.bandwidth))


H100 = Machine(
    "8 x H100 a node, NVLink 4, one 400 Gb/s adapter each",
    flops=400e12,
    per_tile=100e-6,
    per_node=8,
    inside=Link(8e-6, 370e9),
    between=Link(15e-6, 45e9),
)
"""Assumed, not measured: 40 % of the bf16 peak for the tiles, 100 µs of host time to start one, and for the links what
NCCL's tests commonly reach."""


@dataclass(frozen=True)
class Problem:
    """One step of ``clip`` or ``nt_xent`` over a global batch of pairs; features of ``itemsize`` bytes."""

    loss: str
    pairs: int
    dim: int
    itemsize: int = 2

    @property
    def symmetric(self) -> bool:
        return self.loss == "nt_xent"

    @property
    def rows(self) -> int:
        return 2 * self.pairs if self.symmetric else self.pairs


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in one step."""

    messages: int
    bytes: float


@dataclass(frozen=True)
class Prediction:
    """One rank's step: seconds in all, of arithmetic, and of what arithmetic doesn't hide; bytes beyond the inputs."""

    seconds: float
    compute: float
    exposed: float
    traffic: Traffic
    memory: float


def predict(problem: Problem, machine: Machine, ranks: int, exchange: str) -> Prediction:
    """Forward and backward over ``ranks`` equal shards by "ring" or "gather".

    >>> small = Problem("clip", 4096, 512)
    >>> predict(small, H100, 8, "gather").seconds < predict(small, H100, 8, "ring").seconds
    True
    >>> large = Problem("clip", 100_000_000, 512)
    >>> predict(large, H100, 1024, "ring").memory < 1e-2 * predict(large, H100, 1024, "gather").memory
    True
    """
    return (_ring if exchange == "ring" else _gather)(problem, machine, ranks)


def _tiles(problem: Problem, ranks: int) -> list[float]:
    """The forward's multiply-adds of one rank, hop by hop; backward takes three times as many."""
    whole = (problem.rows / ranks) ** 2 * problem.dim
    if not problem.symmetric:
        return [whole] * ranks
    halves = [whole / 2] if ranks % 2 == 0 else []
    return [whole / 2] + [whole] * ((ranks - 1) // 2) + halves


def _ring(problem: Problem, machine: Machine, ranks: int) -> Prediction:
    tiles, rows = _tiles(problem, ranks), problem.rows / ranks
    hops, link = len(tiles) - 1, machine.neighbours(ranks)
    features, accumulators, vector = rows * problem.dim * problem.itemsize, 4 * rows * problem.dim, 4 * rows
    seconds = compute = 0.0
    # Statistics go home as vectors of float64; in the backward they and their gradients travel, accumulators go home.
    for passes, shard, home in ((1, [features], 2 * vector), (3, [features, vector, vector], accumulators)):
        arrives = link.latency * (len(shard) - 1) + link.seconds(sum(shard))
        for hop, tile in enumerate(tiles):
            arithmetic = passes * 2 * tile / machine.flops
            work = machine.per_tile + arithmetic
            wire = (arrives if hop < hops else 0.0) + (link.seconds(home) if hop >= 2 else 0.0)
            compute += arithmetic
            seconds += max(work, wire) if machine.overlaps else work + wire
        seconds += link.seconds(home) if hops else 0.0
    traffic = Traffic(6 * hops, hops * (2 * features + 4 * vector + accumulators))
    # Two visitors; and of accumulators: the rows', the owner's, a tile's two products, one in, one out.
    memory = 2 * features + 6 * accumulators
    seconds += _small_collectives(machine, ranks)
    return Prediction(seconds, compute, seconds - compute, traffic, memory)


def _gather(problem: Problem, machine: Machine, ranks: int) -> Prediction:
    rows, link = problem.rows / ranks, machine.collective(ranks)
    # All columns are one tile; of a half ring there are the diagonal one, two runs of whole ones, and a half one.
    starts = 2 * (1 if not problem.symmetric else min(ranks, 4)) * machine.per_tile
    compute = 8 * sum(_tiles(problem, ranks)) / machine.flops
    others = (ranks - 1) * rows
    features, accumulators, vector = others * problem.dim * problem.itemsize, 4 * others * problem.dim, 4 * others
    sizes = [features, 2 * vector, features, vector, vector, accumulators] if ranks > 1 else []
    exposed = starts + sum(link.seconds(size) for size in sizes) + _small_collectives(machine, ranks)
    # All keys and the accumulators of their gradient; the rows' accumulators and a tile's product for them. A half
    # ring's few tiles add up in the keys' accumulators from a copy of their own.
    copies = 1 if not problem.symmetric else 1.5
    whole = problem.rows * problem.dim
    memory = whole * problem.itemsize + copies * 4 * whole + 2 * 4 * rows * problem.dim
    return Prediction(compute + exposed, compute, exposed, Traffic(len(sizes), sum(sizes)), memory)


def _small_collectives(machine: Machine, ranks: int) -> float:
    """The handshake and the sum of the loss: a few bytes, in trees."""
    return 2 * 2 * math.ceil(math.log2(ranks)) * machine.neighbours(ranks).latency if ranks > 1 else 0.0


def table(problems: Sequence[Problem], machine: Machine, ranks: Sequence[int]) -> list[str]:
    """The predictions as lines of Markdown."""
    lines = [
        "| loss | pairs | dim | GPUs | ring, s | not arithmetic | ring, GB | gather, s | gather, GB |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for problem in problems:
        for size in ranks:
            ring, gather = (predict(problem, machine, size, exchange) for exchange in ("ring", "gather"))
            lines.append(
                f"| `{problem.loss}` | {problem.pairs:,} | {problem.dim} | {size:,} | {ring.seconds:.3g} "
                f"| {ring.exposed / ring.seconds:.0%} | {ring.memory / 1e9:.3g} "
                f"| {gather.seconds:.3g} | {gather.memory / 1e9:.3g} |"
            )
    return lines


def draw(machine: Machine, dim: int, path: Path) -> None:
    """Time and memory of a CLIP step against the number of GPUs, a line for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for k, pairs in enumerate(BATCHES):
        for exchange, style in (("ring", "-o"), ("gather", "--")):
            found = [predict(Problem("clip", pairs, dim), machine, ranks, exchange) for ranks in RANKS]
            label = f"{pairs:,} pairs" if exchange == "ring" else None
            time_axes.plot(RANKS, [each.seconds for each in found], style, color=f"C{k}", markersize=4, label=label)
            memory_axes.plot(RANKS, [each.memory / 1e9 for each in found], style, color=f"C{k}", markersize=4)
    memory_axes.axhline(80, color="k", linewidth=0.8)
    memory_axes.annotate("80 GB", (RANKS[-1], 80), ha="right", va="bottom", fontsize=8)
    published = {8: (4_096, 26.12), 32: (12_288, 19.59)}
    for ranks, (thousands, gigabytes) in published.items():
        memory_axes.plot(ranks, gigabytes, "k*", markersize=9)
        memory_axes.annotate(
            f"Inf-CL, {thousands:,}k pairs", (ranks, gigabytes), (-2, -14), textcoords="offset points", fontsize=8
        )
    for axes, name in ((time_axes, "forward + backward, s"), (memory_axes, "memory of the loss beyond its inputs, GB")):
        axes.set(yscale="log", xlabel="GPUs", ylabel=name)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    time_axes.plot([], [], "k-o", markersize=4, label="ring")
    time_axes.plot([], [], "k--", label="gather")
    time_axes.legend(fontsize=8)
    figure.suptitle(f"Model, not measurement: CLIP, dim {dim}, bf16; {machine.name}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validate", action="store_true", help="run gloo ranks on this machine instead")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "many-ranks.png")
    parser.add_argument("--flops", type=float, default=H100.flops, help="of the tile engine on one GPU")
    parser.add_argument("--nvlink", type=float, nargs=2, default=(H100.inside.latency, H100.inside.bandwidth))
    parser.add_argument("--infiniband", type=float, nargs=2, default=(H100.between.latency, H100.between.bandwidth))
    args = parser.parse_args()
    if args.validate:
        from benchmarks.scaling_check import validate

        print("\n".join(validate()))
        return
    machine = Machine(H100.name, args.flops, H100.per_tile, H100.per_node, Link(*args.nvlink), Link(*args.infiniband))
    problems = [Problem("clip", pairs, args.dim) for pairs in BATCHES] + [Problem("nt_xent", 1 << 20, 128)]
    print("\n".join(table(problems, machine, RANKS)))
    draw(machine, args.dim, args.picture)


if __name__ == "__main__":
    main()
