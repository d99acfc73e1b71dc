"""What options mean at their edges: weights, rows without positives or negatives, statistics of several positives."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.backends.term_codes import term_codes
from fastcl.losses.clip import reference as clip_reference
from fastcl.losses.info_nce import reference as info_nce_reference
from fastcl.losses.multiple_negatives import DIRECTIONS as EVERY_DIRECTION
from fastcl.losses.nt_xent import reference as nt_xent_reference
from fastcl.losses.sup_con import reference as sup_con_reference
from fastcl.terms import wants_tf32
from tests.cases import available_backends, make_features, refusal, require
from tests.losses import LOSSES, Loss

X, Y = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(2)).unbind()
BACKENDS = pytest.mark.parametrize("backend", ["dense", "tiled", "cpu"])
LABELLED = next(loss for loss in LOSSES if loss.name == "sup_con_out")


def skip_refusal(loss: Loss, backend: str) -> None:
    if reason := refusal(loss, backend):
        pytest.skip(reason)


WEIGHTED = {
    "nt_xent": lambda w, **o: fastcl.nt_xent(X, Y, 0.2, weight=w, **o),
    "info_nce": lambda w, **o: fastcl.info_nce(X, Y, 0.2, weight=w, **o),
    "info_nce_target": lambda w, **o: fastcl.info_nce(X, Y, 0.2, target=torch.arange(12) - 1, weight=w, **o),
    "info_nce_own_negatives": lambda w, **o: fastcl.info_nce(X, Y, 0.2, negatives=Y[:, None], weight=w, **o),
    "clip": lambda w, **o: fastcl.clip_loss(X, Y, 3.0, weight=w, **o),
    "siglip": lambda w, **o: fastcl.siglip_loss(X, Y, 3.0, -2.0, weight=w, **o),
    "sup_con": lambda w, **o: fastcl.sup_con_loss(X, torch.arange(12) % 5, 0.2, weight=w, **o),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_are_factors_and_the_mean_is_over_rows(name: str) -> None:
    weight = torch.rand(12).index_fill(0, torch.tensor([3]), 0.0)
    plain = WEIGHTED[name](None, reduction="none")
    rows = weight.repeat(len(plain) // 12) * plain
    torch.testing.assert_close(WEIGHTED[name](weight, reduction="none"), rows)
    torch.testing.assert_close(WEIGHTED[name](weight, reduction="sum"), rows.sum())
    torch.testing.assert_close(WEIGHTED[name](weight, reduction="mean"), rows.mean())
    constant = WEIGHTED[name](weight.clone().requires_grad_(), reduction="mean")
    assert not constant.requires_grad


SMOOTHED = {
    "nt_xent-ids": (
        lambda x, y, tags, **o: fastcl.nt_xent(x, y, 0.3, ids=tags, **o),
        lambda x, y, tags, **o: nt_xent_reference(x, y, 0.3, ids=tags, **o),
    ),
    "nt_xent-labels-ids": (
        lambda x, y, tags, **o: fastcl.nt_xent(x, y, 0.3, labels=tags, ids=tags // 2, **o),
        lambda x, y, tags, **o: sup_con_reference(
            torch.cat((x, y)), tags.repeat(2), 0.3, ids=(tags // 2).repeat(2), **o
        ),
    ),
    "sup_con-without-positives": (
        lambda x, y, tags, **o: fastcl.sup_con_loss(x + y, tags + torch.arange(12).clamp_max(5), 0.3, **o),
        lambda x, y, tags, **o: sup_con_reference(x + y, tags + torch.arange(12).clamp_max(5), 0.3, **o),
    ),
    "info_nce-ids-of-other-queries": (
        lambda x, y, tags, **o: fastcl.info_nce(x, y, 0.3, ids=(tags, tags.flip(0)), **o),
        lambda x, y, tags, **o: info_nce_reference(x, y, 0.3, ids=(tags, tags.flip(0)), **o),
    ),
    "info_nce-negatives-ids": (
        lambda x, y, tags, **o: fastcl.info_nce(x, y, 0.3, negatives=y[:5], ids=(tags, tags[:5]), **o),
        lambda x, y, tags, **o: info_nce_reference(x, y, 0.3, negatives=y[:5], ids=(tags, tags[:5]), **o),
    ),
    "info_nce-own-negatives": (
        lambda x, y, tags, **o: fastcl.info_nce(x, y, 0.3, negatives=y[:, None] + x[None, :4], **o),
        lambda x, y, tags, **o: info_nce_reference(x, y, 0.3, negatives=y[:, None] + x[None, :4], **o),
    ),
    "clip-ids": (
        lambda x, y, tags, **o: fastcl.clip_loss(x, y, 3.0, ids=tags, **o),
        lambda x, y, tags, **o: clip_reference(x, y, 3.0, ids=tags, **o),
    ),
}


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_is_spread_over_the_candidates_that_are_left(name: str) -> None:
    """As cross entropy with a target that is 1 - 0.2 at the positives, evenly, and 0.2 over everything admitted."""
    call, reference = SMOOTHED[name]
    inputs = [t.double().requires_grad_() for t in (X, Y)]
    for tags in (torch.tensor([0, 1, 5, 5, 3, 2, 1, 1, 8, 9, 5, 3]), torch.zeros(12, dtype=torch.int64)):
        options = {"label_smoothing": 0.2}
        expected = reference(*inputs, tags, **options)
        weights = torch.rand_like(expected)
        exact = torch.autograd.grad((weights * expected).sum(), inputs)
        found = call(*inputs, tags, reduction="none", **options)
        torch.testing.assert_close(found, expected)
        for x, y in zip(torch.autograd.grad((weights * found).sum(), inputs), exact, strict=True):
            torch.testing.assert_close(x, y)
        torch.testing.assert_close(call(*inputs, tags, **options), expected.mean())


def test_modules_pass_the_options_on() -> None:
    ids, weight = torch.arange(12) // 2, torch.rand(12)
    options = {"ids": ids, "weight": weight}
    smoothing = {"label_smoothing": 0.2}
    unit = {"normalize": True}
    for found, expected in (
        (fastcl.nn.NTXentLoss(0.3, **smoothing)(X, Y, **options), fastcl.nt_xent(X, Y, 0.3, **options, **smoothing)),
        (fastcl.nn.InfoNCELoss(0.3, **smoothing)(X, Y, **options), fastcl.info_nce(X, Y, 0.3, **options, **smoothing)),
        (
            fastcl.nn.InfoNCELoss(0.3, false_negative_margin=0.1)(X, Y),
            fastcl.info_nce(X, Y, 0.3, false_negative_margin=0.1),
        ),
        (
            fastcl.nn.SupConLoss(0.3, **smoothing)(X, ids, weight=weight),
            fastcl.sup_con_loss(X, ids, 0.3, weight=weight, **smoothing),
        ),
        (
            fastcl.nn.ClipLoss(**unit, **smoothing)(X, Y, 3.0, labels=ids, weight=weight),
            fastcl.clip_loss(X, Y, 3.0, labels=ids, weight=weight, **unit, **smoothing),
        ),
        (
            fastcl.nn.InfoNCELoss(0.3, label_width=1)(X, Y, labels=ids),
            fastcl.info_nce(X, Y, 0.3, labels=ids, label_width=1),
        ),
        (
            fastcl.nn.SupConLoss(0.3, label_width=1)(X, ids),
            fastcl.sup_con_loss(X, ids, 0.3, label_width=1),
        ),
        (
            fastcl.nn.AlphaCLLoss(0.3, backend="dense")(X, Y),
            fastcl.alpha_cl_loss(X, Y, 0.3),
        ),
        (
            fastcl.nn.SigLipLoss()(X, Y, 3.0, -2.0, **options),
            fastcl.siglip_loss(X, Y, 3.0, -2.0, **options),
        ),
        (
            fastcl.nn.DistillClipLoss(backend="dense", **unit)(X, Y, 3.0, Y, X, 2.0, **options)[1],
            fastcl.clip_distillation_loss(X, Y, 3.0, Y, X, 2.0, **options, **unit),
        ),
        (
            fastcl.nn.MultipleNegativesRankingLoss(4.0)(X, Y, (X + Y,), **options),
            fastcl.multiple_negatives_ranking_loss(X, Y, 0.25, negatives=(X + Y,), **options),
        ),
    ):
        torch.testing.assert_close(found, expected)
        assert found != 0


def test_a_target_that_is_spread_out() -> None:
    """The meaning itself: the cross entropy with such a target, written with its probabilities."""
    labels, ids = torch.arange(12) // 4, torch.arange(12) // 2
    x, y = (torch.nn.functional.normalize(t.double(), dim=1) for t in (X, Y))
    positive = labels[:, None] == labels
    candidate = positive | (ids[:, None] != ids)
    target = 0.7 * positive / positive.sum(dim=1, keepdim=True) + 0.3 * candidate / candidate.sum(dim=1, keepdim=True)
    logits = (x @ y.T / 0.3).masked_fill(~candidate, -1e9)
    expected = torch.nn.functional.cross_entropy(logits, target)
    found = fastcl.info_nce(x, y, 0.3, labels=labels, ids=ids, label_smoothing=0.3)
    torch.testing.assert_close(found, expected)


@BACKENDS
@pytest.mark.parametrize("form", ["out", "in"])
def test_rows_without_positives_or_negatives(form: str, backend: str) -> None:
    skip_refusal(LABELLED, backend)
    for labels, zero in (
        (torch.arange(12), torch.ones(12, dtype=torch.bool)),  # nobody has a positive
        (torch.arange(12).clamp(min=3), torch.arange(12) > 3),  # some have one
        (torch.zeros(12, dtype=torch.int64), None),  # nobody has a negative
    ):
        z = X.clone().requires_grad_()
        rows = fastcl.sup_con_loss(z, labels, 0.1, form=form, reduction="none", backend=backend)
        rows.sum().backward()
        assert torch.isfinite(rows).all()
        assert torch.isfinite(z.grad).all()
        if zero is not None:
            assert (rows[zero] == 0).all()
            assert (rows[~zero] > 0).all()
    alone = fastcl.info_nce(X, Y, 0.1, labels=(torch.arange(12), torch.arange(12) + 100), backend=backend)
    assert alone == 0


@BACKENDS
def test_everything_an_id_forbids_leaves_no_negative(backend: str) -> None:
    require(next(loss for loss in LOSSES if loss.name == "nt_xent_ids"), backend)
    z1, z2 = X.clone().requires_grad_(), Y.clone().requires_grad_()
    loss = fastcl.nt_xent(z1, z2, 0.1, ids=torch.zeros(12, dtype=torch.int64), backend=backend)
    loss.backward()
    assert loss == 0
    assert z1.grad.abs().max() == 0


@BACKENDS
def test_statistics_of_several_positives(backend: str) -> None:
    skip_refusal(LABELLED, backend)
    labels = torch.arange(12) // 4
    _, stats = fastcl.sup_con_loss(X, labels, 0.2, return_stats=True, backend=backend)
    z = torch.nn.functional.normalize(X, dim=1)
    s, itself = z @ z.T, torch.eye(12, dtype=torch.bool)
    same = (labels[:, None] == labels) & ~itself
    nearest = s.masked_fill(itself, -2.0).argmax(dim=1)
    torch.testing.assert_close(stats.accuracy, (labels[nearest] == labels).float().mean())
    torch.testing.assert_close(stats.positive_similarity, s[same].mean())
    torch.testing.assert_close(stats.hardest_negative, s[~same & ~itself].max())
    _, of_clip = fastcl.clip_loss(X, Y, 2.0, labels=labels, normalize=True, return_stats=True, backend=backend)
    s = z @ torch.nn.functional.normalize(Y, dim=1).T
    same = labels[:, None] == labels
    torch.testing.assert_close(of_clip.positive_similarity, s[same].mean())
    both = [(labels[t.argmax(dim=1)] == labels).float().mean() for t in (s, s.T)]
    torch.testing.assert_close(of_clip.accuracy, sum(both) / 2)


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(fastcl.siglip_loss, logit_scale=4.0, logit_bias=-1.0),
        functools.partial(fastcl.binary_nce_loss, tau=0.25),
    ],
    ids=["siglip", "binary_nce"],
)
def test_statistics_of_yes_or_no_questions(loss: Callable[..., tuple[Tensor, fastcl.LossStats]]) -> None:
    ids = torch.arange(12) % 7
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    value, stats = loss(x, y, ids=ids, normalize=True, return_stats=True)
    assert value.requires_grad
    _, expected = fastcl.clip_loss(x, y, 4.0, ids=ids, normalize=True, return_stats=True)
    torch.testing.assert_close(stats, expected)


def test_statistics_of_distillation_are_the_students() -> None:
    ids = torch.arange(12) % 7
    options = {"ids": ids, "normalize": True, "return_stats": True}
    loss, stats = fastcl.clip_distillation_loss(X, Y, 3.0, Y, X, 2.0, **options)
    torch.testing.assert_close(
        loss, fastcl.clip_distillation_loss(X, Y, 3.0, Y, X, 2.0, ids=ids, normalize=True), rtol=0, atol=0
    )
    torch.testing.assert_close(stats, fastcl.clip_loss(X, Y, 3.0, **options)[1])


def expected_stats(similarity: Tensor, positive: Tensor, negative: Tensor, scale: float) -> fastcl.LossStats:
    """By the dense matrix: the mean is over rows with a positive."""
    rows = positive.any(dim=1)
    best, hardest = (similarity.masked_fill(~mask, -math.inf).amax(dim=1) for mask in (positive, negative))
    mean = (similarity * positive).sum(dim=1)[rows] / positive.sum(dim=1)[rows]
    return fastcl.LossStats((best > hardest)[rows].float().mean(), mean.mean(), hardest.max(), torch.tensor(scale))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalize", [True, False])
def test_statistics_of_labelled_rows(distance: str, normalize: bool) -> None:
    labels, ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 0, 0]), torch.arange(12) // 3
    z = (X + 0.5 * Y[labels]).requires_grad_()
    rows = torch.nn.functional.normalize(z, dim=1) if normalize else z
    similarity = 1 - torch.cdist(rows, rows).square() / 2 if distance == "euclidean" else rows @ rows.T
    same = labels[:, None] == labels
    negative = ~same & (ids[:, None] != ids)
    expected = expected_stats(similarity.detach(), same & ~torch.eye(12, dtype=torch.bool), negative, 1.0)
    assert 0 < expected.accuracy < 1
    for loss in (fastcl.contrastive_loss, fastcl.triplet_loss, fastcl.lifted_structure_loss):
        options = {"distance": distance, "normalize": normalize, "ids": ids}
        value, stats = loss(z, labels, return_stats=True, **options)
        assert torch.equal(value, loss(z, labels, **options))
        torch.testing.assert_close(stats, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_statistics_of_pairs(normalize: bool) -> None:
    """Of the losses whose statistics come from a sweep of their own."""
    z1, z2, ids = X.clone().requires_grad_(), X + Y, torch.arange(12) // 2
    unit = [torch.nn.functional.normalize(x, dim=1) if normalize else x for x in (z1.detach(), z2)]
    itself = torch.eye(12, dtype=torch.bool)
    negative = ids[:, None] != ids
    options = {"ids": ids, "normalize": normalize, "return_stats": True}
    loss, stats = fastcl.spectral_contrastive_loss(z1, z2, **options)
    assert loss.requires_grad
    torch.testing.assert_close(stats, expected_stats(unit[0] @ unit[1].T, itself, negative, 1.0))
    loss, stats = fastcl.alpha_cl_loss(z1, z2, 0.5, **options)
    assert loss.requires_grad
    both = torch.cat(unit)
    similarity = 1 - torch.cdist(both, both).square() / 2
    other_view = itself.repeat(2, 2) & ~torch.eye(24, dtype=torch.bool)
    expected = expected_stats(similarity, other_view, negative.repeat(2, 2), 2.0)
    torch.testing.assert_close(stats, expected)


def test_collapsed_features_retrieve_nothing() -> None:
    z = torch.ones(9, 4)
    for loss in (fastcl.nt_xent, fastcl.alpha_cl_loss):
        assert loss(z, z, 0.5, return_stats=True)[1].accuracy == 0
    assert fastcl.triplet_loss(z, torch.arange(9) // 3, return_stats=True)[1].accuracy == 0


@BACKENDS
@pytest.mark.parametrize("hardness", [0.0, 3.0])
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "doc_to_query"), EVERY_DIRECTION])
def test_statistics_of_ranking(directions: tuple[str, ...], hardness: float, backend: str) -> None:
    query, document, negative = X.clone().requires_grad_(), X + Y, Y.flip(0)
    options = {"directions": directions, "return_stats": True, "backend": backend}
    if hardness:
        options |= {"hardness_mode": "all_negatives", "hardness_strength": hardness}
    q, d, n = (torch.nn.functional.normalize(x.detach(), dim=1) for x in (query, document, negative))
    own, nothing = torch.eye(12, dtype=torch.bool), torch.full((12, 12), -math.inf)
    candidates = {
        "query_to_doc": ((q @ d.T).where(~own, nothing), q @ n.T),
        "doc_to_query": ((d @ q.T).where(~own, nothing),),
        "query_to_query": ((q @ q.T).where(~own, nothing),),
        "doc_to_doc": ((d @ d.T).where(~own, nothing), (d @ n.T).where(~own, nothing)),
    }
    positive = (q * d).sum(dim=1)
    hardest = torch.cat([x for name in directions for x in candidates[name]], dim=1).amax(dim=1)
    for tau in (0.2, torch.tensor(0.2, requires_grad=True)):
        _, stats = fastcl.multiple_negatives_ranking_loss(query, document, tau, negatives=[negative], **options)
        torch.testing.assert_close(stats.accuracy, (positive > hardest).float().mean())
        torch.testing.assert_close(stats.positive_similarity, positive.mean())
        torch.testing.assert_close(stats.hardest_negative, hardest.max())
        torch.testing.assert_close(stats.scale, torch.tensor(5.0))
    if len(directions) == 2 and not hardness:
        options["partition_mode"] = "per_direction"
        _, stats = fastcl.multiple_negatives_ranking_loss(query, document, 0.2, **options)
        _, expected = fastcl.clip_loss(query, document, 5.0, normalize=True, return_stats=True)
        torch.testing.assert_close(stats, expected)


def test_neighbours_in_time_are_positives() -> None:
    """Two sequences: frames at most two apart are positives, frames of the other sequence never."""
    time = torch.cat((torch.arange(6), torch.arange(6) + 1000))
    rows = fastcl.sup_con_loss(X, time, 0.2, label_width=2, reduction="none")
    z = torch.nn.functional.normalize(X.double(), dim=1)
    s = (z @ z.T / 0.2).fill_diagonal_(float("-inf"))
    near = ((time[:, None] - time).abs() <= 2).fill_diagonal_(False)
    assert near.sum(dim=1).tolist() == [2, 3, 4, 4, 3, 2] * 2
    expected = -s.log_softmax(dim=1).where(near, 0.0).sum(dim=1) / near.sum(dim=1)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_temperature_for_each_query_has_a_gradient() -> None:
    tau = torch.linspace(0.1, 0.5, 12, requires_grad=True)
    rows = fastcl.info_nce(X, Y, tau, reduction="none")
    for i in (0, 7):
        torch.testing.assert_close(rows[i], fastcl.info_nce(X, Y, tau[i].item(), reduction="none")[i])
    one = torch.tensor(0.3, requires_grad=True)
    fastcl.info_nce(X, Y, one).backward()
    each = torch.full((12,), 0.3, requires_grad=True)
    fastcl.info_nce(X, Y, each).backward()
    torch.testing.assert_close(each.grad.sum(), one.grad, rtol=1e-4, atol=1e-6)


def test_half_precision_labels_stay_finite() -> None:
    for loss in (LABELLED,):
        features = make_features(loss, 64, 16, torch.float16)
        value = loss.call(features, 0.01, reduction="mean")
        value.backward()
        assert torch.isfinite(features[0].grad).all()


@pytest.mark.parametrize("backend", available_backends())
def test_strided_vectors(backend: str) -> None:
    """A target, tags and weights that are a column of something."""
    columns = torch.stack((torch.arange(12).roll(5), torch.arange(12) // 2), dim=1)
    weight = torch.rand(12, 3, generator=torch.Generator().manual_seed(3))[:, 1]
    for given in ({"target": columns[:, 0], "ids": columns[:, 1]}, {"labels": columns[:, 1]}):
        strided = fastcl.info_nce(X, Y, 0.2, weight=weight, backend=backend, **given)
        given = {name: x.contiguous() for name, x in given.items()}
        assert torch.equal(strided, fastcl.info_nce(X, Y, 0.2, weight=weight.contiguous(), backend=backend, **given))


@pytest.mark.parametrize("backend", available_backends())
def test_another_default_device(backend: str) -> None:
    """What a loss makes for itself is on the device of its features."""
    term_codes.cache_clear()
    want = fastcl.nt_xent(X, Y, 0.31, backend=backend)
    term_codes.cache_clear()
    x, labels = X.clone().requires_grad_(), torch.arange(12) % 5
    with torch.device("meta"):
        assert torch.equal(fastcl.nt_xent(x, Y, 0.31, backend=backend), want)
        fastcl.sup_con_loss(x, labels, 0.3, backend=backend).backward()
        fastcl.contrastive_loss(x, labels, backend=backend).backward()
        fastcl.clip_distillation_loss(x, Y, 3.0, Y, X, 2.0, backend=backend).backward()
        fastcl.siglip_loss(x, Y, 3.0, -2.0, ids=labels, backend=backend).backward()


def test_precision_set_for_a_backend() -> None:
    """torch's newer setting, after which the older one can't be read."""
    try:
        assert not wants_tf32()
        torch.set_float32_matmul_precision("high")
        assert wants_tf32()
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert not wants_tf32()
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert wants_tf32()
    finally:
        torch.set_float32_matmul_precision("highest")


TAKE_A_GROUP = [loss for loss in vars(fastcl).values() if "group" in getattr(loss, "__annotations__", ())]


@pytest.mark.parametrize("loss", TAKE_A_GROUP, ids=lambda loss: loss.__name__)
def test_what_is_no_group(loss: Callable[..., object]) -> None:
    given = {
        "tau": 0.3,
        "tau_plus": 0.1,
        "beta": 1.0,
        "logit_scale": 3.0,
        "logit_bias": -2.0,
        "terms": [fastcl.Term(fastcl.Reduce.LSE)],
    }
    given |= {"teacher_logit_scale": 2.0, "labels": torch.arange(12) // 2, "high_resolution_outputs": [X, Y], "k": 2}
    needed = [p.name for p in inspect.signature(loss).parameters.values() if p.default is p.empty]
    with pytest.raises(TypeError, match=r"group must be None or a torch\.distributed\.ProcessGroup"):
        loss(**{name: given.get(name, X) for name in needed}, group="ranks")
