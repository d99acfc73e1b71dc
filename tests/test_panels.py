"""Panel functions: every kind of operand, over several panels, against autograd of the same formula on all of S."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcl import panels
from fastcl.panels import Outputs, Panel, Slopes, panel_function
from fastcl.panelwise import panel_rows, panel_sum
from fastcl.terms import Tags

N, M, D, E = 13, 17, 5, 3


def formula(s: Tensor, u: Tensor, v: Tensor, guide: Tensor, skipped: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Something that looks at all that a panel holds."""
    kept = (~skipped).to(s.dtype)
    first = (kept * guide * (s - u[:, None] * v).square()).sum(dim=1)
    return first, (kept * s * u[:, None]).sum(dim=1) * power


@panel_function(outputs=2)
def everything(panel: Panel):
    (u,), (v,) = panel.row_params, panel.column_params
    (power,) = panel.numbers
    skipped = panel.self_pair | panel.same_label
    kept = (~skipped).to(panel.s.dtype)
    residual = panel.s - u[:, None] * v

    def pull_back(incoming: Outputs) -> Slopes:
        first, second = (g[:, None] for g in incoming)
        of_residual = 2 * first * kept * panel.guide * residual
        of_s = of_residual + second * power * kept * u[:, None]
        of_u = (second * power * kept * panel.s - of_residual * v).sum(dim=1)
        return Slopes(of_s, of_u[None], -(of_residual * u[:, None]).sum(dim=0)[None])

    return formula(panel.s, u, v, panel.guide, skipped, power), pull_back


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "_PANEL_ON_CPU", 4 * M)
    monkeypatch.setattr(panels, "_FEWEST_ROWS", 1)


def draw(symmetric: bool) -> tuple[dict[str, Tensor], dict[str, object]]:
    m = N if symmetric else M
    inputs = {
        "a": torch.randn(N, D),
        "b": None if symmetric else torch.randn(m, D),
        "scale": torch.tensor(1.3),
        "bias": torch.tensor(-0.4),
        "row_params": torch.randn(1, N),
        "column_params": torch.randn(1, m),
    }
    inputs = {name: None if x is None else x.double().requires_grad_() for name, x in inputs.items()}
    guide = (torch.randn(N, E).double(), torch.randn(m, E).double(), torch.tensor(0.7).double())
    tags = Tags(labels=torch.arange(N) % 4)
    constants = {"tags": tags, "numbers": [1.5], "guide": guide}
    if not symmetric:
        constants["key_tags"] = Tags(labels=torch.arange(m) % 5)
    return inputs, constants


def dense(inputs: dict[str, Tensor], constants: dict[str, object]) -> tuple[Tensor, Tensor]:
    a, b = inputs["a"], inputs["a"] if inputs["b"] is None else inputs["b"]
    s = inputs["scale"] * a @ b.T + inputs["bias"]
    x, y, factor = constants["guide"]
    labels, key_labels = constants["tags"].labels, constants.get("key_tags", constants["tags"]).labels
    skipped = (torch.arange(N)[:, None] == torch.arange(len(b))) | (labels[:, None] == key_labels)
    return formula(s, inputs["row_params"][0], inputs["column_params"][0], factor * x @ y.T, skipped, 1.5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows(symmetric: bool) -> None:
    inputs, constants = draw(symmetric)
    leaves = [x for x in inputs.values() if x is not None]
    got, want = panel_rows(everything, **inputs, **constants), dense(inputs, constants)
    torch.testing.assert_close(got, want)
    weights = [torch.randn(N).double() for _ in range(2)]
    grads = [
        torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, rows, strict=True)), leaves)
        for rows in (got, want)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums(symmetric: bool, weighted: bool) -> None:
    inputs, constants = draw(symmetric)
    leaves = [x for x in inputs.values() if x is not None]
    weights = torch.rand(N).double() if weighted else None
    first, second = panel_sum(everything, weights=weights, **inputs, **constants)
    rows, others = dense(inputs, constants)
    expected = (rows * weights).sum() if weighted else rows.sum()
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, others.sum().detach())
    assert not second.requires_grad
    torch.testing.assert_close(torch.autograd.grad(3 * first, leaves), torch.autograd.grad(3 * expected, leaves))


@pytest.mark.parametrize("chosen", ["a", "b", "scale", "bias", "row_params", "column_params"])
def test_any_one_gradient(chosen: str) -> None:
    inputs, constants = draw(symmetric=False)
    inputs = {name: x.detach().requires_grad_(name == chosen) for name, x in inputs.items()}
    expected = torch.autograd.grad(dense(inputs, constants)[0].sum(), inputs[chosen])
    sums = panel_sum(everything, **inputs, **constants)[0]
    torch.testing.assert_close(torch.autograd.grad(sums, inputs[chosen]), expected)
    rows = panel_rows(everything, **inputs, **constants)[0].sum()
    torch.testing.assert_close(torch.autograd.grad(rows, inputs[chosen]), expected)


def test_without_gradients() -> None:
    inputs, constants = draw(symmetric=False)
    with torch.no_grad():
        got = panel_sum(everything, **inputs, **constants)
        torch.testing.assert_close(got, tuple(x.sum() for x in dense(inputs, constants)))
        assert not got[0].requires_grad


def test_opcheck() -> None:
    inputs, constants = draw(symmetric=False)
    tags = [*constants["tags"], *constants["key_tags"]]
    guide, path = list(constants["guide"]), "tests.test_panels:everything"
    arguments = (*inputs.values(), None, tags, constants["numbers"], guide, path, None)
    torch.library.opcheck(torch.ops.fastcl.panel_rows, arguments)
    # The gradients that are made with the sum are not for a caller to differentiate, as the whole check would do.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fastcl.panel_sum, (*arguments, None, "111111"), test_utils=checks)


def test_second_derivatives_are_refused() -> None:
    inputs, constants = draw(symmetric=False)
    for value in (
        panel_sum(everything, **inputs, **constants)[0],
        panel_rows(everything, **inputs, **constants)[0].sum(),
    ):
        (first,) = torch.autograd.grad(value, inputs["a"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(first.sum(), inputs["b"])
