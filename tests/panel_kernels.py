"""The panel functions that backends have kernels for, and what such a kernel is judged by: the function in float64.

That the functions are right is what the losses' textbook formulas say in test_correctness.py. A new kernel is a row of
``KERNELS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastcl import engine, panels
from fastcl.losses import alpha_cl, contrastive, distances, distillation, lifted_structure, sigmoid, spectral, triplet
from fastcl.panels import PanelFunction
from fastcl.terms import NO_GRADIENTS, PanelGradients, PanelNeeds, PanelOperands, Tags


class Draw(NamedTuple):
    """Operands with planted matches, before what is the function's own."""

    generator: torch.Generator
    a: Tensor
    b: Tensor

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Squared, of the rows of a and of b."""
        return tuple(x.float().square().sum(dim=1) for x in (self.a, self.b))


@dataclass(frozen=True)
class Kernel:
    """A panel function, what it is given in each of its options, and which gradients it has beyond those of S."""

    function: PanelFunction
    options: tuple[str, ...]
    given: Callable[[Draw, str], dict[str, object]]
    needs_rows: bool = False
    needs_columns: bool = False
    values_only: bool = False
    """whether all outputs are without gradient"""
    unit: bool = True
    """whether features are scaled to unit length"""
    tolerance: float = 3e-6
    """of norms; larger where rounding decides whether one of millions of hinges is active, as it does everywhere"""


def _labelled(*params: Callable[[Draw], tuple[Tensor, Tensor]], numbers: Sequence[float] = ()):
    """Given to functions of labelled rows: parameters, then squared norms unless the distance is the cosine's."""

    def given(draw: Draw, option: str) -> dict[str, object]:
        pairs = [*(make(draw) for make in params), *([] if option == "cosine" else [draw.norms])]
        rows, columns = (torch.stack(x) for x in zip(*pairs, strict=True)) if pairs else (None, None)
        return {"row_params": rows, "column_params": columns, "numbers": list(numbers)}

    return given


def _energy(draw: Draw, option: str) -> dict[str, object]:
    squares, of_columns = draw.norms
    rows = torch.stack((squares, draw.uniform(len(squares))))
    return {"row_params": rows, "column_params": of_columns[None], "numbers": [0.3, 3.0]}


def _questions(draw: Draw, option: str) -> dict[str, object]:
    if option not in ("offsets", "everything"):
        return {}
    return {"row_params": draw.uniform(1, len(draw.a)) + 0.5, "column_params": draw.uniform(1, len(draw.b)) * 2 - 1}


def _guide(draw: Draw, option: str) -> dict[str, object]:
    a, b = (torch.nn.functional.normalize(draw.uniform(len(x), 7) - 0.5, dim=1).to(x.dtype) for x in draw[1:])
    return {"guide": [a, b, torch.tensor(6.0)]}


def _sums(draw: Draw) -> tuple[Tensor, Tensor]:
    """In the place of log-sum-exps, one of which is that of nothing."""
    rows, columns = draw.uniform(len(draw.a)) - 1, draw.uniform(len(draw.b)) - 1
    rows[-1] = -torch.inf
    return rows, columns


_DISTANCES = ("labels", "cosine", "ids")
KERNELS = {
    "sigmoid": Kernel(sigmoid.sigmoid_rows, ("plain", "offsets", "labels", "ids", "everything"), _questions),
    "contrastive": Kernel(
        contrastive.contrastive_rows, _DISTANCES, _labelled(numbers=(0.3, 1.1)), needs_rows=True, needs_columns=True
    ),
    "negatives": Kernel(
        lifted_structure.lse_of_negatives, _DISTANCES, _labelled(numbers=(1.0,)), needs_rows=True, needs_columns=True
    ),
    "lifted": Kernel(
        lifted_structure.positive_pairs, _DISTANCES, _labelled(_sums, numbers=(0.2,)), needs_rows=True,
        needs_columns=True,
    ),
    "similarities": Kernel(distances.similarities, _DISTANCES, _labelled(), values_only=True),
    "hardest": Kernel(triplet.hardest_rows, _DISTANCES, _labelled(), values_only=True),
    "triplets": Kernel(
        triplet.all_triplets, _DISTANCES, _labelled(numbers=(0.3, 0.0)), needs_rows=True, needs_columns=True,
        tolerance=5e-4,
    ),
    "triplets semihard": Kernel(
        triplet.all_triplets, _DISTANCES, _labelled(numbers=(0.3, 1.0)), needs_rows=True, needs_columns=True,
        tolerance=5e-4,
    ),
    "energy_softmax": Kernel(alpha_cl.softmax_rows, ("labels", "ids"), _energy, needs_rows=True, needs_columns=True),
    "energy_uniform": Kernel(alpha_cl.uniform_rows, ("labels", "ids"), _energy, needs_rows=True, needs_columns=True),
    "energy_power": Kernel(alpha_cl.power_rows, ("labels", "ids"), _energy, needs_rows=True, needs_columns=True),
    "nearest": Kernel(alpha_cl.distances_of_rows, ("labels", "ids"), _energy, values_only=True),
    "soft_targets": Kernel(distillation.soft_target_rows, ("plain", "ids"), _guide),
    "squares": Kernel(spectral.squares_of_others, ("ids",), lambda draw, option: {}),
}  # fmt: skip


def make(
    name: str,
    option: str,
    n: int,
    m: int,
    depth: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float | None = None,
    bias: float | None = None,
    row0: int | None = None,
    unit: bool = True,
) -> tuple[PanelOperands, Tensor]:
    """Operands for a kernel, and the gradient with respect to its outputs, [outputs, N]."""
    kernel = KERNELS[name]
    generator = torch.Generator().manual_seed(n + 7 * m)
    a, b = (torch.randn(rows, depth, generator=generator) for rows in (n, m))
    b[: min(n, m)] += a[: min(n, m)]
    if unit:
        a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    draw = Draw(generator, a.to(dtype), b.to(dtype))
    # Distances are those of the rows; a logit has a scale and a bias.
    default = (10.0, -3.0) if name in ("sigmoid", "soft_targets") else (1.0, 0.0)
    scale, bias = (torch.tensor(y if x is None else x) for x, y in zip((scale, bias), default, strict=True))
    labels, ids = ([(torch.arange(k) * 5 // 3 + s) % 7 * 2**33 for k, s in ((n, 0), (m, 1))] for _ in range(2))
    # Differences that no narrower type holds.
    ids = [torch.arange(len(x)) * 3 % 5 - 2**40 for x in ids]
    ids[1][-1] = 0  # of no row, so that a softmax has something left
    nothing = [None, None]
    has_labels = option in ("labels", "cosine", "everything") or (option == "ids" and "plain" not in kernel.options)
    tags = [
        Tags(*both)
        for both in zip(
            labels if has_labels else nothing, ids if option in ("ids", "everything") else nothing, strict=True
        )
    ]
    x = PanelOperands(
        draw.a, draw.b, scale, bias, row0=None if row0 is None else torch.tensor(row0), tags=tags[0], key_tags=tags[1],
        **({"row_params": None, "column_params": None} | kernel.given(draw, option)),
    )  # fmt: skip
    return x, torch.rand(kernel.function.outputs, n, generator=generator) / n


def needs_of(name: str, x: PanelOperands) -> PanelNeeds:
    """All that the function has for these operands."""
    kernel = KERNELS[name]
    if kernel.values_only:
        return NO_GRADIENTS
    rows = kernel.needs_rows and x.row_params is not None
    columns = x.column_params is not None and (kernel.needs_columns or name == "sigmoid")
    return PanelNeeds(True, True, True, True, rows, columns)


def judge(name: str, x: PanelOperands, incoming: Tensor) -> PanelGradients:
    """What the panel function makes of it in float64."""

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    names = ("a", "b", "scale", "bias", "row_params", "column_params")
    x = replace(x, **{field: wide(getattr(x, field)) for field in names}, guide=[wide(t) for t in x.guide])
    function = KERNELS[name].function
    needs = needs_of(name, x)
    gradients = [None] * 6
    if any(needs[:6]):
        _, gradients = panels.sweep(function, x, None, incoming.double(), needs[:6], "dense")
    return PanelGradients(*gradients, panels.values(function, x, "dense"))


def run(
    backend: str,
    name: str,
    x: PanelOperands,
    incoming: Tensor | None,
    needs: PanelNeeds,
    values: Tensor | None = None,
) -> PanelGradients:
    """What the backend's kernel makes of it."""
    chosen, kernel = engine.select_panels(KERNELS[name].function.kernel, x, backend)
    assert chosen == backend
    return kernel(x, incoming, values, needs)


def check(
    backend: str,
    name: str,
    x: PanelOperands,
    incoming: Tensor,
    tolerance: float | None = None,
    of_products: float = 1.0,
) -> None:
    """Raise unless value and gradients are the judge's; also where the values are known before, or alone wanted."""
    needs = needs_of(name, x)
    tolerance = KERNELS[name].tolerance if tolerance is None else tolerance
    want = judge(name, x, incoming)
    got = run(backend, name, x, incoming if any(needs[:6]) else None, needs)
    _compare(want, got, incoming, tolerance, of_products)
    alone = run(backend, name, x, None, NO_GRADIENTS)
    torch.testing.assert_close(alone.values, got.values, rtol=1e-6, atol=0.0)
    assert all(found is None for found in alone[:6])
    if any(needs[:6]):
        later = run(backend, name, x, incoming, needs._replace(values=False), got.values)
        _compare(want._replace(values=None), later, incoming, tolerance, of_products)


def _compare(want: PanelGradients, got: PanelGradients, incoming: Tensor, tolerance: float, of_products: float) -> None:
    for name, exact, found in zip(PanelGradients._fields, want, got, strict=True):
        assert (exact is None) == (found is None), name
        if found is None:
            continue
        assert found.dtype is torch.float32, name
        assert torch.equal(found.isinf(), exact.reshape(found.shape).isinf()), name
        exact, found = (x.double().where(x.isfinite() | x.isnan(), 0.0) for x in (exact.reshape(found.shape), found))
        # Sums of numbers of both signs, which cancel.
        size = max(float(exact.norm()), float(incoming.norm()) if name in ("scale", "bias") else 0.0)
        allowed = tolerance * (of_products if name in ("a", "b", "scale") else 1.0)
        assert float((found - exact).norm()) <= allowed * max(size, 1e-30), name
