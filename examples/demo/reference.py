"""The loss that everything is compared with, and the one that judges them all. Imports nothing of fastcl."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import ValueAndGradients


def dense_nt_xent(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    """NT-Xent as one writes it: all similarities at once."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    logits = z @ z.T / tau
    # In place for the eager loss's sake; unlike fill_diagonal_ it leaves the batch size open for torch.compile.
    logits.diagonal().fill_(-torch.inf)
    batch = z1.shape[0]
    positive = torch.arange(2 * batch, device=z.device).roll(batch)
    return F.cross_entropy(logits, positive)


def views(pairs: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Two views of a batch whose pairs resemble each other, the same ones for each call and process."""
    generator = torch.Generator().manual_seed(pairs)
    z1 = torch.randn(pairs, dim, generator=generator)
    z2 = z1 + 0.7 * torch.randn(pairs, dim, generator=generator)
    return z1.to(device).requires_grad_(), z2.to(device).requires_grad_()


def exact_nt_xent(z1: Tensor, z2: Tensor, tau: float) -> ValueAndGradients:
    """The loss and its gradients in float64, tile by tile, so that no batch is too large to be judged."""
    x = torch.cat((z1, z2)).detach().double().requires_grad_()
    z = F.normalize(x, dim=1)
    u, n = z.detach(), len(x)
    partner = u.roll(n // 2, 0)

    sums = u.new_zeros(n)
    for i, j, e in _exponentials(u, tau):
        sums[i] += e.sum(1)
        if i != j:
            sums[j] += e.sum(0)
    losses = sums.log() + (1 - (u * partner).sum(1)) / tau

    # Row i appears in its own sum and in those of all others; its positive pair counts once from each side.
    gradient = -2 * partner
    for i, j, e in _exponentials(u, tau):
        e *= (1 / sums[i])[:, None] + 1 / sums[j]
        gradient[i] += e @ u[j]
        if i != j:
            gradient[j] += e.T @ u[i]
    (gradient,) = torch.autograd.grad(z, x, gradient / (n * tau))
    return ValueAndGradients(losses.mean(), gradient.split(n // 2))


def exact_row_losses(z1: Tensor, z2: Tensor, tau: float, rows: Tensor) -> Tensor:
    """The losses of a few rows of the 2B in float64, each against all others."""
    z = F.normalize(torch.cat((z1, z2)).detach().double(), dim=1)
    partners = (rows + len(z1)) % len(z)
    losses = []
    for row, partner in zip(rows.tolist(), partners.tolist(), strict=True):
        s = z @ z[row] / tau
        positive = s[partner].clone()
        s[row] = -torch.inf
        losses.append(s.logsumexp(0) - positive)
    return torch.stack(losses)


def _exponentials(u: Tensor, tau: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """exp(S - 1/tau) without its diagonal, in tiles on and above the diagonal: S is symmetric."""
    n, size = len(u), 1024 if u.device.type == "cpu" else 8192
    spans = [slice(k, min(k + size, n)) for k in range(0, n, size)]
    for index, i in enumerate(spans):
        for j in spans[index:]:
            e = (u[i] @ u[j].T).sub_(1).div_(tau).exp_()
            if i == j:
                e.fill_diagonal_(0)
            yield i, j, e
