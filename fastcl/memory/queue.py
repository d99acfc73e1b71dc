"""Keys of past batches, as negatives: MoCo's queue. May import :mod:`fastcl.exchange` and :mod:`fastcl.checks`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastcl.checks import check_count, check_group, check_matrix, check_target
from fastcl.exchange import Ranks, meet


class Queue(nn.Module):
    """The newest ``size`` keys of past batches, first in, first out: MoCo's queue, and the memory of XBM.

        queue = fastcl.memory.Queue(65536, 128)
        loss = fastcl.info_nce(query, key.detach(), tau=0.07, negatives=queue.keys)
        loss.backward()
        queue.enqueue(key)

    Keys are stored as they are given, in the order of a ring. What was enqueued counts on the host, so that no call
    waits for the device. The state_dict holds the rows, their labels and the count.

    Args:
        size: how many keys it holds.
        dim: of a key.
        labels: also keep an integer for each key (a class, an example's number).
        dtype: keys are stored in it, and the loss needs queries of the same.
        device: of the rows; they move with ``to()``, as buffers do.

    Complexity: O(size * dim) memory; a call of :meth:`enqueue` copies its rows.

    Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020 (arXiv:1911.05722); Wang
    et al., Cross-Batch Memory for Embedding Learning, 2020 (arXiv:1912.06798).

    >>> import torch, fastcl
    >>> queue = fastcl.memory.Queue(5, 1, labels=True)
    >>> queue.enqueue(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([7, 8, 9]))
    >>> len(queue), queue.keys.tolist(), queue.filled.tolist()
    (3, [[0.0], [1.0], [2.0]], [True, True, True, False, False])
    >>> queue.enqueue(torch.tensor([[3.0], [4.0], [5.0]]), torch.tensor([7, 8, 9]))
    >>> queue.keys.flatten().tolist(), queue.labels.tolist()
    ([5.0, 1.0, 2.0, 3.0, 4.0], [9, 8, 9, 7, 8])
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        labels: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_count("size", size)
        check_count("dim", dim)
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("row_labels", torch.full((size,), -1, device=device) if labels else None)
        self.enqueued = 0

    def __len__(self) -> int:
        """How many keys there are, at most ``size``."""
        return min(self.enqueued, len(self.rows))

    @property
    def keys(self) -> Tensor:
        """The keys, [len(self), dim]: a view, which the next :meth:`enqueue` overwrites. Autograd raises if a backward
        after that needs what it was; with info_nce's ``normalize=True``, which copies, none does.
        """
        return self.rows[: len(self)]

    @property
    def labels(self) -> Tensor:
        """The labels of the keys, int64 [len(self)], also a view."""
        if self.row_labels is None:
            raise ValueError("labels are kept by Queue(..., labels=True) only")
        return self.row_labels[: len(self)]

    @property
    def filled(self) -> Tensor:
        """Which of ``rows`` and ``row_labels`` are in use, bool [size], for code that wants tensors of a fixed shape.

        The others are zeros, and their labels -1.
        """
        return torch.arange(len(self.rows), device=self.rows.device) < len(self)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None, *, group: ProcessGroup | None = None) -> None:
        """Store the keys, each in the place of the oldest, and of more than ``size`` only the last.

        Args:
            keys: [B, dim] on the queue's device, of any floating dtype; what is stored is detached.
            labels: integers [B], where the queue keeps labels.
            group: a torch.distributed process group: the keys of all its ranks are stored, in the ranks' order, so
                that queues that were equal on all ranks stay equal. Ranks may give different numbers of keys, or none.

        Raises:
            TypeError, ValueError: an argument doesn't fit; the message names it.
        """
        check_matrix("keys", keys, may_be_empty=True)
        size, dim = self.rows.shape
        if keys.shape[1] != dim or keys.device != self.rows.device:
            raise ValueError(
                f"keys must have shape [rows, {dim}] on {self.rows.device}, got {tuple(keys.shape)} on {keys.device}"
            )
        if (labels is None) != (self.row_labels is None):
            expected = (
                "given, as the queue keeps labels" if labels is None else "None: Queue(..., labels=True) keeps them"
            )
            raise ValueError(f"labels must be {expected}")
        if labels is not None:
            check_target("labels", labels, keys)
        if group is not None:
            keys, labels = self._of_all_ranks(keys, labels, group)
        start = self.enqueued + max(0, len(keys) - size)
        _write_around(self.rows, start, keys[-size:])
        if labels is not None:
            _write_around(self.row_labels, start, labels[-size:])
        self.enqueued += len(keys)

    def _of_all_ranks(self, keys: Tensor, labels: Tensor | None, group: ProcessGroup) -> tuple[Tensor, Tensor | None]:
        check_group("group", group)
        ranks = Ranks.of(group.group_name)
        call = {"call": "Queue.enqueue", "dtype": keys.dtype, "queue": self.extra_repr(), "enqueued": self.enqueued}
        agreed = {name: str(value) for name, value in call.items()}
        lengths = [length for (length,) in meet(ranks, agreed, [len(keys)], keys.device)]
        if not sum(lengths):
            return keys, labels
        return ranks.all_gather(keys, lengths), None if labels is None else ranks.all_gather(labels.long(), lengths)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.enqueued)

    def set_extra_state(self, state: Tensor) -> None:
        self.enqueued = int(state)

    def extra_repr(self) -> str:
        size, dim = self.rows.shape
        return f"size={size}, dim={dim}, labels={self.row_labels is not None}, dtype={self.rows.dtype}"


def _write_around(rows: Tensor, start: int, new: Tensor) -> None:
    """Write from ``start`` on, and around the end; ``new`` is no longer than ``rows``."""
    start %= len(rows)
    until_end = len(rows) - start
    rows[start : start + len(new)] = new[:until_end]
    rows[: max(0, len(new) - until_end)] = new[until_end:]
