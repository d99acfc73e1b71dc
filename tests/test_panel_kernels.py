"""The CPU engine's kernels of panel functions, against float64."""

from __future__ import annotations

import pytest
import torch

from fastcl.backends import cpu
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
