"""What is timed: the losses of ``tests/losses.py`` at the sizes people train with.

May import ``tests.losses`` and ``tests.cases``, from which come the calls, the textbook references and the inputs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.measure import dense_bytes
from tests.cases import make_features
from tests.losses import LOSSES, Loss

TAU = 0.1
TINY = 64
"""pairs at which even the peer whose memory is cubic takes part"""


USUAL = ("nt_xent", "clip", "info_nce", "siglip", "sup_con_out")
"""the losses that people choose between"""
PEAK = ("nt_xent", "info_nce", "clip")
"""one loss of each floor: two, three and four sweeps"""

SUITES = {
    "usual": "the losses people choose between, at the sizes they train with",
    "peak": "three losses from 4,096 to 32,768 rows and dim 128 to 1024, to see the share of the arithmetic peak",
    "small": "NT-Xent of 64 to 512 pairs, where overheads decide",
    "family": "every loss that there is, with its options, at one size",
    "targets": "what benchmarks/targets.py judges a GPU by; without the million pairs if quick",
}


@dataclass(frozen=True)
class Cost:
    """What one loss costs, whoever computes it."""

    dense_copies: int = 4
    """N x M matrices that the eager dense formula holds at its peak, measured"""
    learns_scale: bool = False
    """whether the temperature's gradient is part of the work, as is usual for this loss"""


COSTS = {
    "nt_xent": Cost(dense_copies=3),
    "info_nce": Cost(dense_copies=3),
    "clip": Cost(learns_scale=True),
    "siglip": Cost(learns_scale=True),
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
        return COSTS.get(self.loss, Cost())

    @property
    def table_row(self) -> Loss:
        return next(loss for loss in LOSSES if loss.name == self.loss)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def rows(self) -> int:
        """Rows of the similarity matrix; where it is symmetric, all views are."""
        return self.pairs * (len(self.table_row.features) if self.table_row.symmetric else 1)

    @property
    def columns(self) -> int:
        return max(self.rows, *(self.table_row.lengths(self.pairs)))

    @property
    def floor_passes(self) -> float:
        """Sweeps of N * M * D multiply-adds that the loss's plan takes for value and gradients."""
        return self.table_row.passes

    @property
    def floor_flops(self) -> float:
        """Floating-point operations of the floor: two for each multiply-add of each pass."""
        return self.floor_passes * 2 * self.rows * self.columns * self.dim

    def dense_bytes(self, copies: int | None = None, dtype: torch.dtype | None = None) -> int:
        """What a dense computation needs beyond inputs and gradients."""
        return dense_bytes(self.rows, self.columns, dtype or self.torch_dtype, copies or self.cost.dense_copies)

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


MILLION = 1 << 20
TARGET_CASES = tuple(
    Case(loss, pairs, dim, "bfloat16")
    for loss, pairs, dim in (
        ("clip", 32768, 512),
        ("nt_xent", 16384, 512),
        ("clip", 32768, 1024),
        ("nt_xent", 16384, 128),
        ("nt_xent", 256, 128),
        ("clip", MILLION, 512),
    )
)


def suite(device: str, name: str = "usual", *, quick: bool, dtypes: tuple[str, ...] | None = None) -> list[Case]:
    """The cases of one of ``SUITES`` for a device, the most telling first, so that a run that is cut short has them."""
    match name:
        case "usual":
            return _usual(device, quick, dtypes)
        case "peak":
            return _peak(quick, dtypes)
        case "small":
            return _small(dtypes)
        case "family":
            return _family(device, quick, dtypes)
        case "targets":
            return [
                case
                for case in TARGET_CASES
                if (case.pairs < MILLION or not quick) and case.dtype in (dtypes or (case.dtype,))
            ]
    raise ValueError(f"name is {name!r}, expected one of {', '.join(SUITES)}")


def _usual(device: str, quick: bool, dtypes: tuple[str, ...] | None) -> list[Case]:
    gpu = device == "cuda"
    if quick:
        dtypes = dtypes or (("bfloat16", "float32") if gpu else ("float32",))
        smallest, middle, largest, dim = (2048, 8192, 32768, 256) if gpu else (512, 2048, 4096, 128)
        sizes = [(loss, middle) for loss in USUAL] + [("nt_xent", pairs) for pairs in (largest, smallest, TINY)]
        return [Case(loss, pairs, dim, dtype) for dtype in dtypes for loss, pairs in sizes]
    dtypes = dtypes or (("bfloat16", "float32", "float16") if gpu else ("float32", "bfloat16"))
    dims = (128, 256, 512, 1024) if gpu else (128, 512)
    ladder = (TINY, 512, 2048, 8192, 32768) + ((131072,) if gpu else ())
    return [Case(loss, pairs, dim, dtype) for dtype in dtypes for dim in dims for loss in USUAL for pairs in ladder]


def _peak(quick: bool, dtypes: tuple[str, ...] | None) -> list[Case]:
    dims, rows = ((128, 512), (4096,)) if quick else ((128, 256, 512, 1024), (4096, 8192, 16384, 32768))
    return [
        Case(loss, n // Case(loss, 1, dim).rows, dim, dtype)
        for dtype in dtypes or ("float32", "bfloat16")
        for n in rows
        for dim in dims
        for loss in PEAK
    ]


def _small(dtypes: tuple[str, ...] | None) -> list[Case]:
    dims, sizes = (64, 128), (64, 128, 256, 512)
    return [Case("nt_xent", pairs, dim, dtype) for dtype in dtypes or ("float32",) for dim in dims for pairs in sizes]


def _family(device: str, quick: bool, dtypes: tuple[str, ...] | None) -> list[Case]:
    gpu = device == "cuda"
    pairs, dim = ((2048 if quick else 8192), 256) if gpu else ((512 if quick else 2048), 128)
    return [
        Case(loss.name, pairs, dim, dtype)
        for dtype in dtypes or (("bfloat16",) if gpu else ("float32",))
        for loss in LOSSES
    ]
