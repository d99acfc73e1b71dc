"""The packages we replace, as they are on PyPI, agree with us: values, and gradients through them."""

from __future__ import annotations

import pytest
import torch

import fastcl
from benchmarks.peers import import_peer
from fastcl import Mask, Reduce, Term
from fastcl.engine import BACKENDS as BY_NAME
from fastcl.terms import Operands, Plan
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


def sup_contrast(features: torch.Tensor, labels: torch.Tensor, temperature: float, base: float) -> torch.Tensor:
    """The formula of SupContrast's SupConLoss, as its paper and code define it, on unit features [B, V, D]."""
    contrast = torch.cat(torch.unbind(features, dim=1))
    labels = labels.repeat(features.shape[1])
    same = (labels[:, None] == labels).to(contrast.dtype).fill_diagonal_(0.0)
    others = 1 - torch.eye(len(contrast), dtype=contrast.dtype)
    logits = contrast @ contrast.T / temperature
    log_p = logits - (logits.exp() * others).sum(dim=1, keepdim=True).log()
    rows = (same * log_p).sum(dim=1) / same.sum(dim=1).clamp_min(1)
    return -(temperature / base) * rows.mean()


@BACKENDS
def test_sup_contrast(views, backend: str) -> None:
    labels = torch.arange(24) % 5
    z = torch.stack((*views, views[0] - views[1]), dim=1)
    unit = torch.nn.functional.normalize(z, dim=2)
    assert_same(
        fastcl.sup_con_loss(z, labels, 0.3, backend=skip_refusals(backend)), sup_contrast(unit, labels, 0.3, 0.3), views
    )
    rows = fastcl.sup_con_loss(z, labels, 0.3, reduction="none")
    assert rows.shape == (24, 3)
    torch.testing.assert_close(0.3 / 0.07 * rows.mean(), sup_contrast(unit, labels, 0.3, 0.07))
    # Without labels each example is its own class: two views are SimCLR.
    two = torch.stack(views, dim=1)
    torch.testing.assert_close(fastcl.sup_con_loss(two, None, 0.3), fastcl.nt_xent(*views, 0.3))
    torch.testing.assert_close(fastcl.nn.SupConLoss(0.3)(z, labels), rows.mean())


@BACKENDS
@pytest.mark.parametrize("classes", [4, 24])
def test_pytorch_metric_learning_sup_con(views, backend: str, classes: int) -> None:
    losses = peer("pytorch_metric_learning.losses")
    labels = (torch.arange(24) % classes).repeat(2)
    z = torch.cat(views)
    ours = fastcl.sup_con_loss(z, labels, 0.3, backend=skip_refusals(backend))
    assert_same(ours, losses.SupConLoss(temperature=0.3)(z, labels), views)
    ours = fastcl.nt_xent(*views, 0.3, labels=labels[:24], backend=skip_refusals(backend))
    assert_same(ours, losses.SupConLoss(temperature=0.3)(z, labels), views)


def skip_refusals(backend: str) -> str:
    """The backend, or a skip with its reason where it doesn't test labels."""
    x = torch.zeros(2, 2)
    plan = Plan((Term(Reduce.LSE, Mask(label=True)),))
    reason = BY_NAME[backend].supports(plan, Operands(x, x, torch.tensor(1.0)))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return backend


def test_open_clip_siglip(views) -> None:
    criterion = peer("open_clip.loss").SigLipLoss()
    images, texts = (torch.nn.functional.normalize(x.detach(), dim=1).requires_grad_() for x in views)
    scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-4.0, requires_grad=True)
    inputs = (images, texts, scale, bias)
    assert_same(fastcl.siglip_loss(*inputs), criterion(*inputs), inputs)


def test_info_nce_pytorch_with_negatives_of_each_query(views) -> None:
    criterion = peer("info_nce").InfoNCE(temperature=0.3, negative_mode="paired")
    negatives = torch.randn(24, 5, 10, requires_grad=True)
    assert_same(fastcl.info_nce(*views, 0.3, negatives=negatives), criterion(*views, negatives), (*views, negatives))


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


@pytest.mark.parametrize("bias", [-10.0, 0.5])
def test_siglip_is_open_clips(views, bias: float) -> None:
    criterion = peer("open_clip.loss").SigLipLoss()
    images, texts = (torch.nn.functional.normalize(x.detach(), dim=1).requires_grad_() for x in views)
    scale, bias = torch.tensor(12.0, requires_grad=True), torch.tensor(bias, requires_grad=True)
    inputs = (images, texts, scale, bias)
    assert_same(fastcl.siglip_loss(*inputs), criterion(*inputs), inputs)
    ours = fastcl.nn.SigLipLoss()(images, texts, logit_scale=scale, logit_bias=bias, output_dict=True)
    theirs = criterion(images, texts, logit_scale=scale, logit_bias=bias, output_dict=True)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs)


@pytest.fixture
def labelled(views) -> tuple[torch.Tensor, torch.Tensor]:
    """Five classes of uneven sizes that overlap; one row is alone in its class."""
    z = torch.cat(views).detach()
    labels = (torch.arange(len(z)) * 5 // 3) % 5
    labels[-1] = 9
    return (z + 2 * torch.randn(10, 10, generator=torch.Generator().manual_seed(3))[labels]).requires_grad_(), labels


COSINE = pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])


def _distance(cosine: bool) -> object:
    distances = peer("pytorch_metric_learning.distances")
    return distances.CosineSimilarity() if cosine else distances.LpDistance()


@COSINE
@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.3, 0.9)])
def test_contrastive_is_that_of_pytorch_metric_learning(labelled, cosine: bool, margins: tuple[float, float]) -> None:
    z, labels = labelled
    theirs = [1 - margin for margin in margins] if cosine else margins
    criterion = peer("pytorch_metric_learning.losses").ContrastiveLoss(*theirs, distance=_distance(cosine))
    ours = fastcl.nn.ContrastiveLoss(*margins, distance="cosine" if cosine else "euclidean")
    assert_same(ours(z, labels), criterion(z, labels), [z])


@COSINE
@pytest.mark.parametrize("mining", ["all", "semihard", "hard", "smooth", "hard-swap", "smooth-swap"])
def test_triplets_are_those_of_pytorch_metric_learning(labelled, cosine: bool, mining: str) -> None:
    z, labels = labelled
    losses, miners = peer("pytorch_metric_learning.losses"), peer("pytorch_metric_learning.miners")
    mining, _, swap = mining.partition("-")
    smooth = mining == "smooth"
    criterion = losses.TripletMarginLoss(0.2, bool(swap), smooth, distance=_distance(cosine))
    miner = {
        "all": None,
        "semihard": miners.TripletMarginMiner(0.2, "semihard", distance=_distance(cosine)),
        "hard": miners.BatchHardMiner(distance=_distance(cosine)),
    }["hard" if smooth else mining]
    theirs = criterion(z, labels, None if miner is None else miner(z, labels))
    options = {"mining": "hard" if smooth else mining, "distance": "cosine" if cosine else "euclidean"}
    ours = fastcl.nn.TripletMarginLoss(0.2, bool(swap), smooth, **options)
    assert theirs > 0
    if swap:
        assert not torch.isclose(ours(z, labels), fastcl.nn.TripletMarginLoss(0.2, False, smooth, **options)(z, labels))
    assert_same(ours(z, labels), theirs, [z])


@COSINE
@pytest.mark.parametrize("margins", [(1.0, 0.0), (0.4, 0.2)])
def test_lifted_structure_is_that_of_pytorch_metric_learning(labelled, cosine: bool, margins) -> None:
    z, labels = labelled
    theirs = [1 - margin for margin in margins] if cosine else margins
    criterion = peer("pytorch_metric_learning.losses").LiftedStructureLoss(*theirs, distance=_distance(cosine))
    ours = fastcl.nn.LiftedStructureLoss(*margins, distance="cosine" if cosine else "euclidean")
    assert_same(ours(z, labels), criterion(z, labels), [z])


def test_distances_of_rows_that_are_not_normalized(labelled) -> None:
    z, labels = labelled
    losses = peer("pytorch_metric_learning.losses")
    distance = peer("pytorch_metric_learning.distances").LpDistance(normalize_embeddings=False)
    for theirs, ours, margins in (
        (losses.ContrastiveLoss, fastcl.contrastive_loss, (1.0, 7.0)),
        (losses.TripletMarginLoss, fastcl.triplet_loss, (2.0,)),
        (losses.LiftedStructureLoss, fastcl.lifted_structure_loss, (1.0, 0.0)),
    ):
        assert_same(ours(z, labels, *margins, normalize=False), theirs(*margins, distance=distance)(z, labels), [z])
