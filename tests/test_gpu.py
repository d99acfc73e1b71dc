"""On a GPU: every loss of the table on every backend there, at ragged shapes, and more than 2**31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch

import fastcl
from fastcl import tuning
from fastcl.backends import triton
from fastcl.backends.term_codes import term_codes
from fastcl.engine import BACKENDS
from fastcl.losses.info_nce import reference as info_nce_reference
from fastcl.terms import LossAndGradients, Needs, PanelOperands, Plan, Tags
from tests import panel_kernels
from tests.cases import (
    DTYPES,
    SHAPES,
    available_backends,
    make_features,
    relative_error,
    require,
    value_and_gradients,
)
from tests.losses import LOSSES, Loss
from tests.test_correctness import check_against_float64
from tests.test_one_sweep import ALONG_ROWS, NO_POSITIVE, found_gradients, judge, make

pytestmark = pytest.mark.gpu

ON_GPU = available_backends("cuda") if torch.cuda.is_available() else ["triton"]
OF_EACH_SHAPE = [loss for loss in LOSSES if loss.name in ("nt_xent", "info_nce_target", "clip")]
ENGINES = [name for name in ON_GPU if name in ("triton", "cuda")]


@pytest.fixture(autouse=True)
def _full_precision_float32() -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


def test_triton_is_available() -> None:
    assert fastcl.list_backends()["triton"] is None


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "number"])
@pytest.mark.parametrize("backend", ENGINES)
def test_no_synchronisation(backend: str, learned: bool) -> None:
    features = make_features(LOSSES[0], 256, 64, torch.bfloat16, "cuda")
    tau = torch.tensor(0.1, device="cuda", requires_grad=True) if learned else 0.1

    def step() -> None:
        loss, _ = fastcl.nt_xent(*features, tau, return_stats=True, backend=backend)
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def cases() -> Iterator[object]:
    """An engine in each of its dtypes at three shapes, and a few losses at all; what is plain PyTorch at one.

    A size of 1 is a constant to Triton's compiler, and takes kernels of its own. Functions of panels have a test of
    their kernels, below.
    """
    for loss in LOSSES:
        for backend in (name for name in loss.backends if name in ON_GPU):
            is_wide = backend in ENGINES and not loss.by_panels
            shapes = SHAPES if loss in OF_EACH_SHAPE else ((33, 17), (300, 96), (1030, 40))
            for shape in shapes if is_wide else ((129, 65),):
                for dtype in DTYPES[1:] if is_wide else (torch.float32, torch.bfloat16):
                    name = f"{loss.name}-{shape[0]}x{shape[1]}-{str(dtype)[6:]}-{backend}"
                    yield pytest.param(loss, shape, dtype, backend, id=name)


@pytest.mark.parametrize(("loss", "shape", "dtype", "backend"), list(cases()))
def test_agrees_with_float64(loss: Loss, shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    require(loss, backend, "cuda")
    check_against_float64(loss, *shape, dtype, backend, device="cuda")


@pytest.mark.parametrize("backend", ON_GPU)
def test_settings_of_the_process(backend: str) -> None:
    """A target that is a column of something, torch's newer setting of precision, another default device."""
    query, key = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0)).cuda().unbind()
    target = torch.randint(70, (70, 2), generator=torch.Generator().manual_seed(1)).cuda()[:, 0]
    want = fastcl.info_nce(query, key, 0.2, target=target.contiguous(), backend="dense")

    def check(rtol: float) -> None:
        found = fastcl.info_nce(query, key, 0.2, target=target, backend=backend)
        torch.testing.assert_close(found, want, rtol=rtol, atol=0)

    check(rtol=1e-5)
    term_codes.cache_clear()
    with torch.device("cuda"):
        check(rtol=1e-5)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    check(rtol=1e-2)


ON_ENGINES = [loss for loss in LOSSES if "triton" in loss.backends and not loss.by_panels]


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("loss", ON_ENGINES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_larger_and_colder(loss: Loss, dtype: torch.dtype, backend: str) -> None:
    require(loss, backend, "cuda")
    check_against_float64(loss, 3001, 200, dtype, backend, tau=0.01, device="cuda")


@pytest.mark.skipif("cuda" not in ON_GPU, reason="the backend cuda is not available")
@pytest.mark.parametrize(
    ("path", "depth"),
    [(path, depth) for path in ("portable", "hopper") for depth in (40, 250, 520)]
    + [("registers", depth) for depth in (40, 100, 250)],
)
@pytest.mark.parametrize("loss", OF_EACH_SHAPE, ids=lambda loss: loss.name)
def test_each_path_of_cuda(loss: Loss, path: str, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a Hopper sweep keeps in shared memory and deeper ones, and the portable kernels on the same device.

    Backwards with their sums in registers for each length of rows that there is such a kernel for.
    """
    if path == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} does not have compute capability 9.0")
    monkeypatch.setenv("FASTCL_CUDA_KERNELS", path)
    check_against_float64(loss, 3001, depth, torch.bfloat16, "cuda", tau=0.05, device="cuda")


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("loss", ON_ENGINES, ids=lambda loss: loss.name)
def test_same_bits_every_time(loss: Loss, backend: str) -> None:
    require(loss, backend, "cuda")
    features = make_features(loss, 2050, 96, torch.bfloat16, "cuda")
    runs = [value_and_gradients(lambda: loss.call(features, 0.1, backend=backend), features) for _ in range(3)]
    for value, gradients in runs[1:]:
        assert torch.equal(value, runs[0][0])
        assert all(torch.equal(x, y) for x, y in zip(gradients, runs[0][1], strict=True))


@pytest.mark.parametrize(
    ("dtype", "tma", "persistent"),
    [
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, True),
        (torch.float32, True, True),
    ],
    ids=["tma", "persistent", "both", "both-float32"],
)
@pytest.mark.parametrize("loss", OF_EACH_SHAPE, ids=lambda loss: loss.name)
def test_ways_through_the_tiles(
    loss: Loss, dtype: torch.dtype, tma: bool, persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel at its table's tiles, and panels of W in place of sums in registers; the same bits every time."""
    if tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} has no TMA")
    look_up = tuning.lookup
    monkeypatch.setattr(
        tuning, "lookup", lambda *key, **shape: replace(look_up(*key, **shape), tma=tma, persistent=persistent)
    )
    monkeypatch.setattr(tuning, "registers", lambda *key: None)
    check_against_float64(loss, 3001, 200, dtype, "triton", tau=0.05, device="cuda")
    features = make_features(loss, 3001, 200, dtype, "cuda")
    runs = [value_and_gradients(lambda: loss.call(features, 0.1, backend="triton"), features) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("plan", [ALONG_ROWS, NO_POSITIVE], ids=["along-rows", "no-positive"])
def test_panels_of_whole_rows(plan: Plan, dtype: torch.dtype) -> None:
    """Three of them, in a CUDA graph; at scale 100 some rows need a shift of their own."""
    operands, head = make(plan, 2900, 1500, 96, scale=100.0, normalize=False)
    operands.a[::3] = operands.a[0] + 0.1 * operands.a[::3]
    operands.b[:] = -operands.a[0] + 0.1 * operands.b
    unit = {name: torch.nn.functional.normalize(getattr(operands, name), dim=1).to(dtype) for name in ("a", "b")}
    operands = replace(operands, **unit)
    loss, gradients = judge(plan, operands, head)
    x = replace(operands, **{name: getattr(operands, name).cuda() for name in ("a", "b", "scale", "target")})
    positive = None if head.positive is None else head.positive.cuda()
    on_gpu = replace(head, positive=positive, weights=head.weights.cuda())
    needs = Needs(True, True, True, positive is not None)

    def run() -> LossAndGradients:
        with tuning.override(workspace_bytes=1024 * 1536 * x.a.element_size()):
            return triton.cross_entropy(plan, x, on_gpu, needs)

    eager = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    assert relative_error(captured.loss.cpu(), loss) <= tolerance
    assert torch.equal(captured.loss, eager.loss)
    again = found_gradients(eager)
    for name, gradient in found_gradients(captured).items():
        assert torch.equal(gradient, again[name]), name
        assert relative_error(gradient.cpu(), gradients[name]) <= tolerance * (20 if name == "scale" else 1), name


PANEL_KERNELS = [
    (backend, name, option)
    for backend in ENGINES
    for name, kernel in panel_kernels.KERNELS.items()
    if kernel.function.kernel in BACKENDS[backend].PANEL_KERNELS
    for option in kernel.options
]
ROUNDING_OF_W = {torch.float32: 1.0, torch.float16: 300.0, torch.bfloat16: 1000.0}


def on_gpu(x: PanelOperands) -> PanelOperands:
    def move(part: object) -> object:
        return part.cuda() if isinstance(part, torch.Tensor) else part

    moved = {field.name: move(getattr(x, field.name)) for field in fields(x)}
    tags = {name: Tags(*map(move, moved[name])) for name in ("tags", "key_tags")}
    return PanelOperands(**moved | tags | {"guide": [move(part) for part in x.guide]})


@pytest.mark.parametrize(("backend", "name", "option"), PANEL_KERNELS)
@pytest.mark.parametrize(
    ("dtype", "n", "m", "depth"),
    [(torch.float32, 403, 301, 72), (torch.bfloat16, 403, 301, 72), (torch.float16, 97, 193, 513)],
    ids=["float32", "bfloat16", "float16"],
)
def test_panel_kernels(backend: str, name: str, option: str, dtype: torch.dtype, n: int, m: int, depth: int) -> None:
    x, incoming = panel_kernels.make(name, option, n, m, depth, dtype)
    tolerances = {"tolerance": 1e-5, "of_products": ROUNDING_OF_W[dtype]}
    panel_kernels.check(backend, name, on_gpu(x), incoming.cuda(), **tolerances)


@pytest.mark.parametrize(("backend", "name", "option"), PANEL_KERNELS)
def test_same_bits_of_panel_kernels(backend: str, name: str, option: str) -> None:
    """From several panels, where a backend has them."""
    x, incoming = panel_kernels.make(name, option, 2050, 1030, 96, torch.bfloat16, row0=3)
    needs = panel_kernels.needs_of(name, x)
    x, incoming = on_gpu(x), incoming.cuda() if any(needs[:6]) else None
    with tuning.override(workspace_bytes=2 * 512 * 512):
        first, *others = (panel_kernels.run(backend, name, x, incoming, needs) for _ in range(3))
    for other in others:
        assert all(one is two or torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    n, m, dim = 2**22 + 100, 300, 512
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(n, dim, device="cuda", dtype=torch.bfloat16), dim=1)
    key = torch.nn.functional.normalize(torch.randn(m, dim, device="cuda", dtype=torch.bfloat16), dim=1)
    target = torch.arange(n, device="cuda") % m
    query.requires_grad_()
    rows = fastcl.info_nce(query, key, 0.1, target=target, normalize=False, reduction="none", backend="triton")
    rows.sum().backward()
    for part in (slice(0, 64), slice(n - 64, n)):
        exact = query.detach()[part].double().requires_grad_()
        want = info_nce_reference(exact, key.double(), 0.1, target=target[part], normalize=False)
        torch.testing.assert_close(rows[part].double(), want, rtol=1e-3, atol=1e-3)
        gradient = torch.autograd.grad(want.sum(), exact)[0]
        torch.testing.assert_close(query.grad[part].double(), gradient, rtol=2e-2, atol=2e-2)
