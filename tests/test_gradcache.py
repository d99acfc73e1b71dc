"""GradCache against the same step without a cache."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastcl
from fastcl import replay
from tests.chunks import CHUNK, ROWS, Encoder, assert_same, backward, clip, draw, gradients, uncached


@pytest.mark.parametrize("chunk_size", [1, CHUNK, ROWS, 100, (4, 7)], ids=str)
def test_equals_the_step_without_chunks(chunk_size: int | tuple[int, int]) -> None:
    """Two encoders with dropout and a learned temperature; 23 rows leave a ragged last chunk."""
    image, text, x, y = Encoder(6), Encoder(9), draw(ROWS, 6), draw(ROWS, 9)
    loss = fastcl.nn.ClipLoss(0.2, normalize=True).double()
    own, other = chunk_size if isinstance(chunk_size, tuple) else (chunk_size, chunk_size)
    judge = gradients(lambda: backward(loss(uncached(image, own)(x), uncached(text, other)(y))), image, text, loss)
    step = fastcl.GradCache([image, text], loss, chunk_size=chunk_size)
    assert_same(gradients(lambda: step(x, y), image, text, loss), judge)
    assert not step(x, y).requires_grad


def test_equals_the_whole_batch_at_once() -> None:
    """Without dropout a batch in chunks is the batch at once, and the loss is the textbook's."""
    image, text, x, y = Encoder(6, 0.0), Encoder(9, 0.0), draw(ROWS, 6), draw(ROWS, 9)
    judge = gradients(lambda: backward(clip(image(x), text(y))), image, text)
    loss = functools.partial(fastcl.clip_loss, logit_scale=3.0, normalize=True)
    assert_same(gradients(lambda: fastcl.GradCache([image, text], loss, chunk_size=CHUNK)(x, y), image, text), judge)


def test_shared_and_tied_encoders() -> None:
    shared, x, y = Encoder(6), draw(ROWS, 6), draw(ROWS, 6)
    judge = gradients(lambda: backward(clip(uncached(shared)(x), uncached(shared)(y))), shared)
    assert_same(gradients(lambda: fastcl.GradCache([shared, shared], clip, chunk_size=CHUNK)(x, y), shared), judge)

    first, second = Encoder(6), Encoder(6)
    second.layers[0].weight = first.layers[0].weight
    judge = gradients(lambda: backward(clip(uncached(first)(x), uncached(second)(y))), first, second)
    cached = gradients(lambda: fastcl.GradCache([first, second], clip, chunk_size=CHUNK)(x, y), first, second)
    assert_same(cached, judge)


def test_frozen_encoder_is_not_replayed() -> None:
    image, frozen, x, y = Encoder(6), Encoder(9).requires_grad_(False), draw(ROWS, 6), draw(ROWS, 9)
    judge = gradients(lambda: backward(clip(uncached(image)(x), uncached(frozen)(y))), image, frozen)
    calls = {image: 0, frozen: 0}
    for module in calls:
        module.register_forward_hook(lambda module, *_: calls.update({module: calls[module] + 1}))
    assert_same(
        gradients(lambda: fastcl.GradCache([image, frozen], clip, chunk_size=CHUNK)(x, y), image, frozen), judge
    )
    assert list(calls.values()) == [10, 5]

    calls[frozen] = 0
    with torch.no_grad():
        fastcl.GradCache([frozen], lambda z: z.mean(), chunk_size=CHUNK).loss(y)
    assert calls[frozen] == 5


def test_frozen_encoders_and_a_trained_temperature() -> None:
    frozen, x, y = Encoder(6).requires_grad_(False), draw(ROWS, 6), draw(ROWS, 6)
    loss = fastcl.nn.ClipLoss(0.2, normalize=True).double()
    judge = gradients(lambda: backward(loss(uncached(frozen)(x), uncached(frozen)(y))), loss)
    assert_same(gradients(lambda: fastcl.GradCache([frozen, frozen], loss, chunk_size=CHUNK)(x, y), loss), judge)


def test_more_inputs_and_arguments_of_the_loss() -> None:
    """Explicit negatives from an encoder of their own, in a number of their own; a target as the loss's argument."""
    query, key, x, y, z = Encoder(6), Encoder(9), draw(ROWS, 6), draw(ROWS, 9), draw(31, 9)

    def loss(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
        return fastcl.info_nce(query, key, 0.3, negatives=negatives)

    judge = gradients(lambda: backward(loss(uncached(query)(x), uncached(key)(y), uncached(key)(z))), query, key)
    step = fastcl.GradCache([query, key, key], loss, chunk_size=CHUNK)
    assert_same(gradients(lambda: step(x, y, z), query, key), judge)

    target = torch.randperm(31)[:ROWS]
    loss = fastcl.nn.InfoNCELoss(0.3)
    judge = gradients(lambda: backward(loss(uncached(query)(x), uncached(key)(z), target=target)), query, key)
    step = fastcl.GradCache([query, key], loss, chunk_size=CHUNK)
    assert_same(gradients(lambda: step(x, z, target=target), query, key), judge)


def test_inputs_that_require_grad() -> None:
    image, x, factor = Encoder(6), draw(ROWS, 6).requires_grad_(), draw(1).squeeze().requires_grad_()
    y = draw(ROWS, 8)
    judge = gradients(lambda: backward(clip(uncached(image)(2 * x, factor), y)), image, x, factor)
    step = fastcl.GradCache([image], lambda z: clip(z, y), chunk_size=CHUNK)
    assert_same(gradients(lambda: step((2 * x, factor)), image, x, factor), judge)
    # The encoder is frozen, what it is given is not.
    image.requires_grad_(False)
    judge = gradients(lambda: backward(clip(uncached(image)(2 * x), y)), x)
    assert_same(gradients(lambda: step(2 * x), x), judge)


def test_loss_can_be_scaled_and_added_to_others() -> None:
    image, text, x, y = Encoder(6), Encoder(9), draw(ROWS, 6), draw(ROWS, 9)

    def total(loss: Tensor) -> Tensor:
        return backward(3.0 * loss + 0.1 * image.layers[0].weight.square().sum())

    judge = gradients(lambda: total(clip(uncached(image)(x), uncached(text)(y))), image, text)
    step = fastcl.GradCache([image, text], clip, chunk_size=CHUNK)
    assert_same(gradients(lambda: total(step.loss(x, y)), image, text), judge)


@pytest.mark.parametrize("form", ["function", "decorator"])
def test_functional_form(form: str) -> None:
    image, text, x, y = Encoder(6), Encoder(9), draw(ROWS, 6), draw(ROWS, 9)
    judge = gradients(lambda: backward(clip(uncached(image)(x), uncached(text)(y, factor=2.0))), image, text)
    if form == "function":
        encode_image, encode_text = (fastcl.cached(encoder, chunk_size=CHUNK) for encoder in (image, text))
    else:
        encode_image = fastcl.cached(image, chunk_size=CHUNK)

        @fastcl.cached(chunk_size=CHUNK)
        def encode_text(y: Tensor, factor: float) -> Tensor:
            return text(y, factor)

    assert_same(gradients(lambda: backward(clip(encode_image(x), encode_text(y, factor=2.0))), image, text), judge)


def test_accumulation_over_steps() -> None:
    image, batches = Encoder(6), [(draw(rows, 6), draw(rows, 8)) for rows in (ROWS, 7, 12)]

    def accumulate(step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return sum(step(x, y).detach() for x, y in batches)

    judge = gradients(lambda: accumulate(lambda x, y: backward(clip(uncached(image)(x), y) / 3)), image)
    encode = fastcl.cached(image, chunk_size=CHUNK)
    assert_same(gradients(lambda: accumulate(lambda x, y: backward(clip(encode(x), y) / 3)), image), judge)
    step = fastcl.GradCache([image], lambda z, y: clip(z, y) / 3, chunk_size=CHUNK)
    assert_same(gradients(lambda: accumulate(lambda x, y: step(x, y=y)), image), judge)


def test_two_losses_before_either_backward() -> None:
    image, x, y = Encoder(6), draw(ROWS, 6), draw(ROWS, 8)

    def both(encode: Callable[[Tensor], Tensor]) -> Tensor:
        losses = [clip(encode(z), y) for z in (x, x + 1)]
        for loss in losses:
            loss.backward()
        return sum(losses).detach()

    judge = gradients(lambda: both(uncached(image)), image)
    assert_same(gradients(lambda: both(fastcl.cached(image, chunk_size=CHUNK)), image), judge)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_inside(reentrant: bool) -> None:
    image, x, y = Encoder(6), draw(ROWS, 6), draw(ROWS, 8)
    encoder = functools.partial(checkpoint, image, use_reentrant=reentrant)
    judge = gradients(lambda: backward(clip(uncached(image)(x), y)), image)
    with warnings.catch_warnings():
        # Reentrant checkpointing says so where neither grad nor an input that requires grad is there.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        step = fastcl.GradCache([encoder], lambda z: clip(z, y), chunk_size=CHUNK)
        if reentrant:
            x.requires_grad_()
        assert_same(gradients(lambda: step(x), image), judge)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "rows"), [("aot_eager", ROWS), ("inductor", 4 * CHUNK)])
def test_compiled_encoder(backend: str, rows: int) -> None:
    """With dropout, whose masks a compiled graph draws in its own way; aot_eager compiles the ragged chunk as well."""
    image, x, y = Encoder(6), draw(rows, 6), draw(rows, 8)
    encoder = torch.compile(image, backend=backend)
    judge = gradients(lambda: backward(clip(uncached(encoder)(x), y)), image)
    step = fastcl.GradCache([encoder], lambda z: clip(z, y), chunk_size=CHUNK)
    assert_same(gradients(lambda: step(x), image), judge)


@pytest.mark.parametrize("outside", [False, True], ids=["backward inside", "backward after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, outside: bool) -> None:
    """No further from float64 than the step without chunks is. Casts of parameters are cached by autocast."""
    image = Encoder(6, 0.0)
    x, y = draw(ROWS, 6), draw(ROWS, 8)
    _, exact = gradients(lambda: backward(clip(image(x), y)), image)
    image, x, y = image.float(), x.float(), y.float()
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16, init_scale=2.0**10)
    optimizer = torch.optim.SGD(image.parameters(), lr=0.0)
    seen = []
    image.register_forward_hook(lambda _, x, z: seen.append(z.dtype))

    def loss(z: Tensor) -> Tensor:
        return fastcl.clip_loss(z, y.to(z.dtype), 3.0, normalize=True)

    def scaled(compute: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype):
            value = compute()
            if not outside:
                scaler.scale(value).backward()
        if outside:
            scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return value

    _, plain = gradients(lambda: scaled(lambda: loss(image(x))), image)
    _, cached = gradients(lambda: scaled(lambda: fastcl.GradCache([image], loss, chunk_size=CHUNK).loss(x)), image)
    assert seen == [dtype] * 11
    for own, other, true in zip(cached, plain, exact, strict=True):
        error, allowed = ((g.double() - true).norm() / true.norm() for g in (own, other))
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps


def test_casts_that_autocast_keeps() -> None:
    """The replay must not use casts of parameters that the pass without a graph made."""
    image, x = nn.Linear(6, 8), torch.randn(ROWS, 6)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            image(x)
        fastcl.GradCache([image], lambda z: z.float().square().mean(), chunk_size=CHUNK)(x)
    assert image.weight.grad.abs().max() > 0


def test_random_numbers_go_on_as_they_would() -> None:
    image, x = Encoder(6), draw(ROWS, 6)
    torch.manual_seed(1)
    uncached(image)(x)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fastcl.GradCache([image], torch.sum, chunk_size=CHUNK)(x)
    torch.testing.assert_close(torch.rand(3), expected)


def test_memory_depends_on_the_chunk() -> None:
    """Rows whose graph is alive at once, counted by objects that live as long as the graph does."""
    alive: weakref.WeakSet[Token] = weakref.WeakSet()
    peak = 0

    class Token:
        def __init__(self, rows: int) -> None:
            nonlocal peak
            self.rows = rows
            alive.add(self)
            peak = max(peak, sum(token.rows for token in alive))

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.token = Token(len(x))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    linear, x = nn.Linear(6, 8), torch.randn(40, 6)
    encoder = lambda x: Probe.apply(linear(x))  # noqa: E731
    fastcl.GradCache([encoder, encoder], lambda a, b: (a * b).sum(), chunk_size=4)(x, x)
    assert peak == 4
    (encoder(x) * encoder(x)).sum().backward()
    assert peak == 80


@pytest.mark.parametrize("callback", [False, True])
def test_progress(callback: bool, capsys: pytest.CaptureFixture[str]) -> None:
    image, frozen, x = Encoder(6), Encoder(6).requires_grad_(False), draw(ROWS, 6)
    seen = []
    progress = (lambda *report: seen.append(report)) if callback else True
    fastcl.GradCache([image, frozen], clip, chunk_size=(5, 10), progress=progress)(x, x)
    if callback:
        assert seen == [("encode", i, 8) for i in range(1, 9)] + [("replay", i, 5) for i in range(1, 6)]
    else:
        assert "replay 5 of 5 chunks" in capsys.readouterr().err


def test_batch_norm_is_warned_of_once() -> None:
    replay._warn_of_batch_norm.cache_clear()
    encoder, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), torch.randn(20, 6)
    step = fastcl.GradCache([encoder], torch.sum, chunk_size=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x[:10])
        fastcl.GradCache([encoder.eval()], torch.sum, chunk_size=10)(x)
    encoder.train()
    with pytest.warns(RuntimeWarning, match="statistics of each chunk"):
        step(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x)
