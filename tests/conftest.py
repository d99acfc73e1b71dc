from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ranks import World


def pytest_configure(config: pytest.Config) -> None:
    # Processes that share the machine leave each other a core; tests of several threads ask for them.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Inputs differ from test to test and not from run to run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """``worlds(size)`` is a world of so many ranks, started when it is first asked for."""
    started: dict[int, World] = {}

    def world(size: int) -> World:
        if size not in started or not started[size].alive:
            started[size] = World(size)
        return started[size]

    yield world
    for each in started.values():
        each.close()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors are full of NaN, so that whoever reads before writing is found out."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files go to processes one by one: with those of slow tests first, none is alone at the end.
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU in this process"))
