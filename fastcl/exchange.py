"""How shards travel between the ranks of a torch.distributed process group, and how what others computed comes home.

A leaf module: it imports torch only, and knows nothing of losses. :func:`meet` compares the calls of all ranks.
:class:`Ring` and :class:`Gather` show this rank the shards of the others, and bring to each shard's owner, in an order
that depends on the ranks' numbers alone, what the ranks contribute to it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

Visit = Callable[[int, int, Sequence[Tensor]], "Tensor | None"]
"""``visit(first, stop, tensors)`` looks at the rows ``first:stop`` of everybody's tensors, and may return something
with a row for each of them."""
Merge = Callable[[Tensor, Tensor], Tensor]
"""How two contributions become one; may overwrite the first."""


@dataclass(frozen=True)
class Ranks:
    """A process group and this process' place in it."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group_name: str) -> Ranks:
        """The group that torch knows by this name."""
        group = dist.distributed_c10d._resolve_process_group(group_name)
        return cls(group, group.rank(), group.size())

    def all_gather(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """The rows of all ranks, one after the other; ``lengths`` says how many each has."""
        longest = max(lengths)
        mine = x if len(x) == longest else torch.cat((x, x.new_zeros(longest - len(x), *x.shape[1:])))
        result = self._collective("all_gather_into_tensor", mine, self.size)
        if min(lengths) == longest:
            return result
        return torch.cat([part[:length] for part, length in zip(result.split(longest), lengths, strict=True)])

    def reduce_scatter(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """The sum over ranks of the part of ``x`` that is this rank's."""
        longest = max(lengths)
        if min(lengths) < longest:
            padded = x.new_zeros(self.size, longest, *x.shape[1:])
            for place, part in zip(padded, x.split(list(lengths)), strict=True):
                place[: len(part)] = part
            x = padded.flatten(0, 1)
        return self._collective("reduce_scatter_tensor", x, "sum", self.size)[: lengths[self.rank]]

    def all_to_all(self, x: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
        """From each rank, in their order, the part of its ``x`` that is this rank's."""
        mine = [lengths[self.rank]] * self.size
        return self._collective("all_to_all_single", x, mine, list(lengths)).split(mine)

    def all_reduce(self, x: Tensor, operation: str) -> Tensor:
        """The "sum" or "max" over ranks."""
        return self._collective("all_reduce", x.detach(), operation)

    def _collective(self, name: str, x: Tensor, *arguments: object) -> Tensor:
        functional = torch.ops._c10d_functional
        with self._explained(name):
            started = getattr(functional, name)(x.contiguous(), *arguments, self.group.group_name)
            return functional.wait_tensor(started)

    def swap(self, send: Sequence[Tensor], to: int, receive: Sequence[Tensor], source: int) -> Swap:
        """Start to send to one rank, and to receive from another, which does the same at the same time."""
        return Swap(self, [x.contiguous() for x in send], to % self.size, receive, source % self.size)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{what} failed on rank {self.rank} of a group of {self.size}. Either a rank died, or one didn't make "
                f"this call (forward and backward run on every rank, in one order) within the group's timeout. "
                f"torch.distributed says: {error}"
            ) from error


class Swap:
    """An exchange in flight; what is being sent must not change before :meth:`wait` returns."""

    def __init__(self, ranks: Ranks, send: Sequence[Tensor], to: int, receive: Sequence[Tensor], source: int) -> None:
        self._ranks, self._sent, self._received = ranks, send, receive
        operations = [dist.P2POp(dist.isend, x, group=ranks.group, group_peer=to) for x in send]
        operations += [dist.P2POp(dist.irecv, x, group=ranks.group, group_peer=source) for x in receive]
        with ranks._explained("send and receive"):
            self._requests = dist.batch_isend_irecv(operations)

    def wait(self) -> Sequence[Tensor]:
        """What came in, for use on the current stream. Lets go of what was sent."""
        with self._ranks._explained("send and receive"):
            for request in self._requests:
                request.wait()
        self._sent = self._requests = ()
        return self._received


def meet(ranks: Ranks, call: dict[str, str], numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Every rank's ``numbers``, by rank, once it is certain that all make the same call.

    One all-gather of a few integers; where the calls differ, a second one of their texts.

    Raises:
        ValueError: the calls differ; raised on every rank, naming what differs and where.
    """
    text = "\n".join(f"{key}={value}" for key, value in call.items()).encode()
    fingerprint = int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)
    with _beside(device, ranks) as place:
        mine = torch.tensor([[fingerprint, len(text), *numbers]], device=place)
        met = ranks.all_gather(mine, [1] * ranks.size).tolist()
        if all(row[0] == fingerprint for row in met):
            return [row[2:] for row in met]
        lengths = [row[1] for row in met]
        texts = ranks.all_gather(torch.tensor(list(text), dtype=torch.uint8, device=place), lengths).tolist()
    ends = list(accumulate(lengths))
    calls = [
        dict(line.split("=", 1) for line in bytes(texts[end - length : end]).decode().split("\n"))
        for end, length in zip(ends, lengths, strict=True)
    ]
    raise ValueError(f"all ranks of the group must make the same call, got {_differences(calls)}")


def _differences(calls: Sequence[dict[str, str]]) -> str:
    found = []
    for key in dict.fromkeys(key for call in calls for key in call):
        ranks_of: dict[str, list[int]] = {}
        for rank, call in enumerate(calls):
            ranks_of.setdefault(call.get(key, "none"), []).append(rank)
        if len(ranks_of) > 1:
            found.append(f"{key} " + " and ".join(f"{value} on rank {ranks}" for value, ranks in ranks_of.items()))
    return "; ".join(found).replace("[", "").replace("]", "")


@contextlib.contextmanager
def _beside(device: torch.device, ranks: Ranks) -> Iterator[torch.device]:
    """Where a few integers are exchanged without waiting for the work that is queued on the device."""
    if device.type != "cuda" or "gloo" in str(dist.get_backend_config(ranks.group)):
        yield torch.device("cpu")
    else:
        with torch.cuda.stream(_side_stream(device)):
            yield device


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Ring:
    """Each rank holds its own shard and one that travels; the next one arrives while a shard is looked at.

    A shard visits the ``hops`` ranks after its owner. What they contribute to it follows it one step behind, and goes
    home from the last one.
    """

    def __init__(self, ranks: Ranks, lengths: Sequence[int], hops: int) -> None:
        self.ranks, self.lengths, self.hops = ranks, lengths, hops

    def run(self, own: Sequence[Tensor], visit: Visit, merge: Merge = Tensor.add_) -> Tensor | None:
        """Show ``visit`` the own shard and then ``hops`` others; the merged contributions to the own shard, if any."""
        ranks, tensors, arriving = self.ranks, own, None
        ends = list(accumulate(self.lengths))
        for hop in range(self.hops + 1):
            owner, following = ((ranks.rank - hop - step) % ranks.size for step in (0, 1))
            if hop < self.hops:
                shard = ranks.swap(tensors, ranks.rank + 1, self._buffers(own, following), ranks.rank - 1)
            part = visit(ends[owner] - self.lengths[owner], ends[owner], tensors)
            if hop == 0:
                result = part
            elif part is not None:
                if arriving is not None:
                    part = merge(arriving.wait()[0], part)
                    arriving = None
                if hop < self.hops:
                    to, source, expected = ranks.rank + 1, ranks.rank - 1, following
                else:
                    to, source, expected = owner, ranks.rank + self.hops, ranks.rank
                arriving = ranks.swap([part], to, self._buffers([part], expected), source)
            if hop < self.hops:
                tensors = shard.wait()
        return result if arriving is None else merge(result, arriving.wait()[0])

    def _buffers(self, like: Sequence[Tensor], owner: int) -> list[Tensor]:
        return [x.new_empty(self.lengths[owner], *x.shape[1:]) for x in like]


class Gather:
    """Each rank holds all shards at once: one all-gather, and one reduce-scatter of the contributions."""

    def __init__(self, ranks: Ranks, lengths: Sequence[int]) -> None:
        self.ranks, self.lengths = ranks, lengths

    def run(self, own: Sequence[Tensor], visit: Visit, merge: Merge = Tensor.add_) -> Tensor | None:
        """Show ``visit`` all shards as one; the merged contributions to the own shard, if any."""
        part = visit(0, sum(self.lengths), [self.ranks.all_gather(x, self.lengths) for x in own])
        if part is None:
            return None
        if merge is Tensor.add_:
            return self.ranks.reduce_scatter(part, self.lengths)
        return functools.reduce(merge, self.ranks.all_to_all(part, self.lengths))
