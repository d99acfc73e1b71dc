"""The kernel of SigLIP and binary NCE in Triton's interpreter. Started by ``test_triton_interpreter.py``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastcl import tuning
from fastcl.backends import triton
from fastcl.terms import PanelNeeds
from tests.test_sigmoid import EACH_OPTION, EVERYTHING, check, judge, make, run
from tests.test_triton_interpreter import WIDE_TILES, interpreted


@pytest.fixture(autouse=True)
def _small_panels(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and panels in tiny shapes, and NaN wherever nothing was written."""
    monkeypatch.setattr("fastcl.backends.triton.partials._MOST", 1)
    with tuning.override(WIDE_TILES, workspace_bytes=4 * 32 * 64):
        yield


@interpreted
@EACH_OPTION
@pytest.mark.parametrize(("n", "m", "depth"), [(1, 1, 1), (2, 33, 5), (33, 2, 17), (75, 69, 20)])
def test_agrees_with_float64(option: str, n: int, m: int, depth: int) -> None:
    check("triton", *make(option, n, m, depth))


@interpreted
@EACH_OPTION
def test_float16(option: str) -> None:
    check("triton", *make(option, 75, 69, 20, torch.float16), of_products=300.0)


@interpreted
@EACH_OPTION
@pytest.mark.parametrize(("scale", "bias", "row0"), [(100.0, -10.0, 5), (-100.0, 10.0, 60), (0.0, -1.0, -3)])
def test_large_logits_of_a_shard(option: str, scale: float, bias: float, row0: int) -> None:
    check("triton", *make(option, 40, 69, 8, scale=scale, bias=bias, row0=row0), tolerance=1e-5)


@interpreted
def test_any_combination_of_gradients() -> None:
    x, incoming = make("offsets", 33, 40, 5)
    full = run("triton", x, incoming, EVERYTHING)
    for flags in itertools.product(*((False, True) if wanted else (False,) for wanted in EVERYTHING)):
        found = run("triton", x, incoming, PanelNeeds(*flags))
        for name, needed, got, all_of_it in zip(PanelNeeds._fields, flags, found, full, strict=True):
            assert (got is not None) == needed, name
            if needed:
                torch.testing.assert_close(got, all_of_it, rtol=1e-4, atol=1e-6)


@interpreted
def test_strides() -> None:
    x, incoming = make("everything", 33, 40, 20)
    check("triton", replace(x, a=x.a.t().contiguous().t(), b=x.b.repeat_interleave(2, 1)[:, ::2]), incoming)


@interpreted
def test_nan_propagates() -> None:
    x, incoming = make("labels", 40, 50, 8)
    x.a[7, 3] = math.nan
    want, got = judge(x, incoming), run("triton", x, incoming, EVERYTHING._replace(column_params=False))
    assert torch.equal(got.values.isnan(), want.values.isnan())
    assert torch.equal(got.a.isnan(), want.a.isnan())
    assert got.b.isnan().all()


def test_refusals() -> None:
    x, _ = make("plain", 5, 3, 4)
    assert (triton.takes(x.a) is None) == (triton.unavailable() is None)
    assert triton.takes(x.a.double()) is not None
