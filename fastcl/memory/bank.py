"""A feature for each example of the data set, and the losses of instance discrimination over them.

May import :mod:`fastcl.losses` and :mod:`fastcl.checks`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcl.checks import check_between, check_choice, check_count, check_matrix, check_scalar, check_target
from fastcl.losses.common import REDUCTIONS, normalize_rows
from fastcl.losses.info_nce import info_nce
from fastcl.terms import accumulation_dtype


class MemoryBank(nn.Module):
    r"""One unit-length feature for each example of the data set: instance discrimination.

    Each example is a class of its own, and its row in the bank, an average over its past features, the class's weights.
    The probability that a feature f is that of example i among n is

    .. math:: P(i \mid f) = \exp(\langle v_i, f\rangle / \tau) / Z, \qquad Z = \sum_j \exp(\langle v_j, f\rangle / \tau)

    and the loss its negative logarithm, :meth:`softmax_loss`, or :meth:`nce_loss` with a few sampled rows.

        bank = fastcl.memory.MemoryBank(len(dataset), 128, path="bank.bin")
        loss = bank.softmax_loss(features, indices, tau=0.07)
        loss.backward()
        bank.update(indices, features)

    Args:
        size: examples of the data set, n.
        dim: of a feature.
        momentum: of :meth:`update`.
        path: keep the rows in this file, memory-mapped, instead of in memory. A file that is there already is opened as
            it is; processes of one machine that open the same one share it. The rows then stay on the CPU, and the
            state_dict doesn't hold them.
        dtype: of the rows.
        generator: draws the first rows, uniformly on the sphere; a CPU generator.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.

    Complexity: O(size * dim) memory, or disk.

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018
    (arXiv:1805.01978).

    >>> import torch, fastcl
    >>> bank = fastcl.memory.MemoryBank(1000, 16)
    >>> features, indices = torch.eye(8, 16, requires_grad=True), torch.arange(8)
    >>> bank.softmax_loss(features, indices, tau=0.1).backward()
    >>> bank.update(indices, features, momentum=0.0)
    >>> torch.equal(bank.rows[:8], torch.eye(8, 16))
    True
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        momentum: float = 0.5,
        path: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("size", size)
        check_count("dim", dim)
        check_between("momentum", momentum, 0, 1)
        self.momentum = momentum
        if path is None:
            self.register_buffer("rows", torch.empty(size, dim, dtype=dtype))
            _draw_unit_rows(self.rows, generator)
        else:
            self.rows = _mapped(Path(path), size, dim, dtype, generator)
        self.register_buffer("log_z", torch.tensor(math.nan))

    @torch.no_grad()
    def update(self, indices: Tensor, features: Tensor, *, momentum: float | None = None) -> None:
        """Move the rows of these examples towards their features: v = normalised(m * v + (1 - m) * normalised(f)).

        Args:
            indices: int64 [B], the examples; of one that comes twice, the last counts.
            features: [B, dim], of any floating dtype; what is stored is detached.
            momentum: m; the constructor's if None. With 0 the features replace the rows.

        Raises:
            TypeError, ValueError: an argument doesn't fit; the message names it.
        """
        self._check(indices, features)
        momentum = self.momentum if momentum is None else momentum
        check_between("momentum", momentum, 0, 1)
        # All that share a row write the same to it: on a GPU the order of writes isn't known.
        features = features[_last_occurrences(indices)].to(self.rows.device)
        indices = indices.to(self.rows.device)
        dtype = accumulation_dtype(self.rows.dtype)
        rows = torch.lerp(F.normalize(features.to(dtype), dim=1), self.rows[indices].to(dtype), momentum)
        self.rows[indices] = F.normalize(rows, dim=1).to(self.rows.dtype)

    def refresh(self, encoder: Callable[[Any], Tensor], batches: Iterable[tuple[Tensor, Any]]) -> None:
        """Replace every row by its example's feature of now, such as once an epoch, so that none is stale.

        Args:
            encoder: is called without gradients; set its ``eval()`` mode as you want it.
            batches: pairs of indices and inputs, which must cover the data set.

        Raises:
            ValueError: a row was left out.
        """
        left_out = torch.ones(len(self.rows), dtype=torch.bool)
        with torch.no_grad():
            for indices, inputs in batches:
                self.update(indices, encoder(inputs), momentum=0.0)
                left_out[indices.cpu()] = False
        if count := int(left_out.sum()):
            raise ValueError(f"batches must cover the data set, got nothing for {count} of {len(self.rows)} examples")

    def sample(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniform indices on the rows' device: ``sample(m)`` for a batch, ``sample(B, m)`` for each of its rows."""
        return torch.randint(len(self.rows), shape, generator=generator, device=self.rows.device)

    def softmax_loss(
        self,
        features: Tensor,
        indices: Tensor,
        tau: float | Tensor,
        *,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> Tensor:
        """-log P(i | f), over all n rows: ``info_nce(features, bank.rows, tau, target=indices)``.

        The B x n matrix never exists. Rows are constants: value and gradient cost 2 * B * n * dim multiply-adds.

        Args:
            features: [B, dim], on the rows' device; they are scaled to unit length and cast to the rows' dtype.
            indices: int64 [B], their examples.
            tau, reduction, backend: see :func:`fastcl.info_nce`.

        Raises:
            TypeError, ValueError: an argument doesn't fit; the message names it.
        """
        self._check(indices, features)
        if features.device != self.rows.device:
            raise ValueError(f"features must be on {self.rows.device} like the rows, got {features.device}")
        unit = normalize_rows(features).to(self.rows.dtype)
        return info_nce(unit, self.rows, tau, target=indices, normalize=False, reduction=reduction, backend=backend)

    def nce_loss(
        self,
        features: Tensor,
        indices: Tensor,
        tau: float | Tensor,
        *,
        negatives: Tensor,
        reduction: str = "mean",
    ) -> Tensor:
        r"""Noise-contrastive estimation: tell an example's own row from m that are drawn uniformly.

        .. math:: \ell = -\log h(v_i) - \sum_{k=1}^m \log(1 - h(v_{j_k})), \qquad
                  h(v) = \frac{P}{P + m / n}, \quad P = \exp(\langle v, f\rangle / \tau) / Z

        Z is a constant: the first call estimates it from its negatives, n times their mean, and keeps its logarithm in
        the buffer ``log_z`` (each rank its own, unless that is broadcast).

        Args:
            features: [B, dim]; they are scaled to unit length.
            indices: int64 [B], their examples.
            tau: the temperature, a positive float or a 0-d tensor.
            negatives: indices from :meth:`sample`, [m] for all features or [B, m] for each its own (as in the paper, at
                B * m * dim numbers of memory).
            reduction: "mean", "sum", or "none" for [B].

        Returns:
            The loss in float32 (float64 for float64 features).

        Raises:
            TypeError, ValueError: an argument doesn't fit; the message names it.
        """
        self._check(indices, features)
        check_scalar("tau", tau, positive=True)
        check_choice("reduction", reduction, REDUCTIONS)
        if not isinstance(negatives, Tensor) or negatives.is_floating_point() or negatives.dtype is torch.bool:
            raise TypeError(f"negatives must be an integer tensor, got {getattr(negatives, 'dtype', type(negatives))}")
        if negatives.dim() not in (1, 2) or negatives.shape[:-1] not in ((), (len(features),)) or not negatives.numel():
            raise ValueError(
                f"negatives must have shape [m] or [{len(features)}, m], not empty, got {tuple(negatives.shape)}"
            )
        dtype = accumulation_dtype(features.dtype)
        unit = F.normalize(features.to(dtype), dim=1)
        own, drawn = (
            self.rows[index.to(self.rows.device)].to(features.device, dtype) for index in (indices, negatives)
        )
        positive = (unit * own).sum(dim=1) / tau
        logits = (torch.einsum("bd,bkd->bk", unit, drawn) if drawn.dim() == 3 else unit @ drawn.T) / tau
        with torch.no_grad():
            estimate = logits.flatten().logsumexp(dim=0) + math.log(len(self.rows) / logits.numel())
            self.log_z.copy_(torch.where(self.log_z.isnan(), estimate, self.log_z))
        # The logarithm of P / (m / n), whose sigmoid is h.
        shift = self.log_z.to(dtype) + math.log(negatives.shape[-1] / len(self.rows))
        loss = F.softplus(shift - positive) + F.softplus(logits - shift).sum(dim=1)
        return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()

    def _check(self, indices: Tensor, features: Tensor) -> None:
        check_matrix("features", features)
        if features.shape[1] != self.rows.shape[1]:
            raise ValueError(f"features must have shape [rows, {self.rows.shape[1]}], got {tuple(features.shape)}")
        check_target("indices", indices, features, len(self.rows))
        if indices.device.type == "cpu" and int(indices.min()) < 0:
            raise ValueError(f"indices must not be negative, got {int(indices.min())}")

    def extra_repr(self) -> str:
        size, dim = self.rows.shape
        return f"size={size}, dim={dim}, momentum={self.momentum}, dtype={self.rows.dtype}"


def _last_occurrences(indices: Tensor) -> Tensor:
    """For each index the last place that has it, without waiting for the device."""
    in_order, order = indices.sort(stable=True)
    return order[torch.searchsorted(in_order, indices, right=True) - 1]


def _draw_unit_rows(rows: Tensor, generator: torch.Generator | None) -> None:
    # In parts, so that a file far larger than memory can be filled.
    for part in rows.split(max(1, (1 << 22) // rows.shape[1])):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator), dim=1))


def _mapped(path: Path, size: int, dim: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """The file as a tensor, whose rows are drawn if there is no such file yet."""

    def rows_of(file: Path) -> Tensor:
        return torch.from_file(str(file), shared=True, size=size * dim, dtype=dtype).view(size, dim)

    if not path.exists():
        # Under another name until it is complete, so that a process that is stopped leaves no half-filled bank.
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        _draw_unit_rows(rows_of(partial), generator)
        with contextlib.suppress(FileExistsError):  # of several processes the first one's file is everybody's
            os.link(partial, path)
        partial.unlink()
    expected = size * dim * dtype.itemsize
    if (found := path.stat().st_size) != expected:
        raise ValueError(f"path must be a file of {expected} bytes, {size} x {dim} {dtype}, got {path} of {found}")
    return rows_of(path)
