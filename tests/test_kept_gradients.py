"""In which dtype gradients wait for backward: bfloat16 on a device, and what that must not cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl.backends import panels
from fastcl.cross_entropy import Options
from fastcl.terms import Mask, Needs, Plan, Reduce, Term, waiting_dtype

N, M, D = 300, 260, 8
CLIP = Plan.decode("general lse:row: lse:column:")


class Allocated(TorchDispatchMode):
    """Elements of the matrices in float32 that an operator returned, by their number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" in function.__name__ and result.dtype is torch.float32:
            self.rows.append(result.shape[0])
        return result


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("elements", [64 * 64, 64 * 128, 2**20])
def test_complete_rows_are_never_all_in_float32(elements: int, multiplied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, a, b = (torch.randn(*shape, generator=generator) for shape in ((N, M), (N, D), (M, D)))

    def write(panel: panels.Panel, out: Tensor) -> None:
        out.fill_(float("nan"))
        out[: panel.shape[0], : panel.shape[1]] = weights[panel.rows, panel.columns]

    kept = torch.full((N, D), float("nan"))

    def keep_rows(rows: slice, product: Tensor) -> None:
        assert kept[rows].isnan().all()
        kept[rows] = product
        product.fill_(float("nan"))

    with Allocated() as allocated:
        multiplier = torch.tensor(4.0) if multiplied else None
        found = panels.products(
            CLIP, a, b, True, True, (32, 32), 4 * elements, write, multiplier=multiplier, keep_rows=keep_rows
        )
    factor = 0.25 if multiplied else 1.0
    assert found.a is None
    torch.testing.assert_close(kept, factor * weights @ b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.b, factor * weights.T @ a, rtol=1e-4, atol=1e-4)
    if elements < 2**20:
        assert N not in allocated.rows


@pytest.mark.parametrize(
    ("dtype", "device", "waits_in"),
    [
        (torch.bfloat16, "cuda", torch.bfloat16),
        (torch.bfloat16, "cpu", torch.float32),
        (torch.float16, "cuda", torch.float32),
        (torch.float32, "cuda", torch.float32),
        (torch.float64, "cuda", torch.float64),
    ],
)
def test_waiting_dtype(dtype: torch.dtype, device: str, waits_in: torch.dtype) -> None:
    assert waiting_dtype(dtype, torch.device(device)) is waits_in


@pytest.mark.parametrize("factor", [1.0, 1 / 3, 2.0**16])
def test_the_factor_of_backward_is_not_rounded(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry may be rounded once more, the whole gradient must not become longer or shorter: by 2e-3 at 1/3."""
    monkeypatch.setattr("fastcl.cross_entropy.waiting_dtype", lambda dtype, device: torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, 64, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    (fastcl.clip_loss(a, b, 0.05, backend="tiled") * factor).backward()
    (fastcl.clip_loss(*wide, 0.05, backend="tiled") * factor).backward()
    for x, exact in zip((a, b), wide, strict=True):
        assert x.grad.dtype is torch.bfloat16
        assert ((x.grad.double() - exact.grad).norm() / exact.grad.norm()).item() < 5e-3
        along = (x.grad.double() * exact.grad).sum() / exact.grad.square().sum()
        assert abs(along.item() - 1) < 4e-4


def test_the_fake_knows_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcl.cross_entropy.waiting_dtype", lambda dtype, device: torch.bfloat16)
    a, b = torch.randn(2, 12, D).bfloat16()
    plan = Plan((Term(Reduce.LSE, Mask(self_pair=False)), Term(Reduce.SUM, Mask(self_pair=True))))
    needs = Needs(a=True, b=True, scale=True)
    options = Options(plan, mean=True, normalize=True, norm_bound=None, needs=needs, backend="tiled")
    arguments = (a, b, torch.tensor(2.0), None, None, None, options.encode(), [None] * 6)
    torch.library.opcheck(torch.ops.fastcl.cross_entropy, arguments, test_utils=("test_schema", "test_faketensor"))
    gradients = torch.ops.fastcl.cross_entropy(*arguments)[3:6]
    assert [x.dtype for x in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]
