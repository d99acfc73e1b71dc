"""The dense loss under ``torch.compile``, in a process of its own that compiles while the demo does other things.

Imports torch only in that process: it starts to compile while the demo is still importing torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.measure import ValueAndGradients


class CompiledDense:
    """A process that compiles the dense loss, then measures it on request.

    While other things are timed it must not compute: see :meth:`paused`.
    """

    def __init__(self, sizes: Sequence[int], dim: int, tau: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, sizes, dim, tau))
        self._process.start()
        theirs.close()
        self._state: str | None = None

    def failure(self) -> str | None:
        """Wait until it has compiled; then None, or why it could not."""
        if self._state is None:
            self._state = self._receive()
        return self._state or None

    def measure(self, pairs: int) -> tuple[float, int, ValueAndGradients]:
        """Milliseconds, peak bytes, and what it computed."""
        import torch

        from benchmarks.measure import ValueAndGradients

        self._connection.send(pairs)
        answer = self._receive()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        ms, peak, value, gradients = answer
        return ms, peak, ValueAndGradients(torch.tensor(value), tuple(map(torch.from_numpy, gradients)))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop compiling meanwhile, compilers that it has called included."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def _receive(self) -> object:
        try:
            return self._connection.recv()
        except EOFError:
            return "its process ended"

    def _signal(self, number: int) -> None:
        # It leads a group of its own from its first statement on; before that there is nothing to stop.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _serve(connection: Connection, sizes: Sequence[int], dim: int, tau: float) -> None:
    os.setsid()
    warnings.simplefilter("ignore")  # torch.compile's own deprecations would run through the table
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of compilers starts slower than these kernels compile
    import torch
    import torch._inductor.config

    from examples.demo.reference import dense_nt_xent, views
    from examples.demo.table import measure_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Else a cold start spends ten seconds on compiling a test program for each instruction set in /proc/cpuinfo.
    torch._inductor.config.cpp.vec_isa_ok = True
    loss = torch.compile(dense_nt_xent, dynamic=True)
    try:
        # The second size is compiled again: Inductor sums long rows in another way than short ones.
        for pairs in sizes:
            z1, z2 = views(pairs, dim, device)
            torch.autograd.grad(loss(z1, z2, tau), (z1, z2))
    except Exception as error:  # whatever a compiler may do wrong
        connection.send(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return
    connection.send("")
    with contextlib.suppress(EOFError):
        while True:
            pairs = connection.recv()
            try:
                ms, peak, found = measure_loss(lambda a, b: loss(a, b, tau), views(pairs, dim, device))
            except Exception as error:
                connection.send(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
                continue
            connection.send((ms, peak, found.value.item(), [g.cpu().numpy() for g in found.gradients]))
