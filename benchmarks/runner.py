"""Runs cases x providers, each provider in its own process: gate, then memory, then time in interleaved rounds."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.measure import summarize_times
from benchmarks.providers import Provider
from benchmarks.worker import JUDGE

ROOT = Path(__file__).resolve().parent.parent

VALUE_TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
GRADIENT_TOLERANCE = {"float64": 1e-8, "float32": 1e-2, "bfloat16": 1e-1, "float16": 3e-2}
"""Relative errors beyond which a gate is red: it tells another loss from this one, not one rounding from another
(float32 leaves room for tf32). How precise a provider is, its row says."""

GATE_ROWS = {"cpu": 4096, "cuda": 16384}
"""Rows up to which the float64 reference is quick; beyond, the gate is at a smaller batch of the same case."""

MEMORY_SHARE = 0.8
"""How much of the available memory a provider may be expected to take."""


class WorkerError(Exception):
    """A worker that didn't answer; the message says why."""


class MissingLibraryError(WorkerError):
    """The provider's library can't be imported."""


@dataclass
class Result:
    """What is known of one provider on one case."""

    provider: Provider
    case: Case
    status: str = "pending"
    """ok | gate red | left out | missing | failed | timed out"""
    reason: str = ""
    gate_pairs: int | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    compile_ms: float | None = None
    peak_bytes: int | None = None
    gradient_bytes: int | None = None
    needed_bytes: int | None = None
    call_ms: float = 0.0
    """one call, measured with the memory: how many more are worth their time"""
    times_ms: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    """of the CPU engine: the arithmetic peak in FLOP/s after each round, as clocks and neighbours change it"""

    @property
    def median_ms(self) -> float | None:
        return summarize_times(self.times_ms).median_ms if self.times_ms else None

    def close(self, status: str, reason: str) -> None:
        """No more is asked of this provider in this case, and it has no speed."""
        self.status, self.reason, self.times_ms = status, reason, []


class WorkerProcess:
    """The other end of :mod:`benchmarks.worker`."""

    def __init__(self, provider: str, device: str, threads: int) -> None:
        environment = dict(os.environ)
        if threads > 0:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", provider, device, str(threads)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            # A group of its own, so that a compiler it started goes with it.
            start_new_session=True,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """One request and its answer; raises what :meth:`receive` raises."""
        self.send(op, **arguments)
        return self.receive(timeout_s)

    def send(self, op: str, **arguments: Any) -> None:
        # A process that is gone shows in receive().
        with suppress(OSError):
            print(json.dumps({"op": op, **arguments}), file=self.process.stdin, flush=True)

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The answer to the oldest unanswered request.

        Raises:
            TimeoutError: no answer in time; the process is gone.
            MissingLibraryError, WorkerError: the worker can't do it; it lives on unless it died.
        """
        try:
            line = self.answers.get(timeout=max(1.0, timeout_s))
        except queue.Empty:
            self.kill()
            raise TimeoutError(f"no answer within {timeout_s:.0f} s") from None
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            tail = self.errors.read().strip().splitlines()[-1:]
            raise WorkerError(f"its process ended with code {code}" + "".join(f": {text[:200]}" for text in tail))
        answer = json.loads(line)
        if "missing" in answer:
            raise MissingLibraryError(answer["missing"])
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def dismiss(self) -> None:
        """Tells the process that nothing more will be asked."""
        with suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """Lets the process end by itself, or ends it."""
        self.dismiss()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=3)
        self.kill()
        self.errors.close()

    def kill(self) -> None:
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")


@dataclass
class Limits:
    """How long things may take."""

    rounds: int = 5
    budget_s: float = 1.0
    """for one provider in one round"""
    call_s: float = 60.0
    """a provider whose single call is expected to take longer is left out"""
    request_s: float = 300.0
    total_s: float | None = None
    """cases that the run doesn't reach in this time are left out"""


class Runner:
    """One run over many cases. ``progress`` gets a line about what is happening now."""

    def __init__(
        self,
        device: str,
        providers: Iterable[Provider],
        limits: Limits,
        *,
        threads: int = 0,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.device, self.providers, self.limits, self.threads = device, list(providers), limits, threads
        self.own_threads = {p.name: p.threads for p in self.providers if p.threads is not None}
        self.progress = progress
        self.deadline = None if limits.total_s is None else time.monotonic() + limits.total_s
        self.workers: dict[str, WorkerProcess] = {}
        self.missing: dict[str, str] = {}
        self.case_deadline: float | None = None
        self.compile_s: dict[str, float] = {}
        self.largest: dict[tuple[str, str, str], tuple[Case, float]] = {}
        self.folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.dismiss()
        for worker in self.workers.values():
            worker.close()
        self.folder.cleanup()

    def start_workers(self, cases: Sequence[Case]) -> None:
        """Starts all processes side by side and waits until each has imported what it needs."""
        self.progress("starting a process for each provider")
        offered = {p: next(filter(p.offers, cases), None) for p in self.providers}
        started = [provider for provider, case in offered.items() if case is not None]
        self._worker(JUDGE).send("ready")
        for provider in started:
            self._worker(provider.name).send("ready", case=offered[provider].to_json())
        self._worker(JUDGE).receive(self.limits.request_s)
        for provider in started:
            try:
                self._worker(provider.name).receive(self._patience())
            except MissingLibraryError as error:
                self.missing[provider.name] = str(error)
            except (TimeoutError, WorkerError):
                pass  # shows again, with its reason, in the first case

    def ask_judge(self, op: str, **arguments: Any) -> dict[str, Any]:
        """A question to the process that measures nobody."""
        return self._worker(JUDGE).ask(op, self.limits.request_s, **arguments)

    def run(self, case: Case, cases_left: int = 1) -> list[Result]:
        """All providers that offer the case, in the order they are listed.

        In a run of limited time the case gets its share of what remains, with ``cases_left`` cases counting this one.
        """
        share_s = math.inf if self.deadline is None else (self.deadline - time.monotonic()) / cases_left
        self.case_deadline = None if self.deadline is None else time.monotonic() + share_s
        results = [Result(provider, case) for provider in self.providers if provider.offers(case)]
        for result in results:
            self._leave_out(result, share_s)
        if any(result.status == "pending" for result in results):
            gate_case, path = self._reference(case)
            for result in results:
                self._guarded(result, lambda result=result: self._gate_and_memory(result, gate_case, path))
            Path(path).unlink()
        for number in range(self.limits.rounds):
            for result in results:
                self._guarded(result, lambda result=result, number=number: self._round(result, number))
        for result in results:
            if result.status == "pending":
                result.status = "ok"
                known = self.largest.get(self._key(result))
                if known is None or case.rows > known[0].rows:
                    self.largest[self._key(result)] = (case, result.median_ms)
            if result.compile_ms is not None:
                self.compile_s[result.provider.name] = result.compile_ms / 1e3
        return results

    def _leave_out(self, result: Result, share_s: float) -> None:
        case, provider = result.case, result.provider
        if provider.name in self.missing:
            return result.close("missing", self.missing[provider.name])
        if self._late():
            return result.close("left out", f"the run's {self.limits.total_s:.0f} s were over")
        reason = provider.too_large(case)
        if reason is not None:
            return result.close("left out", reason)
        result.needed_bytes = provider.needed_bytes(case)
        available = self.ask_judge("available")["bytes"]
        if result.needed_bytes > MEMORY_SHARE * available:
            needed, room = (f"{x / 1e9:,.1f} GB" for x in (result.needed_bytes, available))
            return result.close("left out", f"would need about {needed}, {room} are free")
        compile_s = self.compile_s.get(provider.name, 0.0)
        if compile_s > 0.7 * share_s:
            return result.close(
                "left out", f"compiling takes {compile_s:.0f} s, this run has {share_s:.0f} s for the case"
            )
        before = self.largest.get(self._key(result))
        if before is not None:
            smaller, ms = before
            expected_s = ms / 1e3 * (case.rows / smaller.rows) ** 2 * case.dim / smaller.dim
            if expected_s > self.limits.call_s:
                result.close("left out", f"a call would take about {expected_s:,.0f} s")
        return None

    def _reference(self, case: Case) -> tuple[Case, str]:
        """Float64 value and gradients of the case, or of the largest smaller one that is quick and fits."""
        available, gate_case = self.ask_judge("available")["bytes"], case
        while gate_case.pairs > 1 and (
            gate_case.rows > GATE_ROWS[self.device]
            or gate_case.dense_bytes(gate_case.cost.dense_copies + 1, torch.float64) > MEMORY_SHARE * available
        ):
            gate_case = gate_case.resized(gate_case.pairs // 2)
        self.progress(f"{case.name}: float64 reference at {gate_case.pairs:,} pairs")
        path = str(Path(self.folder.name) / f"{gate_case.name}.pt")
        self.ask_judge("reference", case=gate_case.to_json(), path=path)
        return gate_case, path

    def _gate_and_memory(self, result: Result, gate_case: Case, path: str) -> None:
        case = result.case
        if self._share_is_over():
            return result.close("left out", f"the case's share of the run's {self.limits.total_s:.0f} s was over")
        self.progress(f"{case.name}: {result.provider.name}, gate")
        gate = self._ask(result, "gate", case=gate_case.to_json(), path=path)
        result.gate_pairs = gate_case.pairs
        result.value_error, result.gradient_error = gate["value"], gate["gradient"]
        red = describe_red_gate(case.dtype, gate["value"], gate["gradient"])
        if red is not None:
            return result.close("gate red", red)
        self.progress(f"{case.name}: {result.provider.name}, memory")
        memory = self._ask(result, "memory", case=case.to_json())
        result.compile_ms = memory["first_ms"] if gate_case != case else gate["first_ms"]
        result.peak_bytes, result.gradient_bytes = memory["peak"], memory["gradients"]
        result.call_ms = memory["call_ms"]
        return None

    def _round(self, result: Result, number: int) -> None:
        if result.times_ms and (self._share_is_over() or (self._is_slow(result) and len(result.times_ms) >= 3)):
            return
        self.progress(f"{result.case.name}: {result.provider.name}, round {number + 1} of {self.limits.rounds}")
        # A long call needs no warming up.
        options = {"budget_s": self.limits.budget_s, "warmup": int(result.call_ms / 1e3 < self.limits.budget_s)}
        result.times_ms += self._ask(result, "time", case=result.case.to_json(), **options)["ms"]
        if result.provider.is_cpu_engine:
            dtype, threads = result.case.dtype, result.provider.threads
            result.peaks.append(self.ask_judge("peak", dtype=dtype, threads=threads)["flops"])

    def _is_slow(self, result: Result) -> bool:
        return result.call_ms / 1e3 > 5 * self.limits.budget_s

    def _guarded(self, result: Result, action: Callable[[], None]) -> None:
        """Does ``action`` unless the result is closed; what goes wrong closes it instead of the run."""
        if result.status != "pending":
            return
        try:
            action()
        except MissingLibraryError as error:
            self.missing[result.provider.name] = str(error)
            result.close("missing", str(error))
        except TimeoutError as error:
            result.close("timed out", str(error))
        except WorkerError as error:
            result.close("failed", str(error))

    def _ask(self, result: Result, op: str, **arguments: Any) -> dict[str, Any]:
        return self._worker(result.provider.name).ask(op, self._patience(), **arguments)

    def _worker(self, name: str) -> WorkerProcess:
        worker = self.workers.get(name)
        if worker is None or not worker.alive:
            worker = self.workers[name] = WorkerProcess(name, self.device, self.own_threads.get(name, self.threads))
        return worker

    def _patience(self) -> float:
        if self.deadline is None:
            return self.limits.request_s
        # A request that has begun may end a little late; the run is cut between requests.
        return min(self.limits.request_s, max(10.0, self.deadline - time.monotonic() + 5.0))

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _share_is_over(self) -> bool:
        return self.case_deadline is not None and time.monotonic() > self.case_deadline

    @staticmethod
    def _key(result: Result) -> tuple[str, str, str]:
        return result.provider.name, result.case.loss, result.case.dtype


def describe_red_gate(dtype: str, value_error: float, gradient_error: float) -> str | None:
    """Why errors of this size (or NaN) make a provider's speed meaningless, or None."""
    for name, error, allowed in (
        ("value", value_error, VALUE_TOLERANCE[dtype]),
        ("gradient", gradient_error, GRADIENT_TOLERANCE[dtype]),
    ):
        if not error <= allowed:
            return f"relative error of the {name} is {error:.1e}, {allowed:.0e} allowed"
    return None
    import torch

    return torch.float64
