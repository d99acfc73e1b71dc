"""Everyone who computes a case: fastcl's backends, the dense loss, torch.compile of it, and the peers.

A :class:`Provider` is the name of a way to compute; its function is built in the process that measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import fastcl
from benchmarks.cases import Case
from benchmarks.environment import installed_version
from benchmarks.peers import PEERS, Adapter, Peer
from tests.cases import available_backends

FASTCL = "fastcl"
CPU_ENGINE = f"{FASTCL} cpu"
CPU_ENGINE_ON_ONE_THREAD = f"{CPU_ENGINE} on 1 thread"
_LARGEST_DENSE_BACKEND = 1 << 22
_SLOW_BACKENDS = ("tiled", "dense")


@dataclass(frozen=True)
class Provider:
    """One way to compute cases."""

    name: str
    version: str
    build: Callable[[Case], Adapter]
    """the function that computes the case's mean loss; raises ImportError with the reason where it can't"""
    offers: Callable[[Case], bool]
    needed_bytes: Callable[[Case], int]
    """an estimate of the peak beyond inputs and gradients"""
    too_large: Callable[[Case], str | None] = lambda case: None
    """why the case is not tried though it would fit, or None"""
    compiles: bool = False
    learns_scale: bool = True
    threads: int | None = None
    """how many threads it is given, or None for as many as everybody"""

    @property
    def is_cpu_engine(self) -> bool:
        return self.name in (CPU_ENGINE, CPU_ENGINE_ON_ONE_THREAD)

    @property
    def is_peer(self) -> bool:
        """Whether this is somebody fastcl competes with."""
        return not self.name.startswith(FASTCL)


def providers(device: str, *, one_thread: bool = False) -> list[Provider]:
    """All that could run on ``device``; whether a peer's library can be imported shows in its worker.

    With ``one_thread`` the CPU engine competes a second time, on one thread. The most telling come first, so that a run
    that is cut short has them.
    """
    ours = available_backends(device)
    peers = [_peer(peer) for peer in PEERS if device in peer.devices]
    return [
        *(_fastcl(name) for name in ours if name not in _SLOW_BACKENDS),
        *([replace(_fastcl("cpu"), name=CPU_ENGINE_ON_ONE_THREAD, threads=1)] if one_thread and "cpu" in ours else []),
        _dense(),
        # On a CPU the strongest peer; on a GPU the one that is longest in starting.
        *([_compiled(), *peers] if device == "cpu" else [*peers, _compiled()]),
        *(_fastcl(name) for name in _SLOW_BACKENDS if name in ours),
    ]


def find(name: str, device: str) -> Provider:
    """The provider of that name.

    Raises:
        KeyError: there is none on this device.
    """
    for provider in providers(device, one_thread=True):
        if provider.name == name:
            return provider
    raise KeyError(f"no provider {name!r} on {device}")


def _fastcl(backend: str) -> Provider:
    def build(case: Case) -> Adapter:
        call = case.table_row.call
        return lambda features, tau: call(features, tau, reduction="mean", backend=backend)

    def too_large(case: Case) -> str | None:
        if backend == "dense" and case.rows**2 > _LARGEST_DENSE_BACKEND:
            return "backend dense is the tests' judge, not meant for this size"
        return None

    dense = backend == "dense"
    return Provider(
        f"{FASTCL} {backend}",
        fastcl.__version__,
        build,
        offers=lambda case: True,
        needed_bytes=lambda case: case.dense_bytes(8, torch.float32) if dense else 0,
        too_large=too_large,
    )


def _dense() -> Provider:
    return Provider(
        "dense eager",
        torch.__version__,
        _reference,
        offers=lambda case: True,
        needed_bytes=lambda case: case.dense_bytes(),
    )


def _compiled() -> Provider:
    def build(case: Case) -> Adapter:
        return torch.compile(_reference(case), dynamic=False)

    return Provider(
        "torch.compile",
        torch.__version__,
        build,
        offers=lambda case: True,
        needed_bytes=lambda case: case.dense_bytes(2),
        compiles=True,
    )


def _reference(case: Case) -> Adapter:
    formula = case.table_row.reference
    return lambda features, tau: formula(features, tau).mean()


def _peer(peer: Peer) -> Provider:
    def needed_bytes(case: Case) -> int:
        item = case.torch_dtype.itemsize
        return int(item * (peer.matrices * case.rows**2 + peer.cubes * case.rows**3))

    def too_large(case: Case) -> str | None:
        if peer.most_pairs is not None and case.pairs > peer.most_pairs:
            return f"its time and memory are cubic, not tried above {peer.most_pairs} pairs"
        return None

    return Provider(
        peer.name,
        installed_version(peer.distribution) or "",
        lambda case: peer.losses[case.loss](),
        offers=lambda case: case.loss in peer.losses,
        needed_bytes=needed_bytes,
        too_large=too_large,
        learns_scale=peer.learns_scale,
    )
