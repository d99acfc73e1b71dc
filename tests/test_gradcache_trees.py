"""GradCache with what encoders take and return: tuples, mappings, dataclasses, lists, scalars, a tokenizer's output."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

import fastcl
from benchmarks.peers import import_peer
from tests.chunks import CHUNK, ROWS, Encoder, assert_same, backward, clip, draw, gradients, uncached


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
