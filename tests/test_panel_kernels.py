"""The CPU engine's kernels of panel functions, against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fastcl.backends import cpu
from fastcl.losses import triplet
from fastcl.terms import NO_GRADIENTS, PanelNeeds
from tests import panel_kernels
from tests.panel_kernels import KERNELS

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
]
HAS = [(name, option) for name, kernel in KERNELS.items() for option in kernel.options]
HAS = [each for each in HAS if KERNELS[each[0]].function.kernel in cpu.PANEL_KERNELS]
EACH_OPTION = pytest.mark.parametrize(("name", "option"), HAS)
EACH = pytest.mark.parametrize(("name", "option"), list({name: (name, option) for name, option in HAS}.values()))
SHAPES = ((1, 1, 1), (1, 700, 9), (700, 1, 17), (97, 193, 513), (403, 301, 77))


@EACH_OPTION
@pytest.mark.parametrize(("n", "m", "depth"), SHAPES)
def test_agrees_with_float64(name: str, option: str, n: int, m: int, depth: int) -> None:
    panel_kernels.check("cpu", name, *panel_kernels.make(name, option, n, m, depth))


@EACH_OPTION
@pytest.mark.parametrize("row0", [5, 290, -3, 2**40])
def test_own_keys_of_a_shard(name: str, option: str, row0: int) -> None:
    panel_kernels.check("cpu", name, *panel_kernels.make(name, option, 130, 301, 8, row0=row0))


@EACH
@pytest.mark.parametrize("level", cpu.levels() if cpu.unavailable() is None else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_level(name: str, option: str, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CPU_LEVEL", level)
    rounds_w = dtype is torch.bfloat16 and level.endswith("bf16")
    x, incoming = panel_kernels.make(name, option, 403, 301, 77, dtype)
    panel_kernels.check("cpu", name, x, incoming, of_products=1e3 if rounds_w else 1.0)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1500, 900), (100, 5000)])
def test_bits_do_not_depend_on_threads(name: str, option: str, dtype: torch.dtype, n: int, m: int) -> None:
    x, incoming = panel_kernels.make(name, option, n, m, 64, dtype)
    needs = panel_kernels.needs_of(name, x)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(panel_kernels.run("cpu", name, x, incoming if any(needs[:6]) else None, needs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(one is two or torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@EACH
def test_any_combination_of_gradients(name: str, option: str) -> None:
    x, incoming = panel_kernels.make(name, option, 100, 70, 9)
    wanted = panel_kernels.needs_of(name, x)
    if not any(wanted[:6]):
        pytest.skip("it has none")
    full = panel_kernels.run("cpu", name, x, incoming, wanted)
    for flags in itertools.product(*((False, True) if need else (False,) for need in wanted)):
        found = panel_kernels.run("cpu", name, x, incoming, PanelNeeds(*flags))
        for field, needed, got, all_of_it in zip(PanelNeeds._fields, flags, found, full, strict=True):
            assert (got is not None) == needed, field
            if needed:
                torch.testing.assert_close(got, all_of_it, rtol=1e-4, atol=1e-6)


@EACH
@pytest.mark.parametrize(("scale", "bias"), [(0.7, 0.1), (-0.7, 0.1), (0.0, 0.2)])
def test_scales_and_biases(name: str, option: str, scale: float, bias: float) -> None:
    if not scale and KERNELS[name].function in (triplet.hardest_rows, triplet.all_triplets):
        pytest.skip("where all distances are equal but for rounding, so is their order")
    panel_kernels.check("cpu", name, *panel_kernels.make(name, option, 403, 301, 24, scale=scale, bias=bias))


@pytest.mark.parametrize("option", ["labels", "cosine"])
def test_the_first_of_equally_hard_ones_is_mined(option: str) -> None:
    """Whichever task, strip and lane they are in."""
    x, incoming = panel_kernels.make("hardest", option, 37, 500, 24)
    params = None if x.column_params is None else x.column_params.repeat(1, 4)
    key_tags = x.key_tags._replace(labels=x.key_tags.labels.repeat(4))
    x = replace(x, b=x.b.repeat(4, 1), column_params=params, key_tags=key_tags, row0=torch.tensor(10**6))
    panel_kernels.check("cpu", "hardest", x, incoming)
    found = panel_kernels.run("cpu", "hardest", x, None, NO_GRADIENTS).values
    assert float(found.max()) < 500


@pytest.mark.parametrize("name", ["contrastive", "negatives", "lifted"])
def test_a_distance_of_zero_has_no_slope(name: str) -> None:
    x, incoming = panel_kernels.make(name, "labels", 60, 60, 4)
    x = replace(x, a=torch.ones(60, 4) / 2, b=torch.ones(60, 4) / 2)
    x.row_params[-1], x.column_params[-1] = 1.0, 1.0
    panel_kernels.check("cpu", name, x, incoming)
    assert float(panel_kernels.run("cpu", name, x, incoming, panel_kernels.needs_of(name, x)).a.abs().max()) == 0


@EACH
def test_what_is_not_a_number_stays_in_its_row(name: str, option: str) -> None:
    x, _ = panel_kernels.make(name, option, 40, 30, 8)
    spoilt = replace(x, a=x.a.clone())
    spoilt.a[7, 3] = torch.nan
    want, found = (panel_kernels.run("cpu", name, each, None, NO_GRADIENTS).values for each in (x, spoilt))
    others = torch.arange(40) != 7
    assert torch.equal(found[:, others], want[:, others])
    assert name == "hardest" or bool(found[:, 7].isnan().any())
