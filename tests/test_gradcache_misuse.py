"""What GradCache refuses, with the argument's name and without touching a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from tests.chunks import clip, draw

X, ONE = draw(6, 4), nn.Linear(4, 3).double()
FROZEN = nn.Linear(4, 3).double().requires_grad_(False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastcl.GradCache([ONE], clip, chunk_size=0), ValueError, "chunk_size must be at least 1, got 0"),
        (lambda: fastcl.GradCache([ONE], clip, chunk_size=(-1,)), ValueError, "chunk_size must be at least 1, got -1"),
        (lambda: fastcl.GradCache([ONE], clip, chunk_size=(1.5,)), TypeError, "chunk_size must be an integer, got 1.5"),
        (lambda: fastcl.GradCache([ONE], clip, chunk_size=2.0), TypeError, "chunk_size must be an integer, got 2.0"),
        (lambda: fastcl.GradCache([ONE], clip, chunk_size=(1, 2)), ValueError, "one for each of 1 encoders"),
        (lambda: fastcl.GradCache(ONE, clip, chunk_size=1), TypeError, "encoders must be a sequence of callables"),
        (lambda: fastcl.GradCache([], clip, chunk_size=1), TypeError, "encoders must be a sequence of callables"),
        (lambda: fastcl.GradCache([ONE], None, chunk_size=1), TypeError, "loss must be callable, got None"),
        (lambda: fastcl.cached(3, chunk_size=1), TypeError, "encoder must be callable, got 3"),
        (lambda: fastcl.cached(ONE, chunk_size=0), ValueError, "chunk_size must be at least 1, got 0"),
        (lambda: step(torch.sum)(X, X), ValueError, "inputs must be one for each of 1 encoders, got 2"),
        (lambda: step(torch.sum)((X, X[:5])), ValueError, r"encoders\[0\] must be given inputs of one batch size"),
        (lambda: step(clip_loss, ONE, ONE)(X, X[:5]), ValueError, r"the same shape, got \(6, 3\) and \(5, 3\)"),
        (lambda: step(torch.sum)(X[:0]), ValueError, "at least one row, got an empty batch"),
        (lambda: step(torch.sum)(3.0), ValueError, "one row for each sample, got none"),
        (lambda: step(torch.sum)([X[0].requires_grad_()]), ValueError, "list with a tensor that requires grad"),
        (lambda: step(lambda z: z.sum(dim=1))(X), ValueError, r"loss must return a 0-d tensor, got shape \(6,\)"),
        (lambda: step(lambda z: {"loss": z.sum()})(X), TypeError, "loss must return a 0-d tensor, got dict"),
        (lambda: step(torch.sum, FROZEN)(X), ValueError, "nothing to train"),
        (lambda: step(lambda a, b: a.sum(), ONE, ONE)(X, X), ValueError, r"every encoder, encoders\[1\] get"),
        (lambda: step(lambda a, b: b.sum() + a.detach().sum(), ONE, ONE)(X, X), ValueError, r"encoders\[0\] get"),
        (lambda: step(lambda a: a.detach().sum() * GAIN, ONE)(X), ValueError, r"encoders\[0\] get no gradient"),
        (lambda: step(lambda a, b: Deaf.apply(a, b), ONE, ONE)(X, X), ValueError, r"encoders\[1\] got no gradient"),
        (lambda: step(torch.sum, lambda x: x.sum(dim=0))(X), ValueError, "one row for each row of a chunk"),
        (lambda: no_grad_step(), ValueError, "a step needs gradients"),
    ],
)
def test_bad_use_raises(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    before = [None if p.grad is None else p.grad.clone() for p in ONE.parameters()]
    with pytest.raises(error, match=message):
        call()
    torch.testing.assert_close([p.grad for p in ONE.parameters()], before)


GAIN = torch.ones((), dtype=torch.float64, requires_grad=True)
clip_loss = functools.partial(fastcl.clip_loss, logit_scale=1.0)


def step(loss: Callable[..., Tensor], *encoders: Callable[..., Any]) -> fastcl.GradCache:
    return fastcl.GradCache(encoders or [ONE], loss, chunk_size=2)


def no_grad_step() -> Tensor:
    with torch.no_grad():
        return step(torch.sum)(X)


class Deaf(torch.autograd.Function):
    """Gives one input no gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a.sum() + b.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.expand(6, 3), None


def test_batch_changed_before_its_replay() -> None:
    x = X.clone()
    loss = step(torch.sum).loss(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivative_raises() -> None:
    x = X.clone().requires_grad_()
    loss = step(lambda z: z.square().sum()).loss(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
