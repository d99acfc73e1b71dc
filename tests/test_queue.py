"""The queue: a list of Python is the judge of its contents, lightly's memory bank of the loss that uses it."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastcl
from fastcl.losses.info_nce import reference
from fastcl.memory import Queue
from tests.test_oracles import assert_same, peer

DIM = 3


def contents(queue: Queue) -> list[tuple[float, ...]]:
    return sorted(map(tuple, queue.keys.tolist()))


@pytest.mark.parametrize("size", [1, 4, 7, 8])
def test_holds_the_newest_of_batches_of_any_size(size: int) -> None:
    queue, expected = Queue(size, DIM, labels=True, dtype=torch.float64), deque(maxlen=size)
    for step, rows in enumerate([3, 0, 2, 5, 1, size, 2 * size + 3, 4, 3 * size, 1]):
        keys, labels = torch.randn(rows, DIM, dtype=torch.float64), torch.randint(100, (rows,))
        queue.enqueue(keys, labels)
        expected.extend(zip(map(tuple, keys.tolist()), labels.tolist(), strict=True))
        assert len(queue) == len(queue.keys) == len(queue.labels) == len(expected), step
        assert sorted(zip(map(tuple, queue.keys.tolist()), queue.labels.tolist(), strict=True)) == sorted(expected)
        filled = queue.filled
        assert torch.equal(queue.rows[filled], queue.keys)
        assert torch.equal(queue.row_labels[filled], queue.labels)
        assert (queue.rows[~filled] == 0).all()
        assert (queue.row_labels[~filled] == -1).all()


def test_the_oldest_are_replaced_first() -> None:
    queue = Queue(5, 1)
    for start in (0, 3, 6, 9):
        queue.enqueue(torch.arange(start, start + 3.0)[:, None])
    assert sorted(queue.keys.flatten().tolist()) == [7, 8, 9, 10, 11]


def test_stores_copies_without_a_graph() -> None:
    queue, keys = Queue(4, DIM), torch.randn(2, DIM, requires_grad=True)
    queue.enqueue(keys * 2)
    assert not queue.keys.requires_grad
    before = queue.keys.clone()
    with torch.no_grad():
        keys.zero_()
    assert torch.equal(queue.keys, before)
    queue.enqueue(torch.full((1, DIM), 0.1, dtype=torch.float64))
    assert queue.keys.dtype == torch.float32


def test_state_dict_round_trip() -> None:
    queue = Queue(5, DIM, labels=True)
    queue.enqueue(torch.randn(7, DIM), torch.arange(7))
    assert all(isinstance(value, Tensor) for value in queue.state_dict().values())
    other = torch.nn.ModuleDict({"queue": Queue(5, DIM, labels=True)})
    other.load_state_dict(torch.nn.ModuleDict({"queue": queue}).state_dict())
    for same in (other["queue"], copy.deepcopy(queue)):
        more = torch.randn(2, DIM)
        expected = copy.deepcopy(queue)
        for each in (same, expected):
            each.enqueue(more, torch.tensor([70, 80]))
        assert len(same) == 5
        assert torch.equal(same.keys, expected.keys)
        assert torch.equal(same.labels, expected.labels)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Queue(6, DIM, labels=True).load_state_dict(queue.state_dict())


def test_negatives_of_the_loss_are_those_of_the_formula() -> None:
    queue = Queue(16, DIM, dtype=torch.float64)
    for _ in range(3):
        query, key = torch.randn(2, 7, DIM, dtype=torch.float64)
        queue.enqueue(torch.randn(6, DIM, dtype=torch.float64))
        leaves = [query.clone().requires_grad_() for _ in range(2)]
        ours = fastcl.info_nce(leaves[0], key, 0.2, negatives=queue.keys)
        exact = reference(leaves[1], key, 0.2, negatives=queue.rows[queue.filled]).mean()
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
        queue.enqueue(key)  # between forward and backward: nothing that backward needs is a view of the queue
        grads = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip((ours, exact), leaves, strict=True)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_an_enqueue_that_a_backward_would_feel_is_an_error() -> None:
    queue = Queue(4, DIM)
    queue.enqueue(torch.randn(4, DIM))
    query = torch.randn(2, DIM, requires_grad=True)
    loss = fastcl.info_nce(query, torch.randn(2, DIM), 0.5, negatives=queue.keys, normalize=False)
    queue.enqueue(torch.randn(4, DIM))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_lightly_with_a_memory_bank() -> None:
    size, batch = 24, 8
    criterion = peer("lightly.loss").NTXentLoss(0.3, memory_bank_size=(size, DIM))
    queue = Queue(size, DIM)
    queue.enqueue(criterion.memory_bank.bank)
    for _ in range(5):
        query, key = (torch.randn(batch, DIM, requires_grad=True) for _ in range(2))
        ours = fastcl.info_nce(query, key, 0.3, negatives=queue.keys)
        assert_same(ours, criterion(query, key), (query, key))
        queue.enqueue(torch.nn.functional.normalize(key, dim=1))
        torch.testing.assert_close(queue.rows, criterion.memory_bank.bank)


def check_ranks(rank: int, lengths: list[list[int]]) -> None:
    queue, alone = Queue(6, DIM, labels=True), Queue(6, DIM, labels=True)
    for of_ranks in lengths:
        keys, labels = torch.randn(sum(of_ranks), DIM), torch.randint(9, (sum(of_ranks),))  # the same on each rank
        alone.enqueue(keys, labels)
        queue.enqueue(keys.split(of_ranks)[rank], labels.split(of_ranks)[rank], group=dist.group.WORLD)
    assert len(queue) == len(alone)
    assert torch.equal(queue.rows, alone.rows)
    assert torch.equal(queue.row_labels, alone.row_labels)


def test_two_ranks_store_the_keys_of_both(worlds) -> None:
    worlds(2).run(check_ranks, [[2, 2], [1, 3], [0, 0], [0, 2], [9, 1], [2, 2]])


def check_diverged(rank: int) -> None:
    queue = Queue(6, DIM)
    queue.enqueue(torch.randn(1 + rank, DIM))
    with pytest.raises(ValueError, match="enqueued 1 on rank 0 and 2 on rank 1"):
        queue.enqueue(torch.randn(2, DIM), group=dist.group.WORLD)


def test_queues_that_are_not_equal_are_not_fed_together(worlds) -> None:
    worlds(2).run(check_diverged)


KEYS, LABELS = torch.zeros(2, DIM), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Queue(0, 3), ValueError, r"size must be an integer of at least 1, got 0"),
        (lambda: Queue(3, 2.0), ValueError, r"dim must be an integer of at least 1, got 2.0"),
        (lambda: Queue(4, DIM).labels, ValueError, r"labels are kept by Queue\(..., labels=True\) only"),
        (lambda: Queue(4, DIM).enqueue(KEYS[0]), ValueError, r"keys must have 2 dimensions"),
        (lambda: Queue(4, 2).enqueue(KEYS), ValueError, r"keys must have shape \[rows, 2\] on cpu, got \(2, 3\)"),
        (lambda: Queue(4, DIM, device="meta").enqueue(KEYS), ValueError, r"on meta, got \(2, 3\) on cpu"),
        (lambda: Queue(4, DIM).enqueue(KEYS, LABELS), ValueError, r"labels must be None"),
        (lambda: Queue(4, DIM, labels=True).enqueue(KEYS), ValueError, r"labels must be given"),
        (lambda: Queue(4, DIM, labels=True).enqueue(KEYS, LABELS[:1]), ValueError, r"labels must have shape \(2,\)"),
        (lambda: Queue(4, DIM).enqueue(KEYS, group=3), TypeError, r"group must be None or .* got 3"),
        (lambda: fastcl.info_nce(KEYS, KEYS, 0.1, negatives=Queue(4, DIM).keys), ValueError, r"negatives .* one row"),
    ],
)
def test_bad_input_names_the_argument_its_value_and_what_was_expected(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
