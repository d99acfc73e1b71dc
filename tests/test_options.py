"""What options mean at their edges: weights, rows without positives or negatives, statistics of several positives."""

from __future__ import annotations

import pytest
import torch

import fastcl
from tests.cases import make_features, refusal, require
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


def test_statistics_of_siglip() -> None:
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    loss, stats = fastcl.siglip_loss(x, y, 3.0, -1.0, normalize=True, return_stats=True)
    assert loss.requires_grad
    _, expected = fastcl.clip_loss(x, y, 3.0, normalize=True, return_stats=True)
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
