"""What gradient caching is judged by: the step whose chunks all keep their graphs, so that both draw the same masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.losses.clip import reference as clip_reference
from fastcl.trees import map_leaves, tensors_of

ROWS, CHUNK = 23, 5
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Encoder(nn.Module):
    """Two layers with dropout between them, in float64."""

    def __init__(self, width: int, dropout: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 16), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(16), nn.Linear(16, 8)
        ).double()

    def forward(self, x: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        return factor * self.layers(x)


def uncached(encoder: Callable[..., Any], chunk_size: int = CHUNK) -> Callable[..., Any]:
    """The judge: an encoder of plain tensors applied chunk by chunk, all graphs kept."""

    def encode(*args: Any, **kwargs: Any) -> Any:
        rows = max(len(x) for x in tensors_of((args, kwargs)) if x.dim())
        parts = []
        for begin in range(0, rows, chunk_size):
            cut = functools.partial(_cut, begin, begin + chunk_size)
            chunk, named = map_leaves(cut, (args, kwargs))
            parts.append(encoder(*chunk, **named))
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        joined = iter([torch.cat(x) if x[0].dim() else x[0] for x in zip(*map(tensors_of, parts), strict=True)])
        return map_leaves(lambda _: next(joined), parts[0])

    return encode


def _cut(begin: int, end: int, x: Any) -> Any:
    return x[begin:end] if isinstance(x, Tensor) and x.dim() else x


def gradients(step: Callable[[], Any], *owners: nn.Module | Tensor) -> tuple[Any, list[Tensor | None]]:
    """What ``step`` returns, and the gradients that it leaves, from one state of the random numbers."""
    parameters = [p for owner in owners for p in (owner.parameters() if isinstance(owner, nn.Module) else [owner])]
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(1)
    value = step()
    return value, [parameter.grad for parameter in parameters]


def assert_same(found: tuple[Any, list], expected: tuple[Any, list]) -> None:
    torch.testing.assert_close(found[0], expected[0].detach(), **EXACT)
    for x, y in zip(found[1], expected[1], strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert y.abs().max() > 0
            torch.testing.assert_close(x, y, **EXACT)


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def clip(image: Tensor, text: Tensor) -> Tensor:
    return clip_reference(image, text, 3.0, normalize=True).mean()
