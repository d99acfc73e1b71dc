"""The packages we replace, as they are on PyPI, agree with us: values, and gradients through them."""

from __future__ import annotations

import pytest
import torch

import fastcl
from benchmarks.peers import import_peer
from tests.cases import available_backends

BACKENDS = pytest.mark.parametrize("backend", available_backends())


def peer(module: str):
    """The peer's module; a peer that can't be imported is a failure, unless the reason is that it isn't installed."""
    try:
        return import_peer(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{module} is not installed: {error}")


@pytest.fixture
def views() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    z1 = torch.randn(24, 10, generator=generator)
    z2 = z1 + 0.7 * torch.randn(24, 10, generator=generator)
    return z1.requires_grad_(), z2.requires_grad_()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, inputs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for x, y in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@BACKENDS
def test_lightly(views, backend: str) -> None:
    criterion = peer("lightly.loss").NTXentLoss(temperature=0.3)
    assert_same(fastcl.nt_xent(*views, 0.3, backend=backend), criterion(*views), views)


@BACKENDS
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_decoupled_losses_of_lightly(views, backend: str) -> None:
    losses = peer("lightly.loss.dcl_loss")
    options = {"backend": backend}
    assert_same(fastcl.nn.DCLLoss(0.3, **options)(*views), losses.DCLLoss(temperature=0.3)(*views), views)
    ours, theirs = fastcl.nn.DCLWLoss(0.3, 0.4, **options), losses.DCLWLoss(temperature=0.3, sigma=0.4)
    assert_same(ours(*views), theirs(*views), views)


@BACKENDS
def test_model_aware_loss_of_lightly(views, backend: str) -> None:
    options = {"temperature": 0.3, "alpha": 0.6, "A_0": 0.2}
    theirs = peer("lightly.loss.macl_loss").MACLLoss(**options)(*views)
    assert_same(fastcl.nn.MACLLoss(**options, backend=backend)(*views), theirs, views)


@BACKENDS
def test_pytorch_metric_learning(views, backend: str) -> None:
    losses = peer("pytorch_metric_learning.losses")
    criterion = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.3))
    assert_same(fastcl.nt_xent(*views, 0.3, backend=backend), criterion(*views), views)
    one_way = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.3), symmetric=False)
    assert_same(fastcl.info_nce(*views, 0.3, backend=backend), one_way(*views), views)


@BACKENDS
def test_open_clip(views, backend: str) -> None:
    criterion = peer("open_clip.loss").ClipLoss()
    images, texts = (torch.nn.functional.normalize(x.detach(), dim=1).requires_grad_() for x in views)
    scale = torch.tensor(12.0, requires_grad=True)
    assert_same(
        fastcl.clip_loss(images, texts, scale, backend=backend), criterion(images, texts, scale), (images, texts, scale)
    )
    ours = fastcl.nn.ClipLoss(backend=backend)(images, texts, logit_scale=scale, output_dict=True)
    theirs = criterion(images, texts, logit_scale=scale, output_dict=True)
    assert ours.keys() == theirs.keys()


def test_distillation_of_open_clip(views) -> None:
    criterion = peer("open_clip.loss").DistillClipLoss()
    images, texts = (torch.nn.functional.normalize(x.detach(), dim=1).requires_grad_() for x in views)
    teacher = torch.nn.functional.normalize(torch.randn(2, 24, 7, generator=torch.Generator().manual_seed(8)), dim=2)
    scale = torch.tensor(12.0, requires_grad=True)
    arguments = (images, texts, scale, *teacher, 20.0)
    ours = fastcl.nn.DistillClipLoss()(*arguments, output_dict=True)
    theirs = criterion(*arguments, output_dict=True)
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs)
    assert_same(sum(ours.values()), sum(theirs.values()), (images, texts, scale))


@BACKENDS
def test_info_nce_pytorch(views, backend: str) -> None:
    criterion = peer("info_nce").InfoNCE(temperature=0.3)
    assert_same(fastcl.info_nce(*views, 0.3, backend=backend), criterion(*views), views)
    negatives = torch.randn(31, 10, requires_grad=True)
    assert_same(
        fastcl.info_nce(*views, 0.3, negatives=negatives, backend=backend),
        criterion(*views, negatives),
        (*views, negatives),
    )


DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


@BACKENDS
@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": DIRECTIONS[:2], "partition_mode": "per_direction"},
        {"directions": DIRECTIONS},
        {"directions": DIRECTIONS[::3]},
        {"directions": DIRECTIONS, "hardness_mode": "in_batch_negatives", "hardness_strength": 3.0},
        {"hardness_mode": "hard_negatives", "hardness_strength": 3.0},
        {"directions": DIRECTIONS[:3], "hardness_mode": "all_negatives", "hardness_strength": 3.0},
    ],
    ids=lambda options: "-".join([*map(str, options.values())]) or "default",
)
def test_sentence_transformers(options: dict, columns: int, backend: str) -> None:
    losses = peer("sentence_transformers.sentence_transformer.losses")
    criterion = losses.MultipleNegativesRankingLoss(model=None, scale=5.0, **options)
    generator = torch.Generator().manual_seed(columns)
    embeddings = [torch.randn(9, 6, generator=generator).requires_grad_() for _ in range(columns)]
    query, document, *negatives = embeddings
    ours = fastcl.nn.MultipleNegativesRankingLoss(5.0, **options, backend=backend)(query, document, negatives)
    assert_same(ours, criterion.compute_loss_from_embeddings(embeddings, None), embeddings)
