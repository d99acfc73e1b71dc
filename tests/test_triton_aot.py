"""The Triton kernels compiled ahead of time for every supported GPU, which needs none: what each one will ask of it.

At every default configuration a kernel must fit the shared memory of its architecture (which Triton checks only at a
launch) and keep everything in registers; on Hopper its half-precision products must be warp-group ones.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastcl import tuning

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel can't be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastcl.backends.triton import forward, launch  # noqa: E402
from fastcl.backends.triton.kernels import pair_functions  # noqa: E402
from fastcl.backends.triton.kernels.combine import combine_kernel  # noqa: E402
from fastcl.backends.triton.kernels.exponentials import exponentials_kernel, repair_kernel  # noqa: E402
from fastcl.backends.triton.kernels.head import head_kernel, loss_kernel  # noqa: E402
from fastcl.backends.triton.kernels.panel_function import panel_function_kernel  # noqa: E402
from fastcl.backends.triton.kernels.registers import registers_kernel  # noqa: E402
from fastcl.backends.triton.kernels.sigmoid import sigmoid_kernel  # noqa: E402
from fastcl.backends.triton.kernels.sweep import sweep_kernel  # noqa: E402
from fastcl.backends.triton.kernels.unit import through_unit_kernel, unit_kernel  # noqa: E402
from fastcl.backends.triton.kernels.weights import weights_kernel  # noqa: E402
from fastcl.backends.triton.panel_functions import FUNCTIONS  # noqa: E402
from fastcl.backends.triton.plan import constants  # noqa: E402
from fastcl.terms import Axis, Mask, Operands, Plan, Reduce, Term  # noqa: E402

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes a block may have, by compute capability."""

NOT_SELF, NEITHER = Mask(self_pair=False), Mask(self_pair=False, target=False)
NT_XENT = Plan(
    (Term(Reduce.LSE, NEITHER), Term(Reduce.SUM, Mask(target=True)), Term(Reduce.MAX, NEITHER)), symmetric=True
)
CLIP = Plan(
    (
        Term(Reduce.LSE, NOT_SELF),
        Term(Reduce.LSE, NOT_SELF, Axis.COLUMN),
        Term(Reduce.SUM, Mask(self_pair=True)),
        Term(Reduce.MAX, NOT_SELF),
        Term(Reduce.MAX, NOT_SELF, Axis.COLUMN),
    )
)
INFO_NCE = Plan((Term(Reduce.LSE, NEITHER), Term(Reduce.SUM, Mask(target=True)), Term(Reduce.MAX, NEITHER)))

NEGATIVES, POSITIVES, OTHERS = Mask(label=False), Mask(label=True), Mask(label=True, self_pair=False)
NT_XENT_TAGS = Plan(
    (
        Term(Reduce.LSE, Mask(self_pair=False, target=False, id=False, above=False)),
        Term(Reduce.SUM, Mask(target=True)),
    ),
    symmetric=True,
)
SUP_CON = Plan((Term(Reduce.LSE, NEGATIVES), Term(Reduce.LSE, OTHERS), Term(Reduce.SUM, OTHERS)), symmetric=True)
CLIP_LABELS = Plan(
    tuple(
        Term(reduce, mask, axis)
        for axis in Axis
        for reduce, mask in ((Reduce.LSE, NEGATIVES), (Reduce.LSE, POSITIVES), (Reduce.SUM, POSITIVES))
    )
)
INFO_NCE_TAGS = Plan((Term(Reduce.LSE, Mask(target=False, id=False, above=False)), Term(Reduce.SUM, Mask(target=True))))


def tags(plan: Plan) -> dict[str, tuple[bool, bool, bool]]:
    """Which tags the plan's kernels are given."""
    rows = plan.tags_tested(Axis.ROW)
    return {"row_tags": rows, "column_tags": rows if plan.symmetric else plan.tags_tested(Axis.COLUMN)}


WEIGHTS = {"MIRROR": False, "GROUP_M": 8}
MIRRORED = WEIGHTS | {"MIRROR": True}
COMBINE = {"OWN_IS_ROW": True, "LABEL_WIDTH": 0}
OF_SUP_CON = {"own_tags": (True, True, False), "other_tags": (True, True, False)}
PANEL = {"TERMS": constants(INFO_NCE).row_terms, "USES_SELF": True, "USES_TARGET": True, "GROUP_M": 8, "LABEL_WIDTH": 0}
SIGLIP = {"GROUP_M": 8} | {f"{name}_ptr": None for name in ("multiplier", "offsets", "factors", "row0", "column_sums")}
BINARY_NCE = {"GROUP_M": 8, "multiplier_ptr": None, "row_sums_ptr": None}
LABELS_AND_IDS = {"row_tags": (True, True, False), "column_tags": (True, True, False)}
GUIDE = {f"guide_{name}_ptr": None for name in ("a", "b", "scale")} | {"EVEN_GUIDE": True, "GUIDE_PRECISION": "ieee"}
NO_SUMS = {f"{name}_ptr": None for name in ("multiplier", "row_sums", "column_sums", "panel")}
PARAMETERS = {
    "contrastive": (1, 1, 2),
    "negatives": (1, 1, 1),
    "lifted": (2, 2, 1),
    "soft_targets": (0, 0, 0),
    "squares": (0, 0, 0),
}
"""How many rows and columns have, and how many numbers there are; of energies and their nearest negatives (2, 1, 2)."""


def of_panel_function(name: str) -> Iterator[dict[str, Any]]:
    """Its sweeps, with all that they are ever asked for: labels and ids, parameters, every sum."""
    function = FUNCTIONS[name]
    rows, columns, numbers = PARAMETERS.get(name, (1, 1, 0) if name in ("hardest", "similarities") else (2, 1, 2))
    given = {"row_vectors": rows, "column_vectors": columns, "numbers": numbers, "GROUP_M": 8} | LABELS_AND_IDS
    if name != "soft_targets":
        given |= GUIDE
    if function.statistics is not None:
        yield given | {"FUNCTION": function.statistics, "found_vectors": 0, "incoming_vectors": None} | NO_SUMS
    if function.pairs is not None:
        found = function.vectors if function.statistics is not None else 0
        vectors = {"found_vectors": found, "incoming_vectors": len(function.incoming), "multiplier_ptr": None}
        yield given | {"FUNCTION": function.pairs} | vectors


OWNED = {"TERMS": constants(NT_XENT).row_terms, "USES_SELF": True, "USES_TARGET": True}
ONE_TERM = {"TERMS": constants(INFO_NCE).row_terms[:1], "LABEL_WIDTH": 0}
CASES: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("sweep_symmetric", sweep_kernel, constants(Plan(NT_XENT.terms[:2], symmetric=True)).as_arguments()),
    ("sweep_symmetric_several", sweep_kernel, constants(NT_XENT).as_arguments()),
    ("sweep", sweep_kernel, constants(CLIP).as_arguments()),
    ("redo", combine_kernel, COMBINE | {"TERMS": constants(NT_XENT).row_terms}),
    ("weights_symmetric", weights_kernel, constants(NT_XENT).as_arguments() | MIRRORED),
    ("weights", weights_kernel, constants(CLIP).as_arguments() | WEIGHTS),
    ("weights", exponentials_kernel, PANEL),
    ("redo", repair_kernel, ONE_TERM),
    ("sigmoid", sigmoid_kernel, SIGLIP),
    ("sigmoid", sigmoid_kernel, BINARY_NCE),
    ("registers_symmetric", registers_kernel, OWNED),
)
"""(entry of the tuning table, kernel, constants): the most demanding plan for each kernel."""
TAGGED: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("sweep_symmetric_tags", sweep_kernel, constants(SUP_CON).as_arguments() | tags(SUP_CON)),
    ("sweep_symmetric_tags", sweep_kernel, constants(NT_XENT_TAGS).as_arguments() | tags(NT_XENT_TAGS)),
    ("sweep_tags", sweep_kernel, constants(CLIP_LABELS).as_arguments() | tags(CLIP_LABELS)),
    ("redo", combine_kernel, COMBINE | {"TERMS": constants(SUP_CON).row_terms} | OF_SUP_CON),
    ("weights_symmetric_tags", weights_kernel, constants(SUP_CON).as_arguments() | tags(SUP_CON) | MIRRORED),
    ("weights_symmetric_tags", weights_kernel, constants(NT_XENT_TAGS).as_arguments() | tags(NT_XENT_TAGS) | MIRRORED),
    ("weights_tags", weights_kernel, constants(CLIP_LABELS).as_arguments() | tags(CLIP_LABELS) | WEIGHTS),
    ("weights_tags", exponentials_kernel, PANEL | {"TERMS": constants(INFO_NCE_TAGS).row_terms} | tags(INFO_NCE_TAGS)),
    ("weights_tags", sigmoid_kernel, SIGLIP | LABELS_AND_IDS),
    ("weights_tags", sigmoid_kernel, BINARY_NCE | LABELS_AND_IDS),
    *(("weights_tags", panel_function_kernel, case) for name in FUNCTIONS for case in of_panel_function(name)),
)
"""The same for masks that test tags."""

PRECISIONS = {"half": ("bf16", "ieee"), "tf32": ("fp32", "tf32"), "float32": ("fp32", "tf32x3")}
"""By precision class: the operands' type and tl.dot's input_precision."""
DESCRIBED = {"a_tiles": "BLOCK_M", "b_tiles": "BLOCK_N"}
"""What is a descriptor where a configuration says TMA, and the rows of its tiles."""


class Usage(NamedTuple):
    registers: int
    stack: int
    shared_memory: int


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(kernel: Any, dtype: str, constants: dict[str, Any], capability: int, warps: int, stages: int) -> Any:
    """As a launch would with aligned operands and D divisible by 16."""
    of_operands = {
        "a_ptr",
        "b_ptr",
        "guide_a_ptr",
        "guide_b_ptr",
        "own_ptr",
        "other_ptr",
        "panel_ptr",
        "x_ptr",
        "unit_ptr",
    }
    of_indices = {"target_ptr", "row0_ptr"}
    divisible = {
        "d",
        "stride_a",
        "stride_b",
        "guide_d",
        "guide_stride_a",
        "guide_stride_b",
        "stride_own",
        "stride_other",
        "panel_stride",
    }
    signature, attributes = {}, {}
    constants = dict(constants)
    for i, name in enumerate(kernel.arg_names):
        if name.endswith("_tags"):
            tested = constants.pop(name, (False, False, False))
            types = ("*i64", "*i64", "*fp32")
            signature[name] = tuple(t if there else "constexpr" for t, there in zip(types, tested, strict=True))
            constants |= {(i, k): None for k, there in enumerate(tested) if not there}
            attributes |= {(i, k): [["tt.divisibility", 16]] for k, there in enumerate(tested) if there}
            continue
        if name == "numbers" or (name.endswith("_vectors") and constants.get(name, 0) is not None):
            signature[name] = ("fp32" if name == "numbers" else "*fp32",) * constants.pop(name, 0)
            continue
        if name in constants:
            signature[name] = "constexpr"
        elif name in DESCRIBED:
            signature[name] = f"tensordesc<{dtype}[{constants[DESCRIBED[name]]}, {constants['BLOCK_D']}]>"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (dtype if name in of_operands else "i64" if name in of_indices else "fp32")
        else:
            signature[name] = "fp32" if name in ("threshold", "share", "bound", "headroom") else "i32"
        if name.endswith("_ptr") or name in divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_at(
    kernel: Any, dtype: str, precision: str, constants: dict[str, Any], capability: int, config: tuning.Config
) -> Any:
    tile = {"PIECE": min(config.piece, config.block_m, config.block_n)} if "PIECE" in kernel.arg_names else {}
    tile |= {
        "EVEN_D": False,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
    }
    if "PERSISTENT" in kernel.arg_names:
        tile["PERSISTENT"] = config.persistent
    if not config.tma:
        tile |= dict.fromkeys(DESCRIBED.keys() & set(kernel.arg_names))
    if kernel is panel_function_kernel and "guide_a_ptr" not in constants:
        tile |= {"EVEN_GUIDE": False, "GUIDE_PRECISION": precision}
    return compile_kernel(kernel, dtype, constants | tile, capability, config.num_warps, config.num_stages)


def usage(compiled: Any, folder: Path) -> Usage:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([cuobjdump, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return Usage(int(registers), int(stack), compiled.metadata.shared)


def table(capability: int) -> tuning.Table:
    return tuning.table(divmod(capability, 10))


def is_like_another(capability: int, kernel: Any, kernel_constants: dict[str, Any], precision: str) -> bool:
    """sm_120 takes the table of sm_86; tf32 needs no more than half with its tiles; with tags one precision is enough
    where both need as much, or where the other is far from spilling."""
    is_tagged = any(name.endswith("_tags") for name in kernel_constants)
    if precision == "tf32":
        return is_tagged or capability >= 100 or kernel not in (sweep_kernel, weights_kernel)
    return is_tagged and (capability, precision) in {(86, "half"), (100, "float32"), (120, "half"), (120, "float32")}


def default_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, Any], tuning.Config]]:
    for name, kernel, kernel_constants in CASES + TAGGED:
        for precision in PRECISIONS:
            if is_like_another(capability, kernel, kernel_constants, precision):
                continue
            for config in dict.fromkeys(config for _, config in table(capability).entries[name, precision]):
                yield precision, kernel, kernel_constants, config


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, *(pytest.param(x, marks=pytest.mark.matrix) for x in (80, 86, 100, 120))])
def test_default_configurations_fit(capability: int, tmp_path: Path, record_property: Any) -> None:
    """All are compiled before any is judged, so that a failure shows every one that doesn't fit.

    sm_89 has sm_86's instructions for these kernels, and its table.
    """
    assert table(capability).shared_memory <= SHARED_MEMORY[capability]
    too_much = []
    for precision, kernel, kernel_constants, config in default_cases(capability):
        dtype, dot = PRECISIONS[precision]
        compiled = compile_at(kernel, dtype, dot, kernel_constants, capability, config)
        multiplies = kernel_constants.get("FUNCTION") is not pair_functions.count
        if capability == 90 and precision == "half" and multiplies:
            assert "HGMMA" in compiled.asm["sass"]
        used = usage(compiled, tmp_path)
        record_property(f"{kernel.__name__} {precision}", used._asdict())
        if used.stack or used.shared_memory > table(capability).shared_memory:
            too_much.append((kernel.__name__, precision, config, used))
    assert not too_much


def described_cases(capability: int) -> Iterator[tuple[str, Any, dict[str, Any], tuning.Config]]:
    """The kernels that read by TMA, at the table's tiles, and persistent where they can be.

    On sm_90 a sweep along both axes leaves out its maxima: 128 x 128 with four warps have no registers for them.
    """
    for name, kernel, kernel_constants in CASES:
        if not DESCRIBED.keys() <= set(kernel.arg_names):
            continue
        if name == "sweep" and capability == 90:
            kernel_constants = constants(Plan(CLIP.terms[:3])).as_arguments()
        for precision in ("half", "float32"):
            _, config = table(capability).entries[name, precision][0]
            yield precision, kernel, kernel_constants, replace(config, tma=True, persistent=precision == "half")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, pytest.param(100, marks=pytest.mark.matrix)])
def test_read_by_tma(capability: int, tmp_path: Path, record_property: Any) -> None:
    """Products are still by warp groups on sm_90, and nothing spills."""
    too_much = []
    for precision, kernel, kernel_constants, config in described_cases(capability):
        dtype, dot = PRECISIONS[precision]
        compiled = compile_at(kernel, dtype, dot, kernel_constants, capability, config)
        sass = compiled.asm["sass"]
        assert "UTMALDG" in sass
        assert ("HGMMA" if capability == 90 else "UTCHMMA" if precision == "half" else "UTC") in sass
        used = usage(compiled, tmp_path)
        record_property(f"{kernel.__name__} {precision}", used._asdict())
        if used.stack or used.shared_memory > table(capability).shared_memory:
            too_much.append((kernel.__name__, precision, config, used))
    assert not too_much


class Hopper:
    """What a launch asks Triton's driver for before it runs anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_descriptors_as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host gives the sweep compiles to one that reads by TMA, with a map for each operand."""
    compiled = []
    run = type(sweep_kernel).run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(kernel, *arguments, grid=grid, warmup=True, **options))

    monkeypatch.setattr(type(sweep_kernel), "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    features = torch.randn(300, 80).bfloat16()
    x = launch.inputs(Operands(features, features.flip(0), torch.tensor(10.0), norm_bound=20.0))
    config = tuning.Config(64, 128, 64, 4, 3, tma=True, persistent=True)
    with tuning.override(config):
        forward.statistics(CLIP, x)
    maps = compiled[0].metadata.tensordesc_meta
    assert [each["block_size"] for each in maps] == [[64, 64], [128, 64]]
    assert "cp.async.bulk.tensor" in compiled[0].asm["ptx"]


@pytest.mark.parametrize("case", [0, 1, 2, 4, 5, 8], ids=lambda i: CASES[i][0])
def test_float16_on_hopper(case: int, tmp_path: Path) -> None:
    """As bfloat16 does; that the other architectures treat the two alike is taken for granted."""
    name, kernel, kernel_constants = CASES[case]
    _, config = table(90).entries[name, "half"][0]
    compiled = compile_at(kernel, "fp16", "ieee", kernel_constants, 90, config)
    assert "HGMMA" in compiled.asm["sass"]
    assert usage(compiled, tmp_path).stack == 0


@pytest.mark.parametrize("plan", [NT_XENT, CLIP])
def test_loss_fits(plan: Plan, tmp_path: Path) -> None:
    terms = {"ROW_TERMS": constants(plan).row_terms, "COLUMN_TERMS": constants(plan).column_terms}
    compiled = compile_kernel(loss_kernel, "fp32", terms | {"POSITIVE": 1, "BLOCK": 128}, 80, 4, 3)
    assert usage(compiled, tmp_path).stack == 0


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_head_fits(capability: int, tmp_path: Path) -> None:
    compiled = compile_kernel(head_kernel, "bf16", {"SELF": 2, "TARGET": 1, "BLOCK": 128}, capability, 4, 3)
    assert usage(compiled, tmp_path).stack == 0
    addresses = re.findall(r"arith\.muli .* : tensor<128x(i\d+)>", compiled.asm["ttir"])
    assert addresses == ["i64"]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("kernel", [unit_kernel, through_unit_kernel], ids=lambda kernel: kernel.__name__)
def test_unit_length_fits(kernel: Any, capability: int, tmp_path: Path) -> None:
    compiled = compile_kernel(kernel, "bf16", {"BLOCK_ROWS": 8, "BLOCK_D": 128}, capability, 4, 3)
    assert usage(compiled, tmp_path).stack == 0
    assert set(re.findall(r"arith\.muli .* : tensor<8x1x(i\d+)>", compiled.asm["ttir"])) == {"i64"}


@pytest.mark.parametrize(
    "case", [*(CASES[i] for i in (2, 3, 5, 6, 7, 8)), TAGGED[-1]], ids=lambda case: case[1].__name__
)
def test_row_offsets_are_64_bit(case: tuple[str, Any, dict[str, Any]]) -> None:
    """N * D may exceed 2**31: both operands' indices are widened before they are multiplied by a stride.

    What remains in 32 bits is the offset within one tile of a panel, as many rows of it as a tile has.
    """
    name, kernel, kernel_constants = case
    _, config = table(90).entries[name, "half"][0]
    ir = compile_at(kernel, "bf16", "ieee", kernel_constants, 90, config).asm["ttir"]
    products = re.findall(r"arith\.muli .* : tensor<(\d+x\d+)x(i\d+)>", ir)
    rows, columns = f"{config.block_m}x1", f"1x{config.block_n}"
    assert {(rows, "i64"), (columns, "i64")} <= set(products)
    narrow = {shape for shape, bits in products if bits == "i32"}
    of_panels = {weights_kernel: {rows, f"{config.piece}x1"}}
    of_panels |= {kernel: {rows} for kernel in (exponentials_kernel, sigmoid_kernel, panel_function_kernel)}
    assert narrow == of_panels.get(kernel, set())


def test_row_offsets_of_sums_in_registers_are_64_bit() -> None:
    config = tuning.registers("half", (9, 0), 128)
    ir = compile_at(registers_kernel, "bf16", "ieee", OWNED, 90, config).asm["ttir"]
    assert set(re.findall(r"arith\.muli .* : tensor<\d+x1x(i\d+)>", ir)) == {"i64"}


def test_tables_are_complete() -> None:
    """Every capability finds exactly one table; a triangle of tiles is made of squares."""
    tables = tuning.tables()
    claimed = [capability for t in tables for capability in t.capabilities]
    assert len(claimed) == len(set(claimed))
    assert sum(not t.capabilities for t in tables) == 1
    for t in tables:
        assert all(entries for (kernel, _), entries in t.entries.items() if kernel != "registers_symmetric")
        for (kernel, _), entries in t.entries.items():
            for shape, config in entries:
                if kernel == "registers_symmetric":
                    assert config.block_d == shape["d"]
                else:
                    assert config.block_m == config.block_n or "symmetric" not in kernel


def test_nearest_shape() -> None:
    entries = (({"n": 1024, "d": 64}, "small"), ({"n": 1024, "d": 1024}, "deep"), ({"n": 65536, "d": 64}, "tall"))
    distance = tuning._distance
    nearest = lambda **shape: min(entries, key=lambda e: distance(e[0], shape))[1]  # noqa: E731
    assert nearest(n=2000, m=1, d=80) == "small"
    assert nearest(n=500, m=1, d=700) == "deep"
    assert nearest(n=10**6, m=1, d=128) == "tall"
