"""What a user meets: bad input, modules, statistics, selection of a backend, imports."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import warnings

import pytest
import torch

import fastcl
from fastcl import engine
from tests.cases import available_backends

X, Y = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastcl.nt_xent(X[0], Y[0], 0.1), ValueError, r"z1 must have 2 dimensions .* got shape \(4,\)"),
        (lambda: fastcl.nt_xent(X, Y[:, :3], 0.1), ValueError, r"z1 and z2 must have the same shape"),
        (lambda: fastcl.nt_xent(X, Y[:3], 0.1), ValueError, r"got \(6, 4\) and \(3, 4\)"),
        (lambda: fastcl.nt_xent(X, Y.double(), 0.1), ValueError, r"same dtype, got torch.float32 and torch.float64"),
        (lambda: fastcl.nt_xent(X, Y.to("meta"), 0.1), ValueError, r"same device, got cpu and meta"),
        (lambda: fastcl.nt_xent(X, Y, 0.0), ValueError, r"tau must be positive, got 0.0"),
        (lambda: fastcl.nt_xent(X, Y, -0.5), ValueError, r"tau must be positive, got -0.5"),
        (lambda: fastcl.nt_xent(X, Y, math.nan), ValueError, r"tau must be positive, got nan"),
        (lambda: fastcl.nt_xent(X, Y, True), TypeError, r"tau must be a float or a 0-d tensor, got bool"),
        (lambda: fastcl.nt_xent(X, Y, "0.1"), TypeError, r"tau must be a float or a 0-d tensor, got str"),
        (lambda: fastcl.nt_xent(X, Y, torch.tensor([0.1])), ValueError, r"got shape \(1,\)"),
        (lambda: fastcl.nt_xent(X, Y, torch.tensor(1)), TypeError, r"0-d floating-point tensor, got torch.int64"),
        (lambda: fastcl.nt_xent(X[:0], Y[:0], 0.1), ValueError, r"at least one row .* got shape \(0, 4\)"),
        (lambda: fastcl.nt_xent(X.long(), Y.long(), 0.1), TypeError, r"z1 must be a floating-point tensor"),
        (lambda: fastcl.nt_xent(X.tolist(), Y, 0.1), TypeError, r"z1 must be a tensor .* got list"),
        (lambda: fastcl.nt_xent(X, Y, 0.1, reduction="avg"), ValueError, r"reduction must be one of .* got 'avg'"),
        (lambda: fastcl.nt_xent(X, Y, 0.1, backend="gpu"), ValueError, r"backend must be one of .* got 'gpu'"),
        (lambda: fastcl.nt_xent(X, Y, 0.1, backend="cuda"), ValueError, r"backend 'cuda' can't compute this call"),
        (
            lambda: fastcl.info_nce(X, Y, Y),
            ValueError,
            r"got shape \(6, 4\), or \[N\], one for each query; negatives are passed by name",
        ),
        (lambda: fastcl.info_nce(X, Y[:4], 0.1), ValueError, r"query and key must have the same shape"),
        (lambda: fastcl.info_nce(X, Y, 0.1, target=torch.arange(5)), ValueError, r"target must have shape \(6,\)"),
        (lambda: fastcl.info_nce(X, Y, 0.1, target=torch.arange(6) + 1), ValueError, r"indices below 6, got 6"),
        (lambda: fastcl.info_nce(X, Y, 0.1, target=X[:, 0]), TypeError, r"target must be an integer tensor"),
        (
            lambda: fastcl.info_nce(X, Y, 0.1, target=torch.arange(6), negatives=Y),
            ValueError,
            r"negatives and target exclude each other, got target of shape \(6,\)",
        ),
        (
            lambda: fastcl.info_nce(X, Y, 0.1, negatives=Y[None]),
            ValueError,
            r"negatives of each query must be \[N, K, D\] with N = 6, got \(1, 6, 4\)",
        ),
        (
            lambda: fastcl.nt_xent(X, Y, 0.1, ids=torch.arange(5)),
            ValueError,
            r"ids must have shape \(6,\), one for each",
        ),
        (
            lambda: fastcl.nt_xent(X, Y, 0.1, labels=X[:, 0]),
            TypeError,
            r"labels must be an integer tensor, got torch.f",
        ),
        (lambda: fastcl.nt_xent(X, Y, 0.1, weight=torch.ones(12)), ValueError, r"weight must have shape \(6,\)"),
        (lambda: fastcl.nt_xent(X, Y, 0.1, label_smoothing=1.0), ValueError, r"label_smoothing must be .* got 1.0"),
        (
            lambda: fastcl.nt_xent(X, Y, 0.1, label_smoothing=0.1, false_negative_margin=0.2),
            ValueError,
            r"label_smoothing must be 0 with a false_negative_margin: .* got 0.1 and 0.2",
        ),
        (
            lambda: fastcl.sup_con_loss(X, torch.arange(6), 0.1, form="in", label_smoothing=0.1),
            ValueError,
            r"label_smoothing must be 0 with form='in', .* got 0.1",
        ),
        (
            lambda: fastcl.nt_xent(X, Y, 0.1, labels=torch.arange(6), false_negative_margin=0.1),
            ValueError,
            r"labels and false_negative_margin exclude each other, got false_negative_margin=0.1",
        ),
        (lambda: fastcl.info_nce(X, Y, torch.ones(5)), ValueError, r"tau must have shape \(6,\)"),
        (
            lambda: fastcl.info_nce(X, Y[:4], 0.1, labels=torch.arange(6)),
            ValueError,
            r"labels must be a pair, .* where their numbers differ as 6 and 4",
        ),
        (
            lambda: fastcl.info_nce(X, Y[:4], 0.1, labels=(torch.arange(6), torch.arange(3))),
            ValueError,
            r"labels of the keys must have shape \(4,\)",
        ),
        (lambda: fastcl.sup_con_loss(X, None, 0.1), ValueError, r"labels must be given unless z holds several views"),
        (lambda: fastcl.sup_con_loss(X, torch.arange(6), 0.1, form="both"), ValueError, r"form must be one of 'out'"),
        (lambda: fastcl.siglip_loss(X, Y, 1.0, X), ValueError, r"logit_bias must be a float or a 0-d tensor"),
        (
            lambda: fastcl.triplet_loss(X, torch.arange(6), backend="triton"),
            ValueError,
            r"backend 'triton' can't compute this call: .* which plain PyTorch computes over panels: backend 'tiled'",
        ),
        (lambda: fastcl.clip_loss(X, Y, 0.0), ValueError, r"logit_scale must be positive, got 0.0"),
        (lambda: fastcl.clip_loss(X, Y, 1.0, X), ValueError, r"logit_bias must be a float or a 0-d tensor"),
        (lambda: fastcl.nn.ClipLoss()(X, Y), ValueError, r"logit_scale must be given"),
        (lambda: fastcl.nn.ClipLoss(0.07)(X, Y, 10.0), ValueError, r"logit_scale must be None"),
        (lambda: fastcl.nn.NTXentLoss(0.0), ValueError, r"temperature must be positive"),
    ],
)
def test_bad_input_names_the_argument_its_value_and_what_was_expected(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("bias", [None, 3.0])
def test_statistics_of_the_batch(backend: str, bias: float | None) -> None:
    similarity = X @ Y.T
    negatives = similarity.masked_fill(torch.eye(6, dtype=torch.bool), -math.inf)
    rows = (similarity.diagonal() > negatives.amax(1)).float().mean()
    columns = (similarity.diagonal() > negatives.amax(0)).float().mean()

    loss, stats = fastcl.clip_loss(X, Y, 7.0, bias, return_stats=True, backend=backend)
    torch.testing.assert_close(loss, fastcl.clip_loss(X, Y, 7.0, bias, backend=backend))
    torch.testing.assert_close(stats.accuracy, (rows + columns) / 2)
    torch.testing.assert_close(stats.positive_similarity, similarity.diagonal().mean())
    torch.testing.assert_close(stats.hardest_negative, negatives.amax())
    assert stats.scale == 7.0
    assert all(x.dim() == 0 and not x.requires_grad for x in stats)


@pytest.mark.parametrize("backend", available_backends())
def test_statistics_of_every_loss(backend: str) -> None:
    z1, z2 = (x.clone().requires_grad_() for x in (X, X + 1e-3 * Y))
    for result in (
        fastcl.nt_xent(z1, z2, 0.2, return_stats=True, backend=backend),
        fastcl.info_nce(z1, z2, 0.2, return_stats=True, backend=backend),
        fastcl.info_nce(z1, z2, 0.2, target=torch.arange(6), return_stats=True, backend=backend),
    ):
        loss, stats = result
        assert loss.requires_grad
        assert stats.accuracy == 1
        assert 0.99 < stats.positive_similarity <= 1.0001
        assert stats.hardest_negative < stats.positive_similarity
    with_negatives = fastcl.info_nce(z1, z2, 0.2, negatives=-Y, return_stats=True, backend=backend)[1]
    assert with_negatives.accuracy == 1


@pytest.mark.parametrize("backend", available_backends())
def test_query_without_a_positive(backend: str) -> None:
    query, key = X.clone().requires_grad_(), Y.clone().requires_grad_()
    target = torch.tensor([1, -1, 0, -100, 5, 2])
    rows = fastcl.info_nce(query, key, 0.2, target=target, reduction="none", backend=backend)
    assert rows[1] == 0
    assert rows[3] == 0
    mean, stats = fastcl.info_nce(query, key, 0.2, target=target, return_stats=True, backend=backend)
    torch.testing.assert_close(mean, rows.sum() / 6)
    mean.backward()
    assert query.grad[[1, 3]].abs().max() == 0
    assert torch.isfinite(key.grad).all()
    assert torch.isfinite(stats.positive_similarity)


def test_reductions() -> None:
    rows = fastcl.nt_xent(X, Y, 0.5, reduction="none")
    assert rows.shape == (12,)
    torch.testing.assert_close(fastcl.nt_xent(X, Y, 0.5), rows.mean())
    torch.testing.assert_close(fastcl.nt_xent(X, Y, 0.5, reduction="sum"), rows.sum())
    assert fastcl.clip_loss(X, Y, 5.0, reduction="none").shape == (6,)


def test_learnable_temperature() -> None:
    fixed, learnable = fastcl.nn.NTXentLoss(0.2), fastcl.nn.NTXentLoss(0.2, learnable=True)
    torch.testing.assert_close(fixed(X, Y), learnable(X, Y))
    assert dict(fixed.named_parameters()) == {}
    assert list(learnable.state_dict()) == ["logit_scale"]
    with torch.no_grad():
        learnable.logit_scale.fill_(math.log(1e4))
    torch.testing.assert_close(learnable.temperature.detach(), torch.tensor(0.01))
    learnable(X, X + 0.1 * Y).backward()
    assert learnable.logit_scale.grad != 0, "a scale beyond its bound must find its way back"
    assert "learnable=True" in repr(learnable)

    clip = fastcl.nn.ClipLoss(0.07)
    clip(X, Y).backward()
    assert clip.logit_scale.grad is not None
    torch.testing.assert_close(clip(X, Y), fastcl.clip_loss(X, Y, 1 / 0.07))


def test_bias_changes_nothing_but_has_a_gradient() -> None:
    bias = torch.tensor(-10.0, requires_grad=True)
    loss = fastcl.clip_loss(X, Y, 5.0, bias)
    torch.testing.assert_close(loss, fastcl.clip_loss(X, Y, 5.0))
    loss.backward()
    torch.testing.assert_close(bias.grad, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_choice_of_backend_is_logged_and_overridable(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    engine._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastcl"):
        fastcl.nt_xent(X, Y, 0.5, backend="dense")
        fastcl.nt_xent(X, Y, 0.5, backend="dense")
    assert [record.message for record in caplog.records] == [
        "backend dense for cpu torch.float32 tensors, plan: symmetric lse:row:-self_pair,-target sum:row:+target"
    ]
    monkeypatch.setenv("FASTCL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="got 'nonsense'"):
        fastcl.nt_xent(X, Y, 0.5)


def test_missing_engine_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCL_BACKEND", raising=False)
    monkeypatch.setattr(engine.BACKENDS["cpu"], "unavailable", lambda: "not built")
    monkeypatch.setattr(engine.BACKENDS["cpu"], "supports", lambda plan, operands: "not built")
    engine._warn_of_missing.cache_clear()
    with pytest.warns(RuntimeWarning, match="'cpu' backend is unavailable: not built"):
        fastcl.nt_xent(X, Y, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastcl.nt_xent(X, Y, 0.5)
    engine._warn_of_missing.cache_clear()


def test_ranks_that_do_not_share_negatives_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    engine._warn_of_ranks.cache_clear()
    with pytest.warns(RuntimeWarning, match="not shared between the 2 ranks"):
        fastcl.nt_xent(X, Y, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastcl.nt_xent(X, Y, 0.5)
    engine._warn_of_ranks.cache_clear()


def test_list_backends() -> None:
    backends = fastcl.list_backends()
    assert set(backends) == {"cuda", "triton", "cpu", "tiled", "dense"}
    assert backends["tiled"] is None
    assert "the CUDA extension is not built" in backends["cuda"]


def test_import_is_light() -> None:
    code = "import torch, sys; before = set(sys.modules); import fastcl; print(*(set(sys.modules) - before))"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in new if not name.startswith("fastcl")] == []
    assert "fastcl._C" not in new
    assert "triton" not in new
