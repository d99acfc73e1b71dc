"""GradCache against the same step without a cache: each chunk's graph is kept, so that both draw the same masks."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import fastcl
from benchmarks.peers import import_peer
from fastcl import replay
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


@dataclasses.dataclass(frozen=True)
class Output:
    embedding: Tensor
    ids: Tensor
    unused: Tensor | None = None


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def as_output(kind: str, z: Tensor) -> Any:
    ids = torch.arange(len(z))
    return {
        "tuple": lambda: (z, z.square()),
        "named tuple": lambda: Pair(z, z.square()),
        "dict": lambda: {"embedding": z, "ids": ids, "name": "a string"},
        "dataclass": lambda: Output(z, ids),
        "nested": lambda: {"all": [z, (z.square(), None)]},
    }[kind]()


def embedding_of(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        return output["embedding"] if "embedding" in output else output["all"][0] + output["all"][1][0]
    return output.embedding if isinstance(output, Output) else output[0] + output[1]


@pytest.mark.parametrize("kind", ["tuple", "named tuple", "dict", "dataclass", "nested"])
def test_structured_outputs(kind: str) -> None:
    image, x, y = Encoder(6), draw(ROWS, 6), draw(ROWS, 8)

    def encoder(x: Tensor) -> Any:
        return as_output(kind, image(x))

    types = []

    def loss(output: Any) -> Tensor:
        types.append(type(output))
        return clip(embedding_of(output), y)

    judge = gradients(lambda: backward(clip(embedding_of(as_output(kind, uncached(image)(x))), y)), image)
    assert_same(gradients(lambda: fastcl.GradCache([encoder], loss, chunk_size=CHUNK)(x), image), judge)
    assert types == [type(as_output(kind, x))]


class BatchEncoding(UserDict):
    """What a Hugging Face tokenizer returns, as far as anyone here can tell."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, factor: (x, factor),
        lambda x, factor: {"x": x, "factor": factor},
        lambda x, factor: BatchEncoding(x=x, factor=factor),
    ],
    ids=["tuple", "dict", "BatchEncoding"],
)
@pytest.mark.parametrize("factor", [2.0, torch.tensor(2.0), torch.rand(ROWS, 1)], ids=["float", "0-d", "batched"])
def test_structured_inputs(wrap: Callable[..., Any], factor: float | Tensor) -> None:
    image, x, y = Encoder(6), draw(ROWS, 6), draw(ROWS, 8)
    judge = gradients(lambda: backward(clip(uncached(image)(x, factor), y)), image)
    step = fastcl.GradCache([image], lambda z: clip(z, y), chunk_size=CHUNK)
    assert_same(gradients(lambda: step(wrap(x, factor)), image), judge)


def test_hugging_face() -> None:
    """A BERT with dropout: its tokenizer's BatchEncoding in, its ModelOutput out."""
    pytest.importorskip("transformers", reason="needs transformers")
    bert = import_peer("transformers.models.bert.modeling_bert")
    batch_encoding = import_peer("transformers.tokenization_utils_base").BatchEncoding
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = bert.BertModel(bert.BertConfig(vocab_size=50, **sizes)).double().train()
    tokens, y = torch.randint(50, (ROWS, 7)), draw(ROWS, 16)
    mask = (torch.arange(7) < torch.randint(2, 8, (ROWS, 1))).long()
    batch = batch_encoding({"input_ids": tokens, "attention_mask": mask})

    def loss(output: Any) -> Tensor:
        assert type(output).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
        return clip(output.pooler_output, y)

    def pooled(**batch: Tensor) -> Tensor:
        return model(**batch).pooler_output

    judge = gradients(lambda: backward(clip(uncached(pooled)(**batch), y)), model)
    assert_same(gradients(lambda: fastcl.GradCache([model], loss, chunk_size=CHUNK)(batch), model), judge)


def test_rows_of_several_lengths() -> None:
    """A list is a batch: here sequences that the encoder pads, each chunk to its own longest."""
    image, y = Encoder(6), draw(ROWS, 8)
    sequences = [draw(1 + i % 4, 6) for i in range(ROWS)]

    def encoder(sequences: list[Tensor]) -> Tensor:
        return pad_sequence(sequences, batch_first=True).sum(dim=1)

    pooled = torch.stack([x.sum(dim=0) for x in sequences])
    judge = gradients(lambda: backward(clip(uncached(image)(pooled), y)), image)
    step = fastcl.GradCache([lambda x: image(encoder(x))], lambda z: clip(z, y), chunk_size=CHUNK)
    assert_same(gradients(lambda: step(sequences), image), judge)
    for rows in (3, 8):
        judge = gradients(lambda: backward(clip(uncached(image)(pooled[:rows]), y[:rows])), image)  # noqa: B023
        step = fastcl.GradCache([lambda x: image(encoder(x))], lambda z: clip(z, y[: len(z)]), chunk_size=CHUNK)
        assert_same(gradients(lambda: step(sequences[:rows]), image), judge)  # noqa: B023


def test_a_scalar_beside_the_features() -> None:
    """As open_clip's models return it: both features, and the scale."""
    image, text, x, y = Encoder(6), Encoder(9), draw(ROWS, 6), draw(ROWS, 9)
    log_scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)

    def model(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return normalize(image(x)), normalize(text(y)), log_scale.exp()

    judge = gradients(lambda: backward(fastcl.clip_loss(*uncached(model)(x, y))), image, text, log_scale)
    step = fastcl.GradCache([model], lambda output: fastcl.clip_loss(*output), chunk_size=CHUNK)
    assert_same(gradients(lambda: step((x, y)), image, text, log_scale), judge)

    with pytest.raises(ValueError, match="0-d tensor that differs from chunk to chunk"):
        fastcl.GradCache([lambda x: (image(x), x.sum())], lambda output: output[0].sum(), chunk_size=CHUNK)(x)


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
