"""The backend `cuda` from the public call down to its kernels, which an emulation runs on the CPU.

The extension is built as for a GPU, but for the engine, whose kernels' source runs on the CPU (tests/cpp), and for the
type of its device.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import engine, tuning
from fastcl.backends import cuda, dense, panels
from fastcl.backends.cuda.binding import extension, load
from fastcl.terms import Axis, Mask, Operands, PanelNeeds, Plan, Reduce, Statistics, Tags, Term
from tests import panel_kernels
from tests.cases import relative_error
from tests.losses import LOSSES, Loss
from tests.test_correctness import check_against_float64
from tests.test_cpu_masks import with_thresholds
from tests.test_false_negatives import CALLS, grid

ROOT = Path(__file__).parents[1]
INCLUDES = (ROOT / "tests" / "cpp", Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include")))
NOT_SELF, NEITHER = Mask(self_pair=False), Mask(self_pair=False, target=False)
SYMMETRIC = Plan((Term(Reduce.LSE, NEITHER), Term(Reduce.SUM, Mask(target=True)), Term(Reduce.MAX)), symmetric=True)
BOTH_AXES = Plan(
    (
        Term(Reduce.LSE, NEITHER),
        Term(Reduce.LSE, NOT_SELF, Axis.COLUMN),
        Term(Reduce.SUM, Mask(target=True), Axis.COLUMN),
        Term(Reduce.MAX, NOT_SELF),
    )
)
ROWS = Plan((Term(Reduce.LSE, Mask(target=False)), Term(Reduce.SUM, Mask(target=True))))
SUP_CON = Plan(
    (
        Term(Reduce.LSE, Mask(label=False, id=False)),
        Term(Reduce.LSE, Mask(label=True, self_pair=False)),
        Term(Reduce.SUM, Mask(label=True, self_pair=False)),
        Term(Reduce.LSE, Mask(self_pair=False, above=False)),
    ),
    symmetric=True,
    label_width=1,
)
TAGS_ON_BOTH_AXES = Plan(
    (
        Term(Reduce.LSE, Mask(self_pair=False, target=False, above=False)),
        Term(Reduce.MAX, Mask(id=False)),
        Term(Reduce.SUM, Mask(target=True, label=True)),
        Term(Reduce.LSE, Mask(label=False, above=True), Axis.COLUMN),
        Term(Reduce.SUM, Mask(id=True), Axis.COLUMN),
        Term(Reduce.LSE, Mask(self_pair=False, id=False), Axis.COLUMN),
    ),
    label_width=2,
)
EACH_PLAN = pytest.mark.parametrize(
    "plan",
    [SYMMETRIC, BOTH_AXES, SUP_CON, TAGS_ON_BOTH_AXES],
    ids=["symmetric", "both-axes", "sup_con", "tags-on-both-axes"],
)
PANEL_FUNCTIONS = [
    (name, option)
    for name, kernel in panel_kernels.KERNELS.items()
    if kernel.function.kernel in cuda.PANEL_KERNELS
    for option in kernel.options
]
EACH_OPTION = pytest.mark.parametrize(("name", "option"), PANEL_FUNCTIONS)
EACH_FUNCTION = pytest.mark.parametrize(
    ("name", "option"), list({name: (name, option) for name, option in PANEL_FUNCTIONS}.values())
)
EACH_LOSS = pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES if "cuda" in loss.backends], ids=lambda loss: loss.name
)

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to build the emulated engine with"),
    pytest.mark.skipif(not (INCLUDES[2] / "Python.h").is_file(), reason="there is no Python.h"),
    pytest.mark.usefixtures("emulated", "poisoned_memory"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The emulated extension in the place of ``fastcl._cuda``."""
    library = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    sources = (ROOT / "csrc" / "cuda_bindings.cpp", ROOT / "tests" / "cpp" / "cuda_engine_emulated.cpp")
    flags = (
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
        "-DTORCH_TARGET_VERSION=0x020B000000000000",
    )
    link = (f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")
    command = (
        "g++",
        *flags,
        "-DFASTCL_CUDA_EMULATED",
        *(f"-I{path}" for path in INCLUDES),
        *sources,
        *link,
        "-o",
        library,
    )
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("fastcl._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("fastcl._cuda", None)  # where a module in C of this kind puts itself
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fastcl._cuda", module)
        patch.setattr(fastcl, "_cuda", module, raising=False)
        load.cache_clear()
        yield
    load.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", "hopper")


@pytest.fixture
def registers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sums in registers wherever they can be; the operators that were called."""
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", "registers")
    called = []
    run = cuda.run

    def noted(name: str, *arguments: object) -> object:
        called.append(name)
        return run(name, *arguments)

    monkeypatch.setattr(cuda, "run", noted)
    return called


def make(plan: Plan, n: int, m: int, dim: int, dtype: torch.dtype, scale: float) -> Operands:
    def unit(count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, dim), dim=1).to(dtype)

    def draw_tags(rows: int) -> Tags:
        """Some labels are neighbours, and some differ in the high half alone; so do ids."""
        values = torch.tensor([-(2**62), 1 - 2**62, -7, -6, 0, 2**40, 2**40 + 2])
        return Tags(values[torch.randint(7, (rows,))], values[torch.randint(7, (rows,))])

    b = None if plan.symmetric else unit(m)
    row_tags, column_tags = draw_tags(n), draw_tags(m)
    target = torch.randint(-2, m + 2, (n,))
    return with_thresholds(
        Operands(unit(n), b, torch.tensor(scale), target, 1.0, row_tags=row_tags, column_tags=column_tags)
    )


def check_gradient(plan: Plan, operands: Operands, tolerance: float) -> None:
    exact = replace(operands, a=operands.a.double(), b=None if operands.b is None else operands.b.double())
    exact = replace(exact, scale=operands.scale.double())
    want = dense.statistics(plan, exact)
    got = cuda.statistics(plan, operands)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    incoming = Statistics(*(torch.randn_like(values) / max(1, values.shape[-1]) for values in got))
    needs_b = not plan.symmetric
    wanted = dense.gradient(plan, exact, want, Statistics(*(x.double() for x in incoming)), True, needs_b)
    for x, y in zip(cuda.gradient(plan, operands, got, incoming, True, needs_b), wanted, strict=True):
        assert (x is None) == (y is None)
        assert x is None or relative_error(x, y) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(33, 17), (75, 33)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@EACH_LOSS
def test_agrees_with_float64(loss: Loss, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_against_float64(loss, *shape, dtype, "cuda")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@EACH_PLAN
def test_several_panels(plan: Plan, dtype: torch.dtype, tolerance: float) -> None:
    """Of one tile each, the last ones ragged."""
    operands = make(plan, 300, 300 if plan.symmetric else 190, 20, dtype, 12.0)
    with tuning.override(workspace_bytes=128 * 128 * operands.a.element_size()):
        check_gradient(plan, operands, tolerance)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@EACH_LOSS
def test_hopper_agrees_with_float64(loss: Loss, dtype: torch.dtype) -> None:
    check_against_float64(loss, 75, 33, dtype, "cuda")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@EACH_PLAN
def test_several_panels_on_hopper(plan: Plan, dtype: torch.dtype, tolerance: float) -> None:
    operands = make(plan, 300, 300 if plan.symmetric else 190, 20, dtype, 12.0)
    with tuning.override(workspace_bytes=128 * 256 * operands.a.element_size()):
        check_gradient(plan, operands, tolerance)


@EACH_LOSS
def test_sums_in_registers_agree_with_float64(loss: Loss, registers: list[str]) -> None:
    check_against_float64(loss, 75, 33, torch.float16, "cuda")
    assert not {"gradient", "weights"} <= set(registers)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("dim", [20, 100, 136])
@pytest.mark.parametrize("plan", [SYMMETRIC, BOTH_AXES, ROWS], ids=["symmetric", "both-axes", "rows"])
def test_sums_in_registers(plan: Plan, dim: int, dtype: torch.dtype, tolerance: float, registers: list[str]) -> None:
    """For each length of rows that there is a kernel for, of several blocks and tiles, the last ones ragged."""
    check_gradient(plan, make(plan, 140, 140 if plan.symmetric else 170, dim, dtype, 12.0), tolerance)
    assert registers == ["statistics", "gradient", *["gradient"] * (not plan.symmetric)]


def test_sums_in_registers_of_a_shard(registers: list[str]) -> None:
    operands = replace(make(BOTH_AXES, 140, 150, 16, torch.float16, 10.0), row0=1000, col0=990)
    check_gradient(BOTH_AXES, replace(operands, target=operands.target + 990), 5e-4)
    assert "weights" not in registers


def test_sums_in_registers_of_one_operand(registers: list[str]) -> None:
    operands = make(BOTH_AXES, 40, 50, 16, torch.float16, 10.0)
    values = cuda.statistics(BOTH_AXES, operands)
    incoming = Statistics(*map(torch.ones_like, values))
    both = cuda.gradient(BOTH_AXES, operands, values, incoming, True, True)
    registers.clear()
    only_a = cuda.gradient(BOTH_AXES, operands, values, incoming, True, False)
    only_b = cuda.gradient(BOTH_AXES, operands, values, incoming, False, True)
    assert registers == ["gradient"] * 2
    assert only_a.b is None
    assert only_b.a is None
    assert torch.equal(both.a, only_a.a)
    assert torch.equal(both.b, only_b.b)


def test_where_sums_are_in_registers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a table says so, in half precision, without tags; panels of W otherwise."""

    def taken(plan: Plan, dim: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return cuda._takes_registers(plan, torch.zeros(2, dim, dtype=dtype))

    monkeypatch.delenv("FASTCL_CUDA_KERNELS", raising=False)
    assert not any(taken(SYMMETRIC, dim) for dim in (16, 64, 128, 256))
    content = json.loads((Path(tuning.__file__).parent / "default.json").read_text())
    (tmp_path / "measured.json").write_text(json.dumps(content | {"cuda_registers": {"half": [64, 256]}}))
    monkeypatch.setattr(tuning, "table", lambda capability: tuning._read(tmp_path / "measured.json"))
    assert [dim for dim in (1, 63, 64, 65, 128, 129, 256, 257) if taken(SYMMETRIC, dim)] == [1, 63, 64, 129, 256]
    assert not taken(SUP_CON, 64)
    assert not taken(SYMMETRIC, 64, torch.float32)
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", "portable")
    assert not taken(SYMMETRIC, 64)
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", "registers")
    assert [dim for dim in (1, 128, 256, 257) if taken(BOTH_AXES, dim)] == [1, 128, 256]
    assert not taken(SUP_CON, 64)


def test_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both can be forced; only a GPU of compute capability 9.0 takes the Hopper kernels by itself, float32 never."""
    half, single = torch.zeros(2, 8, dtype=torch.float16), torch.zeros(2, 8)
    monkeypatch.delenv("FASTCL_CUDA_KERNELS", raising=False)
    assert not cuda._takes_hopper(half)
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", "portable")
    assert not cuda._takes_hopper(half)
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", "hopper")
    assert cuda._takes_hopper(half)
    assert not cuda._takes_hopper(single)
    monkeypatch.setattr(extension(), "HAS_HOPPER", 0)
    with pytest.raises(ValueError, match=r"not built for compute capability 9\.0"):
        cuda._takes_hopper(half)
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", "blackwell")
    with pytest.raises(
        ValueError, match="FASTCL_CUDA_KERNELS must be one of portable, hopper, registers, got 'blackwell'"
    ):
        cuda._takes_hopper(half)


def test_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    operands = make(BOTH_AXES, 60, 70, 24, torch.float32, 1.0)
    errors = []
    want = dense.statistics(BOTH_AXES, replace(operands, a=operands.a.double(), b=operands.b.double()))
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        got = cuda.statistics(BOTH_AXES, operands)
        errors.append(max(float((x - y).abs().max()) for x, y in zip(got, want, strict=True)))
    torch.set_float32_matmul_precision(before)
    assert errors[0] < 1e-5 < errors[1] < 2e-3


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.repeat(2, 2)[: len(x), : x.shape[1]],
        lambda x: x.t().contiguous().t(),
        lambda x: x.view(-1)[1:-19].view(-1, 20),
        lambda x: x[:1].expand(len(x), -1),
    ],
    ids=["pitch", "transposed", "unaligned", "expanded"],
)
def test_rows_that_copies_cannot_read(change, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make(BOTH_AXES, 40, 50, 20, torch.bfloat16, 10.0)
    a = change(operands.a)
    check_gradient(BOTH_AXES, replace(operands, a=a, target=operands.target[: len(a)]), 4e-3)


def test_row_and_column_offsets() -> None:
    operands = replace(make(BOTH_AXES, 140, 150, 16, torch.float32, 10.0), row0=1000, col0=990)
    check_gradient(BOTH_AXES, replace(operands, target=operands.target + 990), 1e-5)


@pytest.mark.parametrize(
    ("path", "dtype"),
    [("portable", torch.float32), ("portable", torch.bfloat16), ("hopper", torch.bfloat16)],
    ids=["float32", "bfloat16", "hopper"],
)
@pytest.mark.parametrize("name", CALLS)
def test_a_margin(name: str, path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are exact, so that every backend must leave out the same pairs."""
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", path)
    call, reference = CALLS[name]
    x, y = grid(141, 24, dtype), grid(142, 24, dtype)[:141].detach().requires_grad_()
    wide = [features.detach().double().requires_grad_() for features in (x, y)]
    tolerance = 2e-5 if dtype is torch.float32 else 4e-3
    want = reference(*wide)
    got = call(x, y, reduction="none", backend="cuda")
    assert (got.double() - want).abs().max() < tolerance
    exact = torch.autograd.grad(want.mean(), wide)
    for gradient, expected in zip(torch.autograd.grad(got.mean(), (x, y)), exact, strict=True):
        assert relative_error(gradient, expected) < tolerance


@pytest.mark.parametrize(
    ("path", "dtype"), [("portable", torch.float32), ("hopper", torch.float16)], ids=["float32", "hopper"]
)
@pytest.mark.parametrize("axis", Axis)
def test_a_pair_that_rounding_moved_over_the_threshold(
    axis: Axis, path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward left out a pair whose exponential would dwarf all others; in the backward it weighs at most 1."""
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", path)
    n = 31
    plan = Plan((Term(Reduce.LSE, Mask(above=False), axis),))
    a = torch.eye(n, 40, dtype=dtype)
    tags = Tags(threshold=torch.full((n,), 50.0))
    operands = Operands(a, a.clone(), torch.tensor(100.0), None, 1.0, row_tags=tags, column_tags=tags)
    statistics = cuda.statistics(plan, operands)
    torch.testing.assert_close(torch.cat(tuple(statistics)), torch.full((1, n), math.log(n - 1)))
    tags = Tags(threshold=tags.threshold + 100.0)
    incoming = Statistics(*(torch.ones_like(x) for x in statistics))
    moved = replace(operands, row_tags=tags, column_tags=tags)
    for x in cuda.gradient(plan, moved, statistics, incoming, True, True):
        torch.testing.assert_close(x.diagonal(), torch.ones(n))


def test_tags_that_the_kernels_read_in_another_layout() -> None:
    operands = make(TAGS_ON_BOTH_AXES, 30, 40, 16, torch.float32, 10.0)
    apart = Tags(*(torch.stack((tag, tag), dim=1)[:, 0] for tag in operands.row_tags))
    apart = apart._replace(threshold=apart.threshold.double().requires_grad_())
    check_gradient(TAGS_ON_BOTH_AXES, replace(operands, row_tags=apart), 1e-5)


def test_what_it_refuses() -> None:
    operands = make(BOTH_AXES, 8, 9, 4, torch.float32, 1.0)
    assert cuda.supports(BOTH_AXES, operands) is None
    assert "float64" in cuda.supports(BOTH_AXES, replace(operands, a=operands.a.double()))
    assert "more than 4 terms" in cuda.supports(Plan((Term(Reduce.LSE),) * 5), operands)
    assert "empty" in cuda.supports(BOTH_AXES, replace(operands, a=operands.a[:0]))
    assert "symmetric" in cuda.supports(SYMMETRIC, operands)
    assert "meta" in cuda.supports(BOTH_AXES, replace(operands, a=operands.a.to("meta")))


def test_only_on_request() -> None:
    operands = make(SYMMETRIC, 8, 8, 4, torch.float32, 1.0)
    assert engine.select(SYMMETRIC, operands) != "cuda"
    assert engine.select(SYMMETRIC, operands, "cuda") == "cuda"


@pytest.mark.parametrize("symmetric", [True, False])
def test_panels_cover_w_once(symmetric: bool) -> None:
    for n, m, elements in ((1, 1, 128 * 64), (300, 300, 256 * 256), (513, 513, 256 * 300), (700, 700, 2**20)):
        covered = torch.zeros(n, m, dtype=torch.int64)
        for panel in panels.cut(n, m, (128, 64), elements, symmetric):
            assert panel.row_begin % 128 == 0
            assert panel.mirror or panel.shape[0] * panel.shape[1] <= elements
            covered[panel.rows, panel.columns] += 1
            if symmetric and not panel.mirror:
                covered[panel.columns, panel.rows] += 1
        assert covered.eq(1).all()


@EACH_OPTION
@pytest.mark.parametrize(("n", "m", "depth"), [(1, 1, 1), (1, 150, 3), (150, 2, 17), (131, 140, 40)])
def test_panel_function(name: str, option: str, n: int, m: int, depth: int) -> None:
    panel_kernels.check("cuda", name, *panel_kernels.make(name, option, n, m, depth))


@EACH_FUNCTION
@pytest.mark.parametrize(("dtype", "of_products"), [(torch.bfloat16, 2e3), (torch.float16, 3e2)], ids=["bf16", "fp16"])
def test_panel_function_in_half_precision(name: str, option: str, dtype: torch.dtype, of_products: float) -> None:
    panel_kernels.check("cuda", name, *panel_kernels.make(name, option, 60, 131, 20, dtype), of_products=of_products)


@EACH_FUNCTION
@pytest.mark.parametrize("row0", [140, -3, 2**40])
def test_panel_function_of_a_shard(name: str, option: str, row0: int) -> None:
    panel_kernels.check("cuda", name, *panel_kernels.make(name, option, 20, 150, 8, row0=row0))


@EACH_FUNCTION
def test_panel_function_in_several_panels(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcl.backends.cuda.panel_functions._MOST_PARTIALS", 1)
    x, incoming = panel_kernels.make(name, option, 150, 260, 8)
    with tuning.override(workspace_bytes=128 * 128 * 4):
        panel_kernels.check("cuda", name, x, incoming)


@pytest.mark.parametrize("name", ["sigmoid", "lifted", "energy_power"])
def test_any_combination_of_gradients(name: str) -> None:
    x, incoming = panel_kernels.make(name, "everything" if name == "sigmoid" else "labels", 33, 40, 5)
    everything = panel_kernels.needs_of(name, x)
    full = panel_kernels.run("cuda", name, x, incoming, everything)
    for flags in itertools.product(*((False, True) if wanted else (False,) for wanted in everything)):
        found = panel_kernels.run("cuda", name, x, incoming, PanelNeeds(*flags))
        for field, needed, got, all_of_it in zip(PanelNeeds._fields, flags, found, full, strict=True):
            assert (got is not None) == needed, field
            if needed:
                torch.testing.assert_close(got, all_of_it, rtol=1e-4, atol=1e-6)


def test_panel_functions_of_rows_that_copies_cannot_read() -> None:
    x, incoming = panel_kernels.make("contrastive", "ids", 33, 40, 20)
    x = replace(x, a=x.a.t().contiguous().t(), b=x.b.repeat_interleave(2, 1)[:, ::2])
    x = replace(x, row_params=x.row_params.double(), tags=Tags(x.tags.labels, x.tags.ids[None].mT[:, 0]))
    panel_kernels.check("cuda", "contrastive", x, incoming)


@pytest.mark.parametrize("name", list(dict(PANEL_FUNCTIONS)))
def test_what_is_not_a_number_is_seen(name: str) -> None:
    """And only where the function itself has it seen."""
    x, incoming = panel_kernels.make(name, panel_kernels.KERNELS[name].options[-1], 40, 50, 8)
    x.a[7, 3] = math.nan
    needs = panel_kernels.needs_of(name, x)
    want = panel_kernels.judge(name, x, incoming)
    got = panel_kernels.run("cuda", name, x, incoming if any(needs[:6]) else None, needs)
    for found, exact in zip(got, want, strict=True):
        assert found is None or not (found.isnan() & ~exact.reshape(found.shape).isnan()).any()
    if name == "hardest":
        assert got.values[:, 7].eq(-1.0).all()
    else:
        assert torch.equal(got.values.isnan(), want.values.isnan())


def test_what_panel_functions_refuse() -> None:
    x, _ = panel_kernels.make("sigmoid", "plain", 5, 3, 4)
    assert cuda.takes(x.a) is None
    assert "float64" in cuda.takes(x.a.double())
    assert "empty" in cuda.takes(x.a[:, :0])
    assert "meta" in cuda.takes(x.a.to("meta"))
    assert engine.select_panels("sigmoid", x)[0] != "cuda"
    assert engine.select_panels("sigmoid", x, "cuda")[0] == "cuda"
