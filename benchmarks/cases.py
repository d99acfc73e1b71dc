"""What is timed: the losses of ``tests/cases.py`` at the sizes people train with.

May import ``tests.cases``, from which come the calls, the textbook references and the inputs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.measure import dense_bytes
from tests.cases import LOSSES, Loss, make_features

TAU = 0.1


@dataclass(frozen=True)
class Cost:
    """What one loss costs, whoever computes it."""

    floor_passes: float
    """the fewest sweeps of N * M * D multiply-adds known to give value and gradients (docs: how it works)"""
    dense_copies: int
    """N x M matrices that the eager dense formula holds at its peak, measured"""
    rows_per_pair: int = 1
    learns_scale: bool = False
    """whether the temperature's gradient is part of the work, as is usual for this loss"""


COSTS = {
    "nt_xent": Cost(floor_passes=2, dense_copies=3, rows_per_pair=2),
    "info_nce": Cost(floor_passes=3, dense_copies=3),
    "clip": Cost(floor_passes=4, dense_copies=4, learns_scale=True),
}


@dataclass(frozen=True)
class Case:
    """One loss at one size in one dtype."""

    loss: str
    pairs: int
    dim: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.pairs}x{self.dim}-{self.dtype}"

    @property
    def cost(self) -> Cost:
        return COSTS[self.loss]

    @property
    def table_row(self) -> Loss:
        return next(loss for loss in LOSSES if loss.name == self.loss)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def rows(self) -> int:
        """Rows and columns of the similarity matrix."""
        return self.pairs * self.cost.rows_per_pair

    @property
    def floor_flops(self) -> float:
        """Floating-point operations of the floor: two for each multiply-add of each pass."""
        return self.cost.floor_passes * 2 * self.rows**2 * self.dim

    def dense_bytes(self, copies: int | None = None, dtype: torch.dtype | None = None) -> int:
        """What a dense computation needs beyond inputs and gradients."""
        return dense_bytes(self.rows, self.rows, dtype or self.torch_dtype, copies or self.cost.dense_copies)

    def resized(self, pairs: int) -> Case:
        return Case(self.loss, pairs, self.dim, self.dtype)

    def inputs(self, device: str, dtype: torch.dtype | None = None) -> tuple[list[Tensor], Tensor | float]:
        """The features and the temperature (a tensor where it is learned), the same in every process.

        With ``dtype`` the same numbers, held more precisely.
        """
        features = make_features(self.table_row, self.pairs, self.dim, self.torch_dtype, device)
        if dtype is not None:
            features = [x.detach().to(dtype).requires_grad_() for x in features]
        # The same float32 number for everyone: a temperature in half precision would be another temperature.
        tau = torch.tensor(TAU)
        if not self.cost.learns_scale:
            return features, tau.item()
        return features, tau.to(device, dtype or torch.float32).requires_grad_()

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def _ladder(loss: str, pairs: tuple[int, ...], dim: int, dtype: str) -> list[Case]:
    return [Case(loss, n, dim, dtype) for n in pairs]


def suite(device: str, *, quick: bool, dtypes: tuple[str, ...] | None = None) -> list[Case]:
    """The cases for a device, the most telling first, so that a run that is cut short has them."""
    if device == "cuda":
        dtypes = dtypes or (("bfloat16", "float32") if quick else ("bfloat16", "float32", "float16"))
        pairs = (2048, 8192, 32768) if quick else (512, 2048, 8192, 32768, 131072)
        dims = (256,) if quick else (128, 256, 512, 1024)
    else:
        dtypes = dtypes or (("float32",) if quick else ("float32", "bfloat16"))
        pairs = (512, 2048, 4096) if quick else (512, 2048, 8192, 32768)
        dims = (128,) if quick else (128, 512)
    cases = []
    for dtype in dtypes:
        for dim in dims:
            cases += _ladder("nt_xent", pairs, dim, dtype)
            for loss in ("clip", "info_nce"):
                cases += _ladder(loss, pairs[-2:-1] if quick else pairs, dim, dtype)
    # The peer whose memory is cubic appears here or nowhere.
    cases += [Case("nt_xent", 64, 128, dtypes[0])] if device == "cpu" else []
    return cases
