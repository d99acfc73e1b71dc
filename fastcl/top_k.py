"""The k most similar keys of each query, streamed over tiles of S: for mining negatives and for search.

May import :mod:`fastcl.checks`, :mod:`fastcl.engine`, :mod:`fastcl.losses.common` and below.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcl import engine
from fastcl.checks import check_count, check_group, check_matrix, check_pair, check_row_vector
from fastcl.losses.common import normalize_rows
from fastcl.pairwise import autocast, refuse_double_backward
from fastcl.terms import accumulation_dtype

_TILE_ROWS, _TILE_COLUMNS = 512, 4096


class TopK(NamedTuple):
    """The most similar keys of each query, the most similar first."""

    similarities: Tensor
    """[N, k] in the accumulation dtype; -inf where a query has fewer than k candidates"""
    indices: Tensor
    """int64 [N, k]; -1 where a query has fewer than k candidates"""


def top_k(
    query: Tensor,
    key: Tensor | None,
    k: int,
    *,
    normalize: bool = True,
    exclude_self: bool = False,
    ids: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> TopK:
    r"""The k largest of :math:`\langle q_i, k_j\rangle` for each i, and the keys j that have them.

    Keys of equal similarity come in the order of their indices. The similarities carry gradients to queries and keys;
    the choice carries none.

    Args:
        query: [N, D] in float64, float32, bfloat16 or float16.
        key: [M, D], in the dtype and on the device of the queries; None for the queries themselves.
        k: how many, at most M.
        normalize: scale each row to unit length first.
        exclude_self: leave out key i for query i.
        ids: integers [N] and [M], of the queries and of the keys: keys of an equal id are left out.
        backend: None, or "tiled": this is plain PyTorch on every device.
        group: a torch.distributed process group: the keys are those of all ranks, one rank's after the other's, and so
            are the indices; ``exclude_self`` counts the queries in the same way.

    Returns:
        Similarities [N, k], in float32 (float64 for float64 features), and indices [N, k]. A query that has fewer than
        k candidates gets similarity -inf and index -1 in the places that remain.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: N * M * D multiply-adds and a selection; O(N * k) memory beyond the features, and a tile. The gradient
    takes O(N * k * D) time and O(N * D + M * D) memory.

    >>> import torch, fastcl
    >>> z = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> fastcl.top_k(z, None, 1, exclude_self=True).indices.T.tolist()
    [[1, 0, 1]]
    """
    check_count("k", k)
    keys = query if key is None else key
    if key is None:
        check_matrix("query", query, may_be_empty=group is not None)
    else:
        check_pair("query", query, "key", key, same_rows=False, may_be_empty=group is not None)
    if ids is not None:
        if not isinstance(ids, tuple) or len(ids) != 2:
            raise TypeError(f"ids must be a pair of tensors, of the queries and of the keys, got {type(ids).__name__}")
        check_row_vector("ids of the queries", ids[0], query, integer=True)
        check_row_vector("ids of the keys", ids[1], keys, integer=True)
    insisted = backend or os.environ.get("FASTCL_BACKEND")
    if insisted not in (None, "", "tiled"):
        raise ValueError(f"backend must be None or 'tiled' for top_k, which is plain PyTorch, got {insisted!r}")
    query, keys = autocast(query), autocast(keys)
    if normalize:
        query, keys = normalize_rows(query), normalize_rows(keys)
    first = torch.zeros((), dtype=torch.int64, device=query.device)
    if group is not None:
        check_group("group", group)
        call = f"function=top_k\nk={k}\nexclude_self={exclude_self}\nids={ids is not None}"
        gather = functools.partial(torch.ops.fastcl.gather_over_ranks, group=group.group_name, call=call)
        keys, _ = gather(keys)
        ids = ids and (ids[0], gather(ids[1])[0])
        lengths, _ = gather(first.new_full((1,), query.shape[0]))
        first = lengths[: group.rank()].sum()
    if k > keys.shape[0]:
        raise ValueError(f"k must be at most the number of keys, {keys.shape[0]}, got {k}")
    own, others = (None, None) if ids is None else ids
    return TopK(*torch.ops.fastcl.top_k(query, keys, k, first if exclude_self else None, own, others))


@torch.library.custom_op("fastcl::top_k", mutates_args=())
def _top_k(
    query: Tensor, key: Tensor, k: int, first: Tensor | None, ids: Tensor | None, key_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    similarities = query.new_empty((len(query), k), dtype=dtype)
    indices = torch.empty((len(query), k), dtype=torch.int64, device=query.device)
    with engine.plain_arithmetic(query.device):
        for start in range(0, len(query), _TILE_ROWS):
            rows = slice(start, min(start + _TILE_ROWS, len(query)))
            itself = None if first is None else torch.arange(rows.start, rows.stop, device=query.device) + first
            best = similarities.new_full((rows.stop - rows.start, 0), 0.0)
            found = indices.new_full(best.shape, 0)
            for left in range(0, len(key), _TILE_COLUMNS):
                columns = torch.arange(left, min(left + _TILE_COLUMNS, len(key)), device=query.device)
                s = query[rows].to(dtype) @ key[left : left + _TILE_COLUMNS].to(dtype).mT
                excluded = None if itself is None else itself[:, None] == columns
                if ids is not None:
                    same = ids[rows, None] == key_ids[columns]
                    excluded = same if excluded is None else excluded | same
                if excluded is not None:
                    s.masked_fill_(excluded, -torch.inf)
                # What was found before has the lower indices, and stands before the tile.
                s = torch.cat((best, s), dim=1)
                places = _first_largest(s, min(k, s.shape[1]))
                best = s.gather(1, places)
                found = torch.cat((found, columns.expand(len(s), -1)), dim=1).gather(1, places)
            similarities[rows], indices[rows] = best, found.masked_fill(best == -torch.inf, -1)
    return similarities, indices


def _first_largest(s: Tensor, k: int) -> Tensor:
    """The places of the k largest of each row, largest first; of equal ones, those that stand first, in their order."""
    width = s.shape[1]
    smallest = s.topk(k, dim=1).values[:, -1:]
    # Whatever is above the k-th largest value, then as many as remain of those that equal it, from the left.
    rank = torch.arange(width, 0, -1, device=s.device, dtype=torch.int32) + width * (s > smallest).int()
    places = rank.masked_fill_(s < smallest, 0).topk(k, dim=1).indices.sort(dim=1).values
    order = s.gather(1, places).sort(dim=1, descending=True, stable=True).indices
    return places.gather(1, order)


@_top_k.register_fake
def _(query, key, k, first, ids, key_ids):
    similarities = query.new_empty((query.shape[0], k), dtype=accumulation_dtype(query.dtype))
    return similarities, torch.empty_like(similarities, dtype=torch.int64)


@torch.library.custom_op("fastcl::top_k_gradient", mutates_args=())
def _gradient(query: Tensor, key: Tensor, indices: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    of_query = torch.zeros_like(query, dtype=dtype, memory_format=torch.contiguous_format)
    of_key = torch.zeros_like(key, dtype=dtype, memory_format=torch.contiguous_format)
    for chosen, slope in zip(indices.unbind(dim=1), incoming.unbind(dim=1), strict=True):
        # A place without a key takes key 0, with slope 0.
        slope, chosen = slope.masked_fill(chosen < 0, 0.0)[:, None], chosen.clamp_min(0)
        of_query += slope * key[chosen].to(dtype)
        # On each device the one of the two whose sums have an order.
        if key.device.type == "cpu":
            of_key.index_add_(0, chosen, slope * query.to(dtype))
        else:
            of_key.index_put_((chosen,), slope * query.to(dtype), accumulate=True)
    return of_query.to(query.dtype), of_key.to(key.dtype)


@_gradient.register_fake
def _(query, key, indices, incoming):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key))


def _save(ctx, inputs, output) -> None:
    query, key, *_ = inputs
    ctx.save_for_backward(query, key, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, incoming: Tensor, _):
    query, key, indices = ctx.saved_tensors
    return *torch.ops.fastcl.top_k_gradient(query, key, indices, incoming), None, None, None, None


_top_k.register_autograd(_backward, setup_context=_save)
_gradient.register_autograd(refuse_double_backward)
