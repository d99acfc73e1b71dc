"""The process in which one provider is measured: ``python -m benchmarks.worker PROVIDER DEVICE THREADS``.

Reads one JSON request a line from standard input and answers each with one JSON line; whatever a library prints goes to
standard error. :mod:`benchmarks.runner` is at the other end.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.environment import describe_device
from benchmarks.measure import (
    ValueAndGradients,
    available_bytes,
    gemm_rate,
    gradient_step,
    peak_memory,
    rate_of_threads,
    relative_errors,
    sample_times,
)
from benchmarks.providers import find
from fastcl.backends import cpu

JUDGE = "judge"
"""the worker that measures nobody: it computes references in float64 and describes the machine"""


class Worker:
    """Answers requests; holds the inputs and the step of one case at a time."""

    def __init__(self, provider: str, device: str) -> None:
        self.device = device
        self.provider = None if provider == JUDGE else find(provider, device)
        self.case: Case | None = None
        self.step: Callable[[], ValueAndGradients] | None = None

    def describe(self) -> dict[str, Any]:
        device, level = describe_device(self.device), ""
        if self.device == "cpu" and cpu.unavailable() is None:
            level = cpu.level()
            if level != cpu.levels()[-1]:
                device += f", engine at {level}"
        return {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(), "level": level}

    def ready(self, case: dict[str, Any] | None = None) -> dict[str, Any]:
        """Imports what the provider needs, so that no measurement waits for it or shares the machine with it."""
        if case is not None:
            self.provider.build(Case(**case))
        return {}

    def gemm(self, dtype: str) -> dict[str, Any]:
        rate = gemm_rate(getattr(torch, dtype), self.device)
        return {"flops": rate.flops, "library": rate.library, "size": rate.size}

    def peak(self, dtype: str, threads: int | None) -> dict[str, Any]:
        """The arithmetic peak of the CPU engine's level, on all threads where ``threads`` is None."""
        rate = rate_of_threads(lambda: cpu.peak_flops(getattr(torch, dtype)), threads or torch.get_num_threads())
        return {"flops": rate}

    def available(self) -> dict[str, Any]:
        return {"bytes": available_bytes(self.device)}

    def reference(self, case: dict[str, Any], path: str) -> dict[str, Any]:
        """Writes the exact value and gradients of a case's inputs, by the textbook formula in float64."""
        this = Case(**case)
        features, tau = this.inputs(self.device, torch.float64)
        formula = this.table_row.reference
        inputs = [*features, tau] if isinstance(tau, Tensor) else features
        exact = gradient_step(lambda *_: formula(features, tau).mean(), inputs)()
        torch.save((exact.value.cpu(), tuple(x.cpu() for x in exact.gradients)), path)
        return {}

    def gate(self, case: dict[str, Any], path: str) -> dict[str, Any]:
        """Errors of value and gradients against what :meth:`reference` wrote."""
        first_ms = self._hold(Case(**case))
        found = self.step()
        value, gradients = torch.load(path, map_location=self.device)
        # A peer that can't learn the temperature is judged on the gradients of the features.
        exact = ValueAndGradients(value, gradients[: len(found.gradients)])
        errors = relative_errors(found, exact)
        return {"value": errors.value, "gradient": errors.gradient, "first_ms": first_ms}

    def memory(self, case: dict[str, Any]) -> dict[str, Any]:
        first_ms = self._hold(Case(**case))
        start = time.perf_counter()
        peak = peak_memory(self.step, self.device)
        call_ms = (time.perf_counter() - start) * 1e3
        gradients = sum(x.numel() * x.element_size() for x in self.inputs if x.requires_grad)
        return {"peak": peak, "gradients": gradients, "first_ms": first_ms, "call_ms": call_ms}

    def time(self, case: dict[str, Any], budget_s: float, warmup: int) -> dict[str, Any]:
        self._hold(Case(**case))
        return {"ms": sample_times(self.step, self.device, budget_s=budget_s, warmup=warmup)}

    def _hold(self, case: Case) -> float | None:
        """Prepares the step of ``case``; the milliseconds of a compiler's first call where it was compiled now."""
        if case == self.case:
            return None
        self.step = self.inputs = self.case = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        if self.provider.compiles:
            # Each case is compiled for its own shape; without a reset the second would be compiled for any shape.
            torch._dynamo.reset()
        loss = self.provider.build(case)
        features, tau = case.inputs(self.device)
        if isinstance(tau, Tensor) and not self.provider.learns_scale:
            tau = tau.item()
        self.inputs = [*features, tau] if isinstance(tau, Tensor) else features
        self.step = gradient_step(lambda *_: loss(features, tau), self.inputs)
        self.case = case
        if not self.provider.compiles:
            return None
        start = time.perf_counter()
        self.step()
        return (time.perf_counter() - start) * 1e3


def main() -> None:
    provider, device, threads = sys.argv[1:]
    if int(threads) > 0:
        torch.set_num_threads(int(threads))
    # Libraries print; answers go where nobody else writes.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(provider, device)
            answer = getattr(worker, request.pop("op"))(**request)
        except ImportError as error:
            answer = {"missing": _one_line(error)}
        except Exception as error:  # a provider that fails is a row of the table, not the end of the run
            answer = {"failed": f"{type(error).__name__}: {_one_line(error)}"}
        print(json.dumps(answer), file=answers)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # Results are published: where a machine keeps its files is nobody's business.
    for folder, name in ((sys.prefix, "<env>"), (Path(__file__).resolve().parent.parent, "."), (Path.home(), "~")):
        text = text.replace(str(folder), name)
    return text[:300]


if __name__ == "__main__":
    main()
