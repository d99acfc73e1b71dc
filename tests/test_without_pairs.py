"""The losses without pairs: the packages that define them, formulas in float64, two ranks, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import fastcl
from tests.test_oracles import assert_same, peer


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def pair(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, dim, dtype=dtype)
    return x.clone().requires_grad_(), (x + 0.7 * torch.randn(rows, dim, dtype=dtype)).requires_grad_()


def test_negative_cosine_similarity_is_lightlys() -> None:
    views = pair(23, 9)
    theirs = peer("lightly.loss").NegativeCosineSimilarity()(*views)
    assert torch.equal(fastcl.nn.NegativeCosineSimilarity()(*views), fastcl.negative_cosine_similarity(*views))
    assert_same(fastcl.negative_cosine_similarity(*views), theirs, views)


@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("queue", [0, 31])
@pytest.mark.parametrize("iterations", [1, 3])
def test_swav_is_lightlys(low: int, queue: int, iterations: int) -> None:
    # lightly takes exponentials of the scores as they are, so these are cosines, as SwAV's are.
    views = [F.normalize(torch.randn(17, 11), dim=1).requires_grad_() for _ in range(2 + low)]
    queues = [F.normalize(torch.randn(queue, 11), dim=1) for _ in range(2)] if queue else None
    theirs = peer("lightly.loss").SwaVLoss(0.2, iterations, 0.07)(views[:2], views[2:], queues)[0]
    ours = fastcl.swav_loss(
        views[:2], views[2:], queues, tau=0.2, sinkhorn_iterations=iterations, sinkhorn_epsilon=0.07
    )
    assert torch.equal(fastcl.nn.SwaVLoss(0.2, iterations, 0.07)(views[:2], views[2:], queues), ours)
    assert_same(ours, theirs, views)


def test_barlow_twins_is_lightlys() -> None:
    views = pair(19, 6)
    theirs = peer("lightly.loss").BarlowTwinsLoss(0.02)(*views)
    ours = fastcl.barlow_twins_loss(*views, lambda_param=0.02)
    assert torch.equal(fastcl.nn.BarlowTwinsLoss(0.02)(*views), ours)
    assert_same(ours, theirs, views)


class _Embeddings(torch.nn.Module):
    """Stands for a model whose texts are their embeddings."""

    device = torch.device("cpu")

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["input_ids"]}


@pytest.mark.parametrize(
    "concatenated", [(True, True, False), (True, False, False), (False, True, True), (True, True, True)]
)
def test_softmax_loss_is_that_of_sentence_transformers(concatenated: tuple[bool, bool, bool]) -> None:
    losses = peer("sentence_transformers.sentence_transformer.losses")
    u, v, labels = *pair(13, 5), torch.randint(4, (13,))
    theirs = losses.SoftmaxLoss(_Embeddings(), 5, 4, *concatenated)
    ours = fastcl.nn.SoftmaxLoss(5, 4, *concatenated)
    ours.load_state_dict({k: x for k, x in theirs.state_dict().items() if k.startswith("classifier")})
    assert_same(ours(u, v, labels), theirs([{"input_ids": u}, {"input_ids": v}], labels), (u, v))


def test_cosine_similarity_loss_is_that_of_sentence_transformers() -> None:
    losses = peer("sentence_transformers.sentence_transformer.losses")
    u, v, scores = *pair(13, 5), torch.rand(13)
    theirs = losses.CosineSimilarityLoss(_Embeddings())([{"input_ids": u}, {"input_ids": v}], scores)
    assert_same(fastcl.nn.CosineSimilarityLoss()(u, v, scores), theirs, (u, v))


@pytest.mark.parametrize("concatenated", [(True, True, False), (False, True, True), (True, True, True)])
def test_classification_by_its_formula(concatenated: tuple[bool, bool, bool]) -> None:
    u, v, labels = *pair(7, 3, torch.float64), torch.randint(4, (7,))
    features = torch.cat([x for x, use in zip(((u, v), ((u - v).abs(),), (u * v,)), concatenated, strict=True) if use
                          for x in x], dim=1)  # fmt: skip
    weight, bias = draw(4, features.shape[1], dtype=torch.float64), draw(4, dtype=torch.float64)
    logits = features @ weight.T + bias
    expected = logits.logsumexp(dim=1) - logits[torch.arange(7), labels]
    names = [f"concatenation_sent_{name}" for name in ("rep", "difference", "multiplication")]
    options = dict(zip(names, concatenated, strict=True))
    rows = fastcl.softmax_classification_loss(u, v, labels, weight, bias, **options, reduction="none")
    torch.testing.assert_close(rows, expected)
    for reduced, exact in (("mean", expected.mean()), ("sum", expected.sum())):
        found = fastcl.softmax_classification_loss(u, v, labels, weight, bias, **options, reduction=reduced)
        torch.testing.assert_close(found, exact)


def test_regression_by_its_formula() -> None:
    u, v, scores = *pair(7, 3, torch.float64), torch.rand(7, dtype=torch.float64)
    cosine = (u * v).sum(dim=1) / u.norm(dim=1) / v.norm(dim=1)
    expected = (cosine - scores) ** 2
    torch.testing.assert_close(fastcl.cosine_similarity_loss(u, v, scores, reduction="none"), expected)
    torch.testing.assert_close(fastcl.cosine_similarity_loss(u, v, scores), expected.mean())
    torch.testing.assert_close(fastcl.cosine_similarity_loss(u, v, scores, reduction="sum"), expected.sum())
    torch.testing.assert_close(fastcl.negative_cosine_similarity(u, v, reduction="none"), -cosine)


def test_gradcheck() -> None:
    views = pair(6, 3, torch.float64)
    weight, labels, scores = draw(4, 9, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2, 0]), torch.rand(6).double()
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(fastcl.negative_cosine_similarity, views)
    assert check(fastcl.barlow_twins_loss, views)
    assert check(lambda u, v, w: fastcl.softmax_classification_loss(u, v, labels, w), (*views, weight))
    assert check(lambda u, v: fastcl.cosine_similarity_loss(u, v, scores), views)
    # The assignments are targets: nothing flows through them. One view is assigned and the other one predicts.
    assigned, predicting = views[0].detach(), views[1]
    assert check(lambda x, t: fastcl.swav_loss([assigned], [x], tau=t), (predicting, tau))


def test_sinkhorn_spreads_the_batch_over_the_prototypes() -> None:
    scores = torch.randn(40, 5, dtype=torch.float64) + torch.tensor([3.0, 0, 0, 0, 0], dtype=torch.float64)
    q = fastcl.sinkhorn(scores, epsilon=0.5, iterations=200)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((5,), 8.0, dtype=torch.float64))
    # Scaling rows and columns keeps the odds ratios of the scores.
    ratios = q.log() - scores / 0.5
    torch.testing.assert_close(ratios - ratios[:1] - ratios[:, :1] + ratios[0, 0], torch.zeros_like(q))
    huge = fastcl.sinkhorn(1e4 * torch.randn(40, 5), epsilon=0.05)
    assert torch.isfinite(huge).all()


def test_half_precision_inputs_are_computed_in_float32() -> None:
    views = [x.detach().bfloat16() for x in pair(32, 8)]
    wide = [x.float() for x in views]
    for loss in (
        fastcl.negative_cosine_similarity,
        fastcl.barlow_twins_loss,
        lambda x, y: fastcl.swav_loss([x, y], tau=0.1),
        lambda x, y: fastcl.cosine_similarity_loss(x, y, torch.zeros(32)),
    ):
        assert loss(*views).dtype == torch.float32
        torch.testing.assert_close(loss(*views), loss(*wide))


def test_a_constant_feature_correlates_with_nothing() -> None:
    x, y = pair(8, 3)
    constant = torch.cat((x[:, :2], torch.ones(8, 1)), dim=1).detach().requires_grad_()
    fastcl.barlow_twins_loss(constant, y).backward()
    assert torch.isfinite(constant.grad).all()


def _losses(x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    return [
        fastcl.barlow_twins_loss(x, y, lambda_param=0.1, group=group),
        fastcl.swav_loss([x, y], [x - y], tau=0.3, sinkhorn_epsilon=0.5, group=group),
    ]


def check_two_ranks(rank: int, lengths: list[int]) -> None:
    whole = pair(sum(lengths), 4, torch.float64)
    own = [x.detach().split(lengths)[rank].clone().requires_grad_() for x in whole]
    for ours, expected in zip(_losses(*own, dist.group.WORLD), _losses(*whole, None), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        found, exact = torch.autograd.grad(ours, own), torch.autograd.grad(expected, whole)
        for x, y in zip(found, exact, strict=True):
            torch.testing.assert_close(x / len(lengths), y.split(lengths)[rank], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [[5, 5], [7, 2], [0, 6]], ids=str)
def test_two_ranks_make_one_batch(worlds, lengths: list[int]) -> None:
    worlds(2).run(check_two_ranks, lengths)


X, Y = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
LABELS, WEIGHT = torch.tensor([0, 1, 2, 0, 1, 2]), torch.zeros(3, 12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastcl.negative_cosine_similarity(X, Y[:3]), ValueError, r"p and z must have the same shape"),
        (lambda: fastcl.negative_cosine_similarity(X, Y, reduction="max"), ValueError, r"reduction .* got 'max'"),
        (lambda: fastcl.barlow_twins_loss(X[:1], Y[:1]), ValueError, r"at least 2 rows to vary, got shape \(1, 4\)"),
        (lambda: fastcl.barlow_twins_loss(X, Y, lambda_param="1"), TypeError, r"lambda_param must be a float"),
        (lambda: fastcl.barlow_twins_loss(X, Y, group=1), TypeError, r"group must be None or a torch.distributed"),
        (lambda: fastcl.swav_loss([X], tau=0.1), ValueError, r"at least 2 views, .* got 1 and 0"),
        (lambda: fastcl.swav_loss([], [X, Y], tau=0.1), ValueError, r"one of them of high resolution, got 0 and 2"),
        (lambda: fastcl.swav_loss([X, Y], tau=0.0), ValueError, r"tau must be positive, got 0.0"),
        (lambda: fastcl.swav_loss([X, Y], [X[:5]], tau=1.0), ValueError, r"low_resolution_outputs\[0\] and high_reso"),
        (lambda: fastcl.swav_loss([X, Y], (), [X], tau=1.0), ValueError, r"one for each of 2 high-.*, got 1"),
        (
            lambda: fastcl.swav_loss([X, Y], (), [X, X[:, :2]], tau=1.0),
            ValueError,
            r"queue_outputs\[1\] and high_.* dim",
        ),
        (lambda: fastcl.sinkhorn(X, iterations=0), ValueError, r"iterations must be an integer of at least 1, got 0"),
        (lambda: fastcl.sinkhorn(X, epsilon=-1.0), ValueError, r"epsilon must be positive, got -1.0"),
        (lambda: fastcl.sinkhorn(X[0]), ValueError, r"scores must have 2 dimensions"),
        (
            lambda: fastcl.softmax_classification_loss(X, Y, LABELS, WEIGHT[:, :8]),
            ValueError,
            r"weight must have shape \[classes, 12\], 3 vectors of 4, got \(3, 8\)",
        ),
        (
            lambda: fastcl.softmax_classification_loss(X, Y, LABELS + 1, WEIGHT),
            ValueError,
            r"labels must hold indices below 3, got 3",
        ),
        (lambda: fastcl.softmax_classification_loss(X, Y, LABELS, WEIGHT.double()), ValueError, r"got torch.float64"),
        (lambda: fastcl.softmax_classification_loss(X, Y, LABELS, WEIGHT, X[0]), ValueError, r"shape \(3,\), .*\(4,\)"),
        (
            lambda: fastcl.softmax_classification_loss(
                X, Y, LABELS, WEIGHT, concatenation_sent_rep=False, concatenation_sent_difference=False
            ),
            ValueError,
            r"must not all be false",
        ),
        (lambda: fastcl.cosine_similarity_loss(X, Y, LABELS), TypeError, r"floating-point tensor, got torch.int64"),
        (lambda: fastcl.cosine_similarity_loss(X, Y, X[:, :1]), ValueError, r"shape \(6,\) .* got \(6, 1\)"),
    ],
)
def test_bad_input_names_the_argument_its_value_and_what_was_expected(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_collapsed_or_perfect_prediction() -> None:
    x = X.clone()
    assert fastcl.negative_cosine_similarity(x, 3 * x).item() == pytest.approx(-1)
    assert fastcl.negative_cosine_similarity(x, torch.zeros_like(x)).item() == 0
    uniform = torch.zeros(6, 5)
    assert fastcl.swav_loss([uniform, uniform], tau=0.1).item() == pytest.approx(math.log(5))
