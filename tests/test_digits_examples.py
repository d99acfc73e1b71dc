"""MoCo, MoCHi, BYOL and Deep InfoMax on digits: their small forms as a stranger runs them, and their formulas."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

pytest.importorskip("sklearn", reason="the examples need scikit-learn")
pytest.importorskip("matplotlib", reason="the examples need matplotlib")

from examples import infomax_digits, linear_probe, moco_digits

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "methods"),
    [("moco_digits", ["MoCo", "MoCo + MoCHi", "BYOL"]), ("infomax_digits", ["Deep InfoMax", "across views"])],
)
def test_small_run(example: str, methods: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    command = [sys.executable, "-m", f"examples.{example}", "--small", "--picture", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(.{15}) +([\d.]+) % +([\d.]+) %$", done.stdout, re.MULTILINE)
    few = {name.strip(): float(accuracy) for name, accuracy, _ in rows}
    everything = {name.strip(): float(accuracy) for name, _, accuracy in rows}
    assert list(few) == ["raw pixels", "random encoder", *methods]
    assert all(few[name] > 50 and everything[name] > 90 for name in few)  # chance is 10
    assert picture.read_bytes().startswith(b"\x89PNG")


def unit(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape), dim=-1)


def test_local_global_loss_by_its_formula() -> None:
    local, whole = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    scores = torch.einsum("id,jdl->ijl", normalize(whole, dim=1), normalize(local, dim=1)).div(0.3).exp()
    losses = []
    for i in range(5):
        others = scores[i].sum() - scores[i, i].sum()
        losses += [-(scores[i, i, place] / (scores[i, i, place] + others)).log() for place in range(4)]
    found = infomax_digits.local_global_loss(local, whole, 0.3)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-10, atol=1e-12)


def test_mixtures_are_of_the_hardest_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moco_digits, "HARDEST", 2)
    query, negatives = unit(4, 6), unit(9, 6)
    mixed = moco_digits.mix(query, negatives)
    pairs, with_query = mixed.split((moco_digits.MIXED, moco_digits.MIXED_WITH_QUERY), dim=1)
    assert with_query.shape == (4, moco_digits.MIXED_WITH_QUERY, 6)
    torch.testing.assert_close(mixed.norm(dim=2), torch.ones(mixed.shape[:2]))
    for q, of_pairs, of_query in zip(query, pairs, with_query, strict=True):
        hardest = negatives[(negatives @ q).topk(2).indices]
        # Between the two hardest: in their plane, and no farther from either than they are from each other.
        assert torch.linalg.matrix_rank(torch.cat((hardest, of_pairs)), tol=1e-4) == 2
        assert ((of_pairs @ hardest.T).amin(dim=1) > hardest[0] @ hardest[1] - 1e-5).all()
        assert (of_query @ q > (hardest @ q).amin() - 1e-5).all()
        plane = [torch.linalg.matrix_rank(torch.stack((x, q, h)), tol=1e-4) == 2 for x in of_query for h in hardest]
        assert sum(plane) >= len(of_query)


def test_mochi_adds_its_mixtures_to_the_denominator(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (query, key) = moco_digits.MoCHi(), unit(2, 8, moco_digits.DIM)
    model.queue.enqueue(unit(moco_digits.QUEUE, moco_digits.DIM))
    mixed = unit(8, 5, moco_digits.DIM)
    monkeypatch.setattr(moco_digits, "mix", lambda query, negatives: mixed)
    logits = torch.cat((query @ model.queue.keys.T, torch.einsum("bd,bkd->bk", query, mixed)), dim=1)
    everything = torch.cat(((query * key).sum(dim=1, keepdim=True), logits), dim=1) / moco_digits.TEMPERATURE
    exact = -everything.log_softmax(dim=1)[:, 0].mean()
    torch.testing.assert_close(model.contrast(query, key), exact)
    assert math.log(moco_digits.QUEUE) < exact


def test_the_probe_is_blind_to_what_is_held_out() -> None:
    _, labels = moco_digits.load_images()
    kept, held_out = linear_probe.split(labels)
    assert len(held_out) == linear_probe.HELD_OUT
    assert sorted(torch.cat((kept, held_out)).tolist()) == list(range(len(labels)))
    told = torch.nn.functional.one_hot(labels, 10).float()
    assert linear_probe.linear_probe(told, labels).all == 1
    told[held_out] = told[held_out].roll(1, dims=0)
    assert linear_probe.linear_probe(told, labels).all < 0.2
