"""Partial sums of a panel's tiles, which need no atomics: their bounds, and what they add up to."""

from __future__ import annotations

import triton
from torch import Tensor

from fastcl import tuning
from fastcl.backends.panels import Panel

_MOST = 2**22
"""numbers of a panel, where no W is written and nothing else bounds them"""


def bare_panels(n: int, m: int, config: tuning.Config, vectors: int = 1) -> list[Panel]:
    """Panels of whole rows, for so many partial sums of each of them alone."""
    tiles = vectors * triton.cdiv(m, config.block_n)
    height = max(1, _MOST // tiles // config.block_m) * config.block_m
    return [Panel(begin, min(begin + height, n), 0, m) for begin in range(0, n, height)]


def add(sums: Tensor | None, part: slice, partials: Tensor | None, first: bool) -> None:
    """Adds partial sums [..., slots, count] to a part of the sums, which hold nothing before the ``first``."""
    if sums is None:
        return
    found = partials.sum(dim=-2)
    if first:
        sums[..., part] = found
    else:
        sums[..., part] += found
