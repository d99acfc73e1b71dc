"""The kernels of the `triton` backend as :mod:`benchmarks.tune` runs them: one sweep, or the panels of one backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.measure import time_step
from benchmarks.tune import DTYPES, Job
from fastcl import tuning
from fastcl.backends import triton
from fastcl.backends.triton.kernels.registers import registers_kernel
from fastcl.backends.triton.kernels.sigmoid import sigmoid_kernel
from fastcl.backends.triton.kernels.sweep import sweep_kernel
from fastcl.backends.triton.kernels.weights import weights_kernel
from fastcl.terms import (
    NO_TAGS,
    Axis,
    Mask,
    Operands,
    PanelNeeds,
    PanelOperands,
    Plan,
    Reduce,
    Statistics,
    Tags,
    Term,
)

_NEITHER, _NOT_SELF = Mask(self_pair=False, target=False), Mask(self_pair=False)
_OTHERS, _NEGATIVES = Mask(self_pair=False, label=True), Mask(label=False)
_NT_XENT = (Term(Reduce.LSE, _NEITHER), Term(Reduce.SUM, Mask(target=True)))
_ROW_OR_COLUMN = tuple(Axis)
PLANS = {
    "": Plan((*(Term(Reduce.LSE, _NOT_SELF, axis) for axis in _ROW_OR_COLUMN), Term(Reduce.SUM, Mask(self_pair=True)))),
    "symmetric": Plan(_NT_XENT, symmetric=True),
    "symmetric_several": Plan((*_NT_XENT, Term(Reduce.MAX, _NEITHER)), symmetric=True),
    "tags": Plan(
        tuple(
            Term(reduce, mask, axis)
            for axis in _ROW_OR_COLUMN
            for reduce, mask in ((Reduce.LSE, _NEGATIVES), (Reduce.SUM, Mask(label=True)))
        )
    ),
    "symmetric_tags": Plan(
        (Term(Reduce.LSE, _NEGATIVES), Term(Reduce.LSE, _OTHERS), Term(Reduce.SUM, _OTHERS)), symmetric=True
    ),
}
"""The plan that is timed, by what follows the kernel's name in an entry of the tables."""
_LABELS = 8
Step = Callable[[], Sequence[Tensor]]
_JIT = {"sweep": sweep_kernel, "weights": weights_kernel, "registers": registers_kernel, "sigmoid": sigmoid_kernel}


class KernelBench:
    """Implements :class:`benchmarks.tune.Bench` with ``rows`` rows of S on a device."""

    def __init__(self, rows: int, device: str, budget_s: float = 0.1) -> None:
        self.rows, self.device, self.budget_s = rows, device, budget_s
        self._job: Job | None = None
        self._step: Step = tuple
        self._known: set[int] = set()
        self._spills = 0

    def outputs(self, job: Job, config: tuning.Config | None) -> Sequence[Tensor]:
        step = self._step_of(job)
        with _settings(job, config):
            outputs = step()
        self._look_at_compiled(_JIT[job.base])
        return outputs

    def spills(self) -> int:
        return self._spills

    def milliseconds(self, job: Job, config: tuning.Config | None) -> float:
        step = self._step_of(job)
        with _settings(job, config):
            return time_step(step, self.device, budget_s=self.budget_s, warmup=2).median_ms

    def _step_of(self, job: Job) -> Step:
        """One call of the job's kernels; its inputs are kept until another job comes."""
        if self._job != job:
            with _settings(job, None):
                self._job, self._step = job, self._prepare(job)
        return self._step

    def _prepare(self, job: Job) -> Step:
        if job.base == "sigmoid":
            return self._siglip(job)
        plan = PLANS[job.kernel.removeprefix(job.base).removeprefix("_")]
        operands = self._operands(job, plan)
        if job.base == "sweep":
            return lambda: tuple(triton.statistics(plan, operands))
        values = triton.statistics(plan, operands)
        incoming = Statistics(*(torch.full_like(value, 1.0 / self.rows) for value in values))

        def step() -> tuple[Tensor, ...]:
            products = triton.gradient(plan, operands, values, incoming, True, not plan.symmetric)
            return tuple(product for product in products if product is not None)

        return step

    def _siglip(self, job: Job) -> Step:
        given = self._operands(job, PLANS[""])
        bias = torch.tensor(-10.0, device=self.device)
        operands = PanelOperands(given.a, given.b, given.scale, bias, None, None, None, NO_TAGS, NO_TAGS)
        incoming = torch.full((1, self.rows), 1.0 / self.rows, device=self.device)
        needs = PanelNeeds(a=True, b=True, scale=True, bias=True, row_params=False, column_params=False)

        def step() -> tuple[Tensor, ...]:
            found = triton.PANEL_KERNELS["sigmoid"](operands, incoming, None, needs)
            return tuple(gradient for gradient in found if gradient is not None)

        return step

    def _operands(self, job: Job, plan: Plan) -> Operands:
        name = DTYPES[job.precision]
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        if self.device == "cpu" and dtype is torch.bfloat16:
            dtype = torch.float16  # Triton's interpreter multiplies bfloat16 wrongly
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            x = torch.randn(self.rows, job.d, generator=generator)
            return torch.nn.functional.normalize(x, dim=1).to(self.device, dtype)

        index = torch.arange(self.rows, device=self.device)
        tags = Tags(labels=index % _LABELS) if plan.tests("label") else NO_TAGS
        return Operands(
            draw(),
            None if plan.symmetric else draw(),
            torch.tensor(10.0, device=self.device),
            target=index.roll(self.rows // 2) if plan.tests("target") else None,
            norm_bound=1.0,
            row_tags=tags,
            column_tags=NO_TAGS if plan.symmetric else tags,
        )

    def _look_at_compiled(self, kernel) -> None:
        """Spills of what was compiled since the last look; the interpreter compiles nothing."""
        caches = getattr(kernel, "device_caches", {})
        compiled = [entry for cache, *_ in caches.values() for entry in cache.values()]
        new = [entry for entry in compiled if id(entry) not in self._known]
        self._known |= set(map(id, compiled))
        # One that was refused for its shared memory was never loaded, and has no number.
        self._spills = max((spills for entry in new if (spills := getattr(entry, "n_spills", None))), default=0)


@contextlib.contextmanager
def _settings(job: Job, config: tuning.Config | None) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if job.precision == "tf32" else "highest")
    try:
        of_job = {"registers": config} if job.base == "registers" else {"config": config, "kernel": job.kernel}
        with tuning.override(**of_job):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
