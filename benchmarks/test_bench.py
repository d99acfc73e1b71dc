"""The same cases for people who live in pytest: ``pytest benchmarks/test_bench.py``, with pytest-benchmark.

One process measures everything here, so peaks of memory and a gate on each provider are the runner's business
(``python -m benchmarks``). The default test run doesn't collect this file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import Case, suite
from benchmarks.measure import available_bytes, gradient_step
from benchmarks.providers import Provider, providers
from benchmarks.runner import MEMORY_SHARE

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMETERS = [
    pytest.param(case, provider, id=f"{case.name}-{provider.name.replace(' ', '_')}")
    for case in suite(DEVICE, quick=True)
    for provider in providers(DEVICE)
    if provider.offers(case)
]


@pytest.mark.parametrize(("case", "provider"), PARAMETERS)
def test_forward_and_backward(benchmark: Any, case: Case, provider: Provider) -> None:
    benchmark.group = case.name
    reason = provider.too_large(case)
    if reason is None and provider.needed_bytes(case) > MEMORY_SHARE * available_bytes(DEVICE):
        reason = f"would need about {provider.needed_bytes(case) / 1e9:.1f} GB"
    if reason is not None:
        pytest.skip(reason)
    try:
        loss = provider.build(case)
    except ImportError as error:
        pytest.skip(f"{provider.name}: {error}")
    features, tau = case.inputs(DEVICE)
    if isinstance(tau, torch.Tensor) and not provider.learns_scale:
        tau = tau.item()
    inputs = [*features, tau] if isinstance(tau, torch.Tensor) else features
    step = gradient_step(lambda *_: loss(features, tau), inputs)

    def call() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    call()  # compiles, loads libraries
    benchmark(call)
