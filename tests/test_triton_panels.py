"""The Triton backend's panels of whole rows, interpreted: a softmax loss along rows, its gradients, and its cost.

Started by ``test_triton_interpreter.py``. The judges are the definition in float64 of ``test_one_sweep.py``, and for
the masks that it doesn't know the dense backend in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastcl import tuning
from fastcl.backends import dense, triton
from fastcl.terms import CrossEntropy, LossAndGradients, Mask, Needs, Operands, Plan, Reduce, Tags, Term
from tests.cases import relative_error
from tests.test_one_sweep import ALONG_ROWS, BOTH_WAYS, NO_POSITIVE, NOT_TARGET, SYMMETRIC, check, found_gradients, make
from tests.test_triton_interpreter import INTERPRETED, SMALL_TILES, interpreted

if INTERPRETED:
    from triton.runtime import interpreter

    from fastcl.backends.triton import panels
    from fastcl.backends.triton.kernels import exponentials

PLANS = {"along-rows": ALONG_ROWS, "not-target": NOT_TARGET, "no-positive": NO_POSITIVE}
EACH_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
EVERYTHING = Needs(True, True, True)


@pytest.fixture(autouse=True)
def heights(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The panels' height in each call: 32 rows of up to 112 columns fit. NaN is wherever nothing was written."""
    taken: list[int] = []
    original = panels.cross_entropy

    def record(*args):
        taken.append(args[-1])
        return original(*args)

    monkeypatch.setattr(panels, "cross_entropy", record)
    monkeypatch.setattr(panels, "_LOWEST_PANEL", 32)
    with tuning.override(SMALL_TILES, workspace_bytes=4 * 32 * 112):
        yield taken


def exact(operands: Operands, head: CrossEntropy, needs: Needs, plan: Plan) -> LossAndGradients:
    """The dense backend in float64."""

    def double(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    wide = replace(operands, a=operands.a.double(), b=operands.b.double(), scale=operands.scale.double())
    return dense.cross_entropy(
        plan, wide, replace(head, positive=double(head.positive), weights=double(head.weights)), needs
    )


def check_gradients(got: LossAndGradients, want: LossAndGradients, tolerance: float = 2e-5) -> None:
    assert relative_error(got.loss, want.loss) <= tolerance
    got_gradients, want_gradients = found_gradients(got), found_gradients(want)
    assert got_gradients.keys() == want_gradients.keys()
    for name, x in got_gradients.items():
        assert x.isfinite().all()
        assert relative_error(x, want_gradients[name]) <= tolerance * (20 if name == "scale" else 1), name


@interpreted
@EACH_PLAN
@pytest.mark.parametrize(("n", "m", "depth"), [(1, 2, 1), (5, 3, 7), (83, 70, 20), (45, 100, 33), (32, 48, 16)])
def test_agrees_with_the_definition(plan: Plan, n: int, m: int, depth: int, heights: list[int]) -> None:
    check(plan, *make(plan, n, m, depth), "triton")
    assert heights == [min(32, 16 * math.ceil(n / 16))]


@interpreted
@EACH_PLAN
def test_rows_that_the_fixed_shift_loses(plan: Plan, heights: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At scale 100, a row whose candidates are all opposite to it lies 200 below the bound that sets the shift."""
    monkeypatch.setattr(panels, "_PROGRAMS_OF_A_REPAIR", 3)
    operands, head = make(plan, 83, 70, 16, scale=100.0)
    operands.a[::3] = operands.a[0] + 0.1 * operands.a[::3]
    operands.b[:] = -operands.a[0] + 0.1 * operands.b
    check(plan, operands, head, "triton", tolerance=1e-4)
    assert heights


@interpreted
@EACH_PLAN
def test_rows_of_large_norm(plan: Plan) -> None:
    operands, head = make(plan, 83, 70, 16, scale=1.0, normalize=False)
    operands.a.mul_(torch.linspace(0.01, 6.0, 83)[:, None])
    check(plan, operands, head, "triton", tolerance=1e-4)


@interpreted
@pytest.mark.parametrize("scale", [1.0, 50.0, 100.0])
@pytest.mark.parametrize("positive", ["near", "opposite"])
def test_gradients_far_from_one(scale: float, positive: str) -> None:
    """Trained to the end, g is as small as exp(-scale); where all goes wrong the loss is as large as 2 * scale."""
    operands, head = make(NOT_TARGET, 70, 80, 40, scale=scale)
    sign = 1.0 if positive == "near" else -1.0
    operands.b[operands.target] = sign * operands.a
    needs = Needs(True, True, False)
    got = triton.cross_entropy(NOT_TARGET, operands, head, needs)
    check_gradients(got, exact(operands, head, needs, NOT_TARGET), tolerance=1e-4)


POSITIVES = [Mask(True), Mask(True, False), Mask(True, True), Mask(None, True), Mask(False, True)]
NEGATIVES = [Mask(), Mask(False), Mask(None, False), Mask(False, False)]


@interpreted
@pytest.mark.parametrize(("row0", "col0"), [(0, 0), (2**40, 2**40 + 3)])
@pytest.mark.parametrize("positive", POSITIVES, ids=str)
@pytest.mark.parametrize("negatives", NEGATIVES, ids=str)
def test_masks(positive: Mask, negatives: Mask, row0: int, col0: int) -> None:
    """The positive may be a negative too, some rows' self pairs are their targets, and some targets lie outside."""
    plan = Plan((Term(Reduce.LSE, negatives), Term(Reduce.SUM, positive)))
    operands, head = make(plan, 45, 40, 12, normalize=False, scale=2.0)
    target = operands.target + col0 - 5
    target[::4] = torch.arange(45)[::4] + row0
    operands = replace(operands, target=target, row0=row0, col0=col0)
    got = triton.cross_entropy(plan, operands, head, EVERYTHING)
    check_gradients(got, exact(operands, head, EVERYTHING, plan))


@interpreted
@pytest.mark.parametrize("scale", [2.0, 100.0])
@pytest.mark.parametrize(
    "negatives", [Mask(target=False, id=False, above=False), Mask(label=False), Mask(label=True, target=False)], ids=str
)
def test_tags(negatives: Mask, scale: float, heights: list[int]) -> None:
    """At scale 100 some rows are repaired, under the same masks, and some admit nothing."""
    terms = Term(Reduce.LSE, negatives), Term(Reduce.SUM, Mask(target=True)), Term(Reduce.MAX, Mask(label=False))
    plan = Plan(terms, label_width=1)
    operands, head = make(plan, 83, 70, 12, scale=scale)
    if scale > 2.0:
        operands.a[::3] = operands.a[0] + 0.1 * operands.a[::3]
        operands.b[:] = -operands.a[0] + 0.1 * operands.b
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (operands.a, operands.b))
    row_tags = Tags(torch.arange(83) // 9, torch.arange(83) % 5, scale * (a * b.mean(dim=0)).sum(dim=1))
    column_tags = Tags(torch.arange(70) // 9, torch.arange(70) % 4)
    operands = replace(operands, a=a, b=b, norm_bound=1.01, row_tags=row_tags, column_tags=column_tags)
    head = replace(head, normalize=False)
    got = triton.cross_entropy(plan, operands, head, EVERYTHING)
    assert heights == [32]
    check_gradients(got, exact(operands, head, EVERYTHING, plan), tolerance=1e-4)


@interpreted
@EACH_PLAN
def test_any_combination_of_gradients(plan: Plan) -> None:
    operands, head = make(plan, 40, 30, 9)
    can = EVERYTHING._replace(positive=head.positive is not None)
    full = found_gradients(triton.cross_entropy(plan, operands, head, can))
    for flags in itertools.product((False, True), repeat=4):
        needs = Needs(*(want and possible for want, possible in zip(flags, can, strict=True)))
        found = found_gradients(triton.cross_entropy(plan, operands, head, needs))
        assert found.keys() == {name for name, need in needs._asdict().items() if need}
        for name, x in found.items():
            torch.testing.assert_close(x, full[name], rtol=1e-4, atol=1e-6)


@interpreted
def test_without_weights_or_negatives() -> None:
    """A single candidate that is the positive leaves rows without negatives: loss 0, gradient 0."""
    operands, head = make(NOT_TARGET, 40, 1, 6)
    found = triton.cross_entropy(NOT_TARGET, operands, replace(head, weights=None), EVERYTHING)
    assert found.loss == 0
    assert all((x == 0).all() for x in found_gradients(found).values())
    operands, head = make(NOT_TARGET, 40, 30, 6)
    head = replace(head, weights=None, mean=False)
    got = triton.cross_entropy(NOT_TARGET, operands, head, EVERYTHING)
    check_gradients(got, exact(operands, head, EVERYTHING, NOT_TARGET))


@interpreted
@EACH_PLAN
def test_bfloat16(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as the upper half of float32, and multiplies that as integers; here it doesn't."""

    def widened(handle):
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    original = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: original(self, widened(a), widened(b), *others),
    )
    operands, head = make(plan, 83, 70, 16, torch.bfloat16, normalize=False, scale=2.0)
    got = triton.cross_entropy(plan, operands, head, EVERYTHING)
    assert relative_error(got.loss, exact(operands, head, EVERYTHING, plan).loss) <= 1e-5
    check_gradients(got, exact(operands, head, EVERYTHING, plan), tolerance=4e-3)


@interpreted
@EACH_PLAN
def test_same_bits_twice(plan: Plan) -> None:
    operands, head = make(plan, 83, 70, 16, scale=100.0)
    runs = [triton.cross_entropy(plan, operands, head, EVERYTHING) for _ in range(2)]
    first, second = ([run.loss, *run.statistics, *found_gradients(run).values()] for run in runs)
    assert all(map(torch.equal, first, second))


@interpreted
def test_falls_back_where_panels_do_not_serve(heights: list[int]) -> None:
    only_a = Needs(True, False, False)
    operands, head = make(NOT_TARGET, 40, 32, 6)
    sparse = Plan((Term(Reduce.LSE, Mask(target=True)), Term(Reduce.SUM, Mask(target=True))))
    two = Plan((Term(Reduce.LSE), Term(Reduce.LSE, Mask(False)), Term(Reduce.SUM, Mask(target=True))))
    labelled = Plan((Term(Reduce.LSE), Term(Reduce.SUM, Mask(target=True, label=True))))
    labels = torch.arange(40) % 3
    with tuning.override(SMALL_TILES, workspace_bytes=4 * 32 * 32):
        triton.cross_entropy(NOT_TARGET, operands, head, only_a)
        assert heights == [32]
        for plan, x, h in (
            (NOT_TARGET, *make(NOT_TARGET, 40, 33, 6)),
            (NOT_TARGET, *make(NOT_TARGET, 40, 32, 6, torch.float16)),
            (BOTH_WAYS, *make(BOTH_WAYS, 32, 32, 6)),
            (SYMMETRIC, *make(SYMMETRIC, 32, 32, 6)),
            (sparse, operands, head),
            (two, operands, head),
            (Plan((Term(Reduce.LSE), Term(Reduce.SUM))), operands, head),
            (labelled, replace(operands, row_tags=Tags(labels[:40]), column_tags=Tags(labels[:32])), head),
        ):
            assert triton.cross_entropy(plan, x, h, only_a).gradients.a.isfinite().all()
        triton.cross_entropy(NOT_TARGET, operands, head, Needs(False, False, False))
    assert heights == [32]


class Live(TorchDispatchMode):
    """Bytes of the tensors that operators allocated and that are still there, at their most.

    Without the copies that the interpreter makes for a kernel.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0
        self.in_kernel = False
        launch = interpreter.GridExecutor.__call__

        def run(executor, *args, **kwargs):
            self.in_kernel = True
            launch(executor, *args, **kwargs)
            self.in_kernel = False

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view and not self.in_kernel:
            storage = result.untyped_storage()
            self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
            self.sizes[StorageWeakRef(storage)] = storage.nbytes()
            self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@interpreted
@pytest.mark.parametrize("plan", [BOTH_WAYS, ALONG_ROWS], ids=["both-ways", "along-rows"])
def test_memory(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the gradients: copies of unit length, one gradient's sums, and of the other's those of a panel's rows."""
    monkeypatch.setattr("fastcl.backends.triton.waiting_dtype", lambda dtype, device: torch.bfloat16)
    monkeypatch.setattr("fastcl.backends.softmax._CHUNK", 1 << 12)
    n, depth = 64, 512
    operands, head = make(plan, n, n, depth)
    operands.a.div_(20), operands.b.div_(20)
    with tuning.override(SMALL_TILES, workspace_bytes=4 * 32 * n), Live(monkeypatch) as live:
        found = triton.cross_entropy(plan, operands, head, EVERYTHING)
    want = exact(operands, head, EVERYTHING, plan)
    for x, y in zip(found.gradients[:2], want.gradients[:2], strict=True):
        assert x.dtype is torch.bfloat16
        assert relative_error(x, y) < 6e-3
    matrix = n * depth
    unit_copies = 2 * 4 * matrix
    scaled_rows = 2 * 32 * depth * 4 if plan is ALONG_ROWS else 0
    assert live.peak < unit_copies + 2 * matrix + 4 * matrix + 4 * 32 * depth + scaled_rows + matrix


class Products:
    """Stands in for a kernel and adds up the tiles of S that it computes."""

    def __init__(self, kernel, area) -> None:
        self.kernel, self.area, self.total = kernel, area, 0

    def __getitem__(self, grid):
        self.total += math.prod(grid) * self.area
        return self.kernel[grid]


@interpreted
@EACH_PLAN
@pytest.mark.parametrize(
    ("needs", "passes"),
    [((True, True, True), 3), ((True, False, True), 2), ((False, True, True), 2), ((False, False, True), 2)],
)
def test_passes(plan: Plan, needs: tuple[bool, bool, bool], passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of N * M * D multiply-adds: tiles of S, and the library's products."""
    n, m, depth = 64, 96, 8
    operands, head = make(plan, n, m, depth)
    tiles = Products(exponentials.exponentials_kernel, SMALL_TILES.block_m * SMALL_TILES.block_n)
    monkeypatch.setattr(panels, "exponentials_kernel", tiles)
    counter = FlopCounterMode(display=False)
    with counter:
        triton.cross_entropy(plan, operands, head, Needs(*needs))
    assert tiles.total / (n * m) + counter.get_total_flops() / (2 * n * m * depth) == passes


class NothingIsRead(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket is not torch.ops.aten._local_scalar_dense
        assert function.overloadpacket is not torch.ops.aten.nonzero
        return function(*args, **(kwargs or {}))


@interpreted
@EACH_PLAN
def test_the_host_reads_nothing(plan: Plan) -> None:
    operands, head = make(plan, 70, 50, 9)
    with NothingIsRead():
        triton.cross_entropy(plan, operands, head, EVERYTHING)
