"""Plans over the union of the shards of many ranks: each tile of the global S is computed once, on one of them.

May import :mod:`fastcl.terms`, :mod:`fastcl.backends`, :mod:`fastcl.engine` and :mod:`fastcl.exchange`. It owns the
operators that :func:`fastcl.pairwise` calls for a process group, and with them which rank computes which tile. Their
autograd is the exact adjoint of the exchange: a rank's gradients are those of the sum of all ranks' objectives.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl import engine
from fastcl.backends.pairs import merge, neutral
from fastcl.exchange import Gather, Ranks, Ring, meet
from fastcl.terms import Axis, Needs, Operands, Plan, Products, Statistics, Tags, Term, accumulation_dtype, split_tags

EXCHANGES = ("auto", "ring", "gather")

GATHER_LIMIT = 1 << 28
"""``exchange="auto"`` gathers while all keys, and the accumulators of their gradient, take no more bytes than this"""


class Tile(NamedTuple):
    """A block of the global S that this rank computes: its own ``rows``, and ``columns`` of the global S."""

    plan: Plan
    rows: slice
    columns: slice


def tiles(plan: Plan, rows: Sequence[int], columns: Sequence[int], rank: int) -> list[Tile]:
    """The blocks that a rank computes, in the order in which a ring brings them; ``rows[r]`` is the length of shard r.

    A general plan meets every shard. A symmetric plan meets the half of them that follow, because one block serves
    the rows of both sides; for an even number of ranks, the two that are opposite halve the block between them.
    """
    size, ends = len(columns), list(accumulate(columns))

    def block(plan: Plan, owner: int, kept: slice = slice(None), seen: slice = slice(None)) -> Tile:
        start = ends[owner] - columns[owner]
        first, last, _ = seen.indices(columns[owner])
        return Tile(plan, slice(*kept.indices(rows[rank])), slice(start + first, start + last))

    if not plan.symmetric:
        return [block(plan, (rank - hop) % size) for hop in range(size)]
    between = between_shards(plan)
    found = [block(plan, rank)] + [block(between, (rank - hop) % size) for hop in range(1, (size + 1) // 2)]
    if size % 2 == 0:
        other = (rank - size // 2) % size
        half = (columns[min(rank, other)] + 1) // 2
        kept, seen = (slice(half), slice(None)) if rank < other else (slice(None), slice(half, None))
        found.append(block(between, other, kept, seen))
    return found


def between_shards(plan: Plan) -> Plan:
    """A symmetric plan on the block between two shards, as a general plan: each row term, and its twin along columns.

    A row's self and its target are in its own shard, so the tests for them are settled: what requires one admits
    nothing, and what forbids one admits everything.
    """
    terms = [plan.terms[k] for k in crossing(plan)]
    masks = [replace(term.mask, self_pair=None, target=None) for term in terms]
    return Plan(
        tuple(Term(t.reduce, mask, axis) for axis in Axis for t, mask in zip(terms, masks, strict=True)),
        label_width=plan.label_width,
    )


def crossing(plan: Plan) -> list[int]:
    """Which row terms admit pairs of two shards."""
    return [k for k, term in enumerate(plan.rows) if not (plan.symmetric and term.mask.is_sparse)]


@dataclass(frozen=True)
class Shards:
    """One rank's part in a plan: its own operands, and the lengths of everybody's shards.

    ``operands.target`` names columns of the global S, or of this rank's shard where the plan is symmetric.
    """

    plan: Plan
    operands: Operands
    ranks: Ranks
    rows: list[int]
    columns: list[int]
    exchange: str
    backend: str | None

    def statistics(self) -> Statistics:
        """The statistics of this rank's rows, and of its columns, over the global S.

        They are merged in float64, because thousands of ranks make thousands of roundings.
        """
        own, crosses, seen_terms = self.operands, crossing(self.plan), self._seen_terms
        rows = _neutral(self.plan.rows, own.shape[0], own)

        def visit(first: int, stop: int, tensors: Sequence[Tensor]) -> Tensor | None:
            columns = _neutral(seen_terms, stop - first, own)
            for tile, operands in self._meetings(first, stop, tensors):
                found = engine.statistics(tile.plan, operands, self.backend)
                if tile.plan.symmetric:
                    _merge_into(rows, range(len(rows)), tile.plan.rows, found.rows)
                else:
                    _merge_into(rows[:, tile.rows], crosses, tile.plan.rows, found.rows)
                    part = columns[:, _shift(tile.columns, -first)]
                    _merge_into(part, range(len(part)), seen_terms, found.columns)
            return columns.T.contiguous() if seen_terms else None

        def merge_seen(x: Tensor, y: Tensor) -> Tensor:
            return torch.stack([merge(t.reduce, x[:, k], y[:, k]) for k, t in enumerate(seen_terms)], dim=1)

        returned = self._travel().run(self._keys, visit, merge_seen)
        columns = _neutral((), own.shape[1], own) if returned is None else returned.T.contiguous()
        if self.plan.symmetric:
            _merge_into(rows, crosses, seen_terms, columns)
            columns = columns[:0]
        return Statistics(*(x.to(own.accumulation_dtype) for x in (rows, columns)))

    def products(self, statistics: Statistics, incoming: Statistics, *, needs_a: bool, needs_b: bool) -> Products:
        """The gradient's products for this rank's rows, and for its columns, over the global W."""
        own, crosses, symmetric = self.operands, crossing(self.plan), self.plan.symmetric
        returns = needs_a if symmetric else needs_b
        row_vectors = [x.rows[crosses] for x in (statistics, incoming)]
        seen_vectors = row_vectors if symmetric else [x.columns for x in (statistics, incoming)]
        product_a = torch.zeros_like(own.a, dtype=own.accumulation_dtype) if needs_a else None
        compute = functools.partial(engine.products, backend=self.backend)

        def visit(first: int, stop: int, tensors: Sequence[Tensor]) -> Tensor | None:
            keys, vectors = tensors[0], tensors[len(self._keys) :]
            vectors = vectors or [keys.new_empty(len(keys), 0, dtype=own.accumulation_dtype)] * 2
            product_b = None
            for tile, operands in self._meetings(first, stop, tensors):
                columns = _shift(tile.columns, -first)
                if tile.plan.symmetric:
                    found = compute(tile.plan, operands, statistics, incoming, Needs(True, False, False))
                    product_b = _add_rows(product_b, found.a, columns, len(keys))
                    continue
                of_rows = (x[:, tile.rows].contiguous() for x in row_vectors)
                of_columns = (x[columns].T.contiguous() for x in vectors)
                pairs = (Statistics(*pair) for pair in zip(of_rows, of_columns, strict=True))
                found = compute(tile.plan, operands, *pairs, Needs(needs_a, returns, False))
                if needs_a:
                    product_a[tile.rows] += found.a
                if returns:
                    product_b = _add_rows(product_b, found.b, columns, len(keys))
            if returns and product_b is None:
                product_b = keys.new_zeros(keys.shape, dtype=own.accumulation_dtype)
            return product_b

        luggage = [x.T.contiguous() for x in seen_vectors] if self._seen_terms else []
        returned = self._travel().run([*self._keys, *luggage], visit)
        if symmetric:
            return Products(None if returned is None else product_a.add_(returned), None)
        return Products(product_a, returned)

    @property
    def _keys(self) -> list[Tensor]:
        """What a rank shows the others of its keys: the keys themselves, and what masks test about them."""
        return [self.operands.keys, *(tag for tag in self.operands.key_tags if tag is not None)]

    @property
    def _seen_terms(self) -> Sequence[Term]:
        """The terms to which a rank contributes on behalf of the owner of the columns it sees."""
        return between_shards(self.plan).columns if self.plan.symmetric else self.plan.columns

    def _travel(self) -> Ring | Gather:
        keys = self.operands.keys
        needed = sum(self.columns) * keys.shape[1] * (keys.itemsize + self.operands.accumulation_dtype.itemsize)
        if self.exchange == "gather" or (self.exchange == "auto" and needed <= GATHER_LIMIT):
            return Gather(self.ranks, self.columns)
        size = self.ranks.size
        return Ring(self.ranks, self.columns, size // 2 if self.plan.symmetric else size - 1)

    @functools.cached_property
    def _tiles(self) -> list[Tile]:
        """This rank's tiles that hold any pair and any term, by their columns."""
        found = tiles(self.plan, self.rows, self.columns, self.ranks.rank)
        held = (t for t in found if t.rows.start < t.rows.stop and t.columns.start < t.columns.stop and t.plan.terms)
        return sorted(held, key=lambda tile: tile.columns.start)

    def _meetings(self, first: int, stop: int, tensors: Sequence[Tensor]) -> Iterator[tuple[Tile, Operands]]:
        """This rank's tiles with the columns ``first:stop``, neighbours as one; their ``_keys`` come first."""
        own, row0 = self.operands, sum(self.rows[: self.ranks.rank])
        keys, *tags = tensors[: len(self._keys)]
        tags = iter(tags)
        key_tags = Tags(*(None if tag is None else next(tags) for tag in own.key_tags))
        start, end = (bisect.bisect_left(self._tiles, x, key=lambda tile: tile.columns.start) for x in (first, stop))
        for tile in _joined(self._tiles[start:end]):
            if tile.plan.symmetric:
                yield tile, own
                continue
            columns = _shift(tile.columns, -first)
            operands = replace(
                own,
                a=own.a[tile.rows],
                b=keys[columns],
                target=own.target[tile.rows] if tile.plan.tests("target") else None,
                row0=row0 + tile.rows.start,
                col0=tile.columns.start,
                row_tags=own.row_tags.part(tile.rows),
                column_tags=key_tags.part(columns),
            )
            yield tile, operands


def _joined(found: Sequence[Tile]) -> list[Tile]:
    """The same tiles, adjacent ones as one."""
    joined: list[Tile] = []
    for tile in found:
        last = joined[-1] if joined else None
        if last and last[:2] == tile[:2] and last.columns.stop == tile.columns.start:
            joined[-1] = Tile(tile.plan, tile.rows, slice(last.columns.start, tile.columns.stop))
        else:
            joined.append(tile)
    return joined


def _shift(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


def _add_rows(total: Tensor | None, part: Tensor, rows: slice, length: int) -> Tensor:
    """``total[rows] += part``, where None stands for zeros, without a copy of a part that is the whole."""
    if total is None:
        if len(part) == length:
            return part
        total = part.new_zeros(length, part.shape[1])
    total[rows] += part
    return total


def _neutral(terms: Sequence[Term], length: int, operands: Operands) -> Tensor:
    values = torch.empty(len(terms), length, dtype=torch.float64, device=operands.a.device)
    for value, term in zip(values, terms, strict=True):
        value.fill_(neutral(term.reduce))
    return values


def _merge_into(values: Tensor, which: Sequence[int], terms: Sequence[Term], found: Tensor) -> None:
    for k, term, value in zip(which, terms, found, strict=True):
        values[k] = merge(term.reduce, values[k], value.to(values.dtype))


@torch.library.custom_op("fastcl::statistics_over_ranks", mutates_args=())
def statistics_over_ranks(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    tags: Sequence[Tensor | None],
    plan: str,
    norm_bound: float | None,
    backend: str | None,
    group: str,
    exchange: str,
    call: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column statistics of the global S, and the lengths int64 [2, ranks] of everybody's shards.

    ``group`` is the process group's name and ``call`` has a line ``name=value`` for everything that all ranks must
    agree on, besides what is seen here.
    """
    ranks = Ranks.of(group)
    keys = a if b is None else b
    fields = dict(line.split("=", 1) for line in call.split("\n"))
    fields |= {"dtype": str(a.dtype), "dim": str(a.shape[1]), "exchange": exchange, "plan": plan}
    readable = target is not None and target.device.type == "cpu" and target.numel() > 0
    largest = int(target.max()) if readable else -1
    met = meet(ranks, fields, (a.shape[0], keys.shape[0], largest), a.device)
    rows, columns, largest_targets = (list(numbers) for numbers in zip(*met, strict=True))
    _check(rows, columns, largest_targets, b is None)
    operands = Operands(a, b, scale, target, norm_bound, 0, 0, *split_tags(tags))
    shards = Shards(Plan.decode(plan), operands, ranks, rows, columns, exchange, backend)
    return *shards.statistics(), torch.tensor([rows, columns], device="cpu")


def _check(rows: list[int], columns: list[int], targets: list[int], symmetric: bool) -> None:
    # Everything here is known to every rank, so that all of them raise.
    if sum(rows) == 0 or sum(columns) == 0:
        raise ValueError(f"the ranks must hold at least one row, got shards of {rows} rows and {columns} keys")
    for rank, largest in enumerate(targets):
        bound = rows[rank] if symmetric else sum(columns)
        if largest >= bound:
            raise ValueError(f"target must hold indices below {bound}, got {largest} on rank {rank}")


@statistics_over_ranks.register_fake
def _(a, b, scale, target, tags, plan, norm_bound, backend, group, exchange, call):
    decoded, dtype = Plan.decode(plan), accumulation_dtype(a.dtype)
    return (
        a.new_empty((len(decoded.rows), a.shape[0]), dtype=dtype),
        a.new_empty((len(decoded.columns), (a if b is None else b).shape[0]), dtype=dtype),
        torch.empty((2, Ranks.of(group).size), dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("fastcl::gradient_over_ranks", mutates_args=())
def gradient_over_ranks(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    tags: Sequence[Tensor | None],
    rows: Tensor,
    columns: Tensor,
    grad_rows: Tensor,
    grad_columns: Tensor,
    lengths: Tensor,
    plan: str,
    norm_bound: float | None,
    backend: str | None,
    group: str,
    exchange: str,
    needs_a: bool,
    needs_b: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of the gradient; what it is of the scale, the ranks' parts add up to."""
    decoded, operands = Plan.decode(plan), Operands(a, b, scale, target, norm_bound, 0, 0, *split_tags(tags))
    needs = Needs(needs_a, needs_b, needs_scale)
    shards = Shards(decoded, operands, Ranks.of(group), *lengths.tolist(), exchange, backend)
    products = shards.products(
        Statistics(rows, columns),
        Statistics(grad_rows, grad_columns),
        needs_a=needs.product_a,
        needs_b=needs_b,
    )
    gradients = engine.finish(decoded, operands, products, needs)
    return tuple(scale.new_empty(0) if gradient is None else gradient for gradient in gradients)


@gradient_over_ranks.register_fake
def _(a, b, scale, target, tags, rows, columns, grad_rows, grad_columns, lengths, *options):
    *_, needs_a, needs_b, needs_scale = options
    return (
        torch.empty_like(a, memory_format=torch.contiguous_format) if needs_a else scale.new_empty(0),
        torch.empty_like(b, memory_format=torch.contiguous_format) if needs_b else scale.new_empty(0),
        torch.empty_like(scale) if needs_scale else scale.new_empty(0),
    )


def _save_for_gradient(ctx, inputs, output) -> None:
    a, b, scale, target, tags, *options, _ = inputs
    ctx.save_for_backward(a, b, scale, target, *tags, *output)
    ctx.options = options


def _backward(ctx, grad_rows: Tensor, grad_columns: Tensor, _):
    *operands_and_tags, rows, columns, lengths = ctx.saved_tensors
    operands, tags = operands_and_tags[:4], operands_and_tags[4:]
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.fastcl.gradient_over_ranks(
        *operands, tags, rows, columns, grad_rows, grad_columns, lengths, *ctx.options, *needs
    )
    return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *[None] * 8)


def _refuse_double_backward(ctx, *grads: Tensor):
    raise RuntimeError("fastcl's losses can be differentiated once, on one rank or many")


statistics_over_ranks.register_autograd(_backward, setup_context=_save_for_gradient)
gradient_over_ranks.register_autograd(_refuse_double_backward)


@torch.library.custom_op("fastcl::reduce_over_ranks", mutates_args=())
def reduce_over_ranks(x: Tensor, operation: str, group: str) -> Tensor:
    """The "sum" or "max" over ranks, the same bits on each.

    Every rank's objective holds the result, so the gradient of a sum is the incoming one times the number of ranks.
    """
    return Ranks.of(group).all_reduce(x, operation)


@reduce_over_ranks.register_fake
def _(x, operation, group):
    return torch.empty_like(x)


def _keep_group(ctx, inputs, output) -> None:
    _, ctx.operation, ctx.group = inputs


def _reduce_backward(ctx, grad: Tensor):
    if ctx.operation != "sum":
        raise RuntimeError(f"the {ctx.operation} over ranks has no gradient")
    return grad * Ranks.of(ctx.group).size, None, None


reduce_over_ranks.register_autograd(_reduce_backward, setup_context=_keep_group)


@torch.library.custom_op("fastcl::add_over_ranks", mutates_args=())
def add_over_ranks(x: Tensor, group: str) -> Tensor:
    """The sum over ranks, the same bits on each, of which every rank may make something of its own.

    The gradient is the sum of what all ranks' objectives make of it: another exchange, which "sum" of
    :func:`reduce_over_ranks` does without because there all ranks' objectives are one.
    """
    return Ranks.of(group).all_reduce(x, "sum")


@add_over_ranks.register_fake
def _(x, group):
    return torch.empty_like(x)


def _keep_only_group(ctx, inputs, output) -> None:
    _, ctx.group = inputs


add_over_ranks.register_autograd(
    lambda ctx, grad: (torch.ops.fastcl.add_over_ranks(grad, ctx.group), None), setup_context=_keep_only_group
)


@torch.library.custom_op("fastcl::gather_over_ranks", mutates_args=())
def gather_over_ranks(x: Tensor, group: str, call: str) -> tuple[Tensor, Tensor]:
    """The rows of all ranks, one rank's after the other's, and how many each has, int64 [ranks] on the CPU.

    A rank's gradient is that of the sum of all ranks' objectives. ``call`` has a line ``name=value`` for everything
    that all ranks must agree on, besides what is seen here.
    """
    ranks = Ranks.of(group)
    fields = dict(line.split("=", 1) for line in call.split("\n"))
    fields |= {"dtype": str(x.dtype), "shape of a row": str(tuple(x.shape[1:]))}
    lengths = [length for (length,) in meet(ranks, fields, (len(x),), x.device)]
    return ranks.all_gather(x, lengths).clone(), torch.tensor(lengths, device="cpu")


@gather_over_ranks.register_fake
def _(x, group, call):
    total = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(total, *x.shape[1:]), torch.empty(Ranks.of(group).size, dtype=torch.int64, device="cpu")


def _keep_lengths(ctx, inputs, output) -> None:
    _, ctx.group, _ = inputs
    ctx.save_for_backward(output[1])


def _gather_backward(ctx, grad: Tensor, _):
    (lengths,) = ctx.saved_tensors
    return torch.ops.fastcl.scatter_over_ranks(grad, lengths, ctx.group), None, None


@torch.library.custom_op("fastcl::scatter_over_ranks", mutates_args=())
def scatter_over_ranks(x: Tensor, lengths: Tensor, group: str) -> Tensor:
    """The sum over ranks of the rows of ``x`` that are this rank's."""
    return Ranks.of(group).reduce_scatter(x, lengths.tolist()).clone()


@scatter_over_ranks.register_fake
def _(x, lengths, group):
    return x.new_empty(torch.library.get_ctx().new_dynamic_size(), *x.shape[1:])


gather_over_ranks.register_autograd(_gather_backward, setup_context=_keep_lengths)
scatter_over_ranks.register_autograd(_refuse_double_backward)
