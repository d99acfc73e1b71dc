"""Linear subspaces and how far they are apart; shared by the examples on linear encoders."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Degrees, ascending, between the spaces that the rows of [r, D] and [s, D] span; min(r, s) of them.

    The largest is 0 where the smaller space lies in the larger one.
    """
    first, second = (torch.linalg.qr(rows.double().T).Q for rows in (first, second))
    if first.shape[1] > second.shape[1]:
        first, second = second, first
    outside = first - second @ (second.T @ first)
    # By sines below 45 degrees and by cosines above: each is exact where the other one is flat.
    sines = torch.linalg.svdvals(outside).clamp(max=1).flip(0)
    cosines = torch.linalg.svdvals(second.T @ first).clamp(max=1)
    return torch.rad2deg(torch.where(sines < 0.7, sines.asin(), cosines.acos()))


def principal_components(rows: Tensor, rank: int) -> Tensor:
    """The directions [rank, D] of largest variance, the largest first."""
    return torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False).Vh[:rank]
