"""Worlds of processes that stand for ranks: started once, then told by each test what to run.

The processes are forked from a server that has imported torch and fastcl already, because that import is what costs.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 120.0
"""seconds after which a world that doesn't answer is a failed test"""


class World:
    """``size`` processes in one gloo group, each of which runs what :meth:`run` sends."""

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "fastcl", "tests.ranks"])
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, str(Path(self._folder.name) / "store"), timeout, there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, *args)`` on every rank, at once; its results by rank. The first error is raised."""
        for rank, outcome in enumerate(outcomes := self.outcomes(function, *args)):
            if isinstance(outcome, Failure):
                raise AssertionError(f"rank {rank} of {self.size}: {outcome.text}")
        return outcomes

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As :meth:`run`, with a :class:`Failure` where a rank raised, and None where it died."""
        for pipe in self._pipes:
            pipe.send((function, args))
        return [self._answer(pipe) for pipe in self._pipes]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def _answer(self, pipe: Connection) -> Any:
        if not pipe.poll(PATIENCE):
            self.close()
            raise AssertionError(f"a rank did not answer within {PATIENCE} s")
        try:
            return pipe.recv()
        except EOFError:
            return None

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


class Failure:
    """What a rank raised."""

    def __init__(self, error: BaseException) -> None:
        self.kind, self.message = type(error).__name__, str(error)
        self.text = "".join(traceback.format_exception(error))


def _serve(rank: int, size: int, store: str, timeout: float, pipe: Connection) -> None:
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115  c10d reports every peer's death there
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            result = function(rank, *args)
        except Exception as error:
            result = Failure(error)
        pipe.send(result)
