"""fastcl.top_k against a stable sort of the whole matrix: ties, exclusions, gradients, memory, ranks."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import fastcl
from benchmarks.measure import peak_memory

module = importlib.import_module("fastcl.top_k")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE_ROWS", 7)
    monkeypatch.setattr(module, "_TILE_COLUMNS", 11)


def dense(query: Tensor, key: Tensor, k: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    s = query @ key.T
    if excluded is not None:
        s = s.masked_fill(excluded, -torch.inf)
    values, indices = s.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k].masked_fill(values[:, :k] == -torch.inf, -1)


@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (20, 33, 1), (20, 33, 5), (9, 40, 40), (8, 22, 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_a_sort_of_the_whole_matrix(small_tiles, n: int, m: int, k: int, dtype: torch.dtype) -> None:
    query, key = torch.randn(n, 6).to(dtype), torch.randn(m, 6).to(dtype)
    found = fastcl.top_k(query, key, k, normalize=False)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    values, indices = dense(query.to(wide), key.to(wide), k)
    torch.testing.assert_close(found.similarities, values)
    assert torch.equal(found.indices, indices)


def test_equal_similarities_come_in_the_order_of_the_keys(small_tiles) -> None:
    key = torch.randint(-1, 2, (60, 3)).float()
    found = fastcl.top_k(key, None, 25, normalize=False)
    values, indices = dense(key, key, 25)
    assert torch.equal(found.similarities, values)
    assert torch.equal(found.indices, indices)


def test_exclusions(small_tiles) -> None:
    z, ids = F.normalize(torch.randn(30, 5), dim=1), torch.arange(30) % 4
    values, indices = dense(z, z, 4, torch.eye(30, dtype=torch.bool))
    found = fastcl.top_k(z, None, 4, exclude_self=True)
    torch.testing.assert_close(found.similarities, values)
    assert torch.equal(found.indices, indices)
    found = fastcl.top_k(z, None, 28, ids=(ids, ids))
    values, indices = dense(z, z, 28, ids[:, None] == ids)
    torch.testing.assert_close(found.similarities, values)
    assert torch.equal(found.indices, indices)
    assert (found.indices == -1).any()


def test_gradient_of_the_similarities(small_tiles) -> None:
    query, key = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (9, 25))
    ids = (torch.arange(9) % 3, torch.arange(25) % 3)
    weights = torch.rand(9, 20, dtype=torch.float64)

    def total(query: Tensor, key: Tensor) -> Tensor:
        found = fastcl.top_k(query, key, 20, ids=ids).similarities
        return (found.masked_fill(found == -torch.inf, 0.0) * weights).sum()

    assert torch.autograd.gradcheck(total, (query, key))
    assert torch.autograd.gradcheck(lambda z: fastcl.top_k(z, None, 3, exclude_self=True).similarities, key)


def test_compiles_without_graph_breaks() -> None:
    compiled = torch.compile(lambda z: fastcl.top_k(z, None, 3, exclude_self=True), fullgraph=True, backend="aot_eager")
    z = torch.randn(12, 5)
    for x, y in zip(compiled(z), fastcl.top_k(z, None, 3, exclude_self=True), strict=True):
        torch.testing.assert_close(x, y)


def test_memory_stays_far_below_the_similarities() -> None:
    z = torch.randn(12_000, 8)
    fastcl.top_k(z[:1000], None, 10)
    assert peak_memory(lambda: [fastcl.top_k(z, None, 10).similarities], "cpu") < 4 * len(z) ** 2 / 2


def check_ranks(rank: int) -> None:
    lengths, keys = [4, 0, 6], [3, 5, 9]
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(sum(n), 4, generator=generator, dtype=torch.float64) for n in (lengths, keys))
    whole = fastcl.top_k(query, key, 7, exclude_self=True)
    mine = fastcl.top_k(query.split(lengths)[rank], key.split(keys)[rank], 7, exclude_self=True, group=dist.group.WORLD)
    torch.testing.assert_close(mine.similarities, whole.similarities.split(lengths)[rank])
    assert torch.equal(mine.indices, whole.indices.split(lengths)[rank])


def test_keys_of_all_ranks(worlds) -> None:
    worlds(3).run(check_ranks)


X = torch.randn(6, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastcl.top_k(X, None, 7), ValueError, r"k must be at most the number of keys, 6, got 7"),
        (lambda: fastcl.top_k(X, None, 0), ValueError, r"k must be an integer of at least 1, got 0"),
        (lambda: fastcl.top_k(X, X[:, :3], 1), ValueError, r"query and key must have the same dim"),
        (lambda: fastcl.top_k(X, X.double(), 1), ValueError, r"same dtype"),
        (lambda: fastcl.top_k(X, X, 1, backend="cpu"), ValueError, r"backend must be None or 'tiled' .* got 'cpu'"),
        (lambda: fastcl.top_k(X, X, 1, ids=torch.arange(6)), TypeError, r"ids must be a pair of tensors"),
        (lambda: fastcl.top_k(X, X, 1, group=3), TypeError, r"group must be None or a torch.distributed"),
    ],
)
def test_bad_input_names_the_argument_its_value_and_what_was_expected(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
