"""Negatives, Gaussian mixtures and alpha-CL: the examples' small forms as a stranger runs them, and their formulas."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need scikit-learn")
pytest.importorskip("matplotlib", reason="the examples need matplotlib")

from examples import alpha_cl, gmm_subspace, negatives, subspaces

ROOT = Path(__file__).resolve().parent.parent


def small_run(example: str, folder: Path) -> str:
    picture = folder / "picture.png"
    command = [sys.executable, "-m", f"examples.{example}", "--small", "--picture", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    return done.stdout


@pytest.mark.slow
def test_small_run_of_negatives(tmp_path: Path) -> None:
    output = small_run("negatives", tmp_path)
    memory = re.findall(r"^ *([\d,]+)((?: +[\d.]+){4})$", output, re.MULTILINE)
    assert [int(count.replace(",", "")) for count, _ in memory] == list(negatives.MEASURED)
    _, logits, dense, fast = map(float, memory[-1][1].split())
    assert fast < 0.6 * logits < logits < dense
    rows = re.findall(r"^(negatives|temperature|width) +([\d.]+) +([\d.]+) % +([\d.]+) %$", output, re.MULTILINE)
    expected = [(name, f"{value:,}") for name, values in negatives.SMALL_SWEEPS.items() for value in values]
    assert [(name, value) for name, value, _, _ in rows] == expected
    assert all(float(few) > 50 and float(everything) > 80 for *_, few, everything in rows)  # chance is 10


@pytest.mark.slow
def test_small_run_of_gmm_subspace(tmp_path: Path) -> None:
    output = small_run("gmm_subspace", tmp_path)

    def cells(method: str, table: str) -> list[float]:
        line = re.search(rf"^{re.escape(method)} +(\d.*)$", output[output.index(table) :], re.MULTILINE)
        return [float(mean) for mean in re.findall(r"([\d.]+) ±", line.group(1))]

    angles = {method: cells(method, "largest angle to Fisher") for method in gmm_subspace.METHODS}
    assert all(len(row) == len(gmm_subspace.NOISES) for row in angles.values())
    assert min(angles["PCA"]) > 80
    assert angles["LDA (labels)"][0] < angles["InfoNCE"][0] < 30
    assert angles["InfoNCE"] == sorted(angles["InfoNCE"])
    scores = {method: cells(method, "ARI of k-means; noise") for method in gmm_subspace.METHODS}
    assert scores["PCA"][1] < 0.1 < 0.9 < scores["InfoNCE"][1]
    of_images, of_texts = cells("CLIP", "CLIP loss")[:2]
    assert max(of_images, of_texts) < 35 < 80 < min(cells("PCA", "CLIP loss")[:2])
    digits = dict(re.findall(r"^(PCA|LDA \(labels\)|InfoNCE, same digit, noise 0.0) +(0\.\d+) +0\.\d+$", output, re.M))
    assert float(digits["PCA"]) + 0.1 < float(digits["InfoNCE, same digit, noise 0.0"])


@pytest.mark.slow
def test_small_run_of_alpha_cl(tmp_path: Path) -> None:
    output = small_run("alpha_cl", tmp_path)
    rows = re.findall(r"^(?:orthonormal rows|unit norm) .*?((?: +[\d.]+)+) +(\S+)$", output, re.MULTILINE)
    angles = [[float(angle) for angle in row.split()] for row, _ in rows]
    assert len(angles) == 8
    assert all(row[0] > 60 and row[-1] < 0.2 * row[0] for row in angles)
    assert all(float(ratio) < 1e-6 for _, ratio in rows[4:])
    probes = re.findall(r"^(softmax|uniform|power) +([\d.]+) % +([\d.]+) %$", output, re.MULTILINE)
    assert [name for name, *_ in probes] == list(alpha_cl.RULES)
    assert all(float(few) > 50 and float(everything) > 80 for _, few, everything in probes)


def test_principal_angles_of_a_rotation() -> None:
    """Planes that share one direction and are turned by a small, a medium and a right angle around it."""
    basis = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    for degrees in (1e-6, 30.0, 60.0, 89.999, 90.0):
        turned = torch.tensor(degrees).double().deg2rad()
        other = torch.stack((basis[0], turned.cos() * basis[1] + turned.sin() * basis[2]))
        mixed = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64) @ other
        found = subspaces.principal_angles(basis[:2], mixed)
        torch.testing.assert_close(found, torch.tensor([0.0, degrees]).double(), rtol=1e-6, atol=1e-9)
    assert subspaces.principal_angles(basis[:4], basis[1:2])[-1] < 1e-9


def test_dense_loss_is_that_of_the_example() -> None:
    query, key, others = (torch.nn.functional.normalize(torch.randn(n, 6).double()) for n in (9, 9, 31))
    found = negatives.fast_loss(query, key, others, 0.3)
    torch.testing.assert_close(found, negatives.dense_loss(query, key, others, 0.3), rtol=1e-10, atol=0)


def test_discriminants_find_fishers_subspace() -> None:
    """And canonical directions do, from pairs; principal components don't."""
    generator = torch.Generator().manual_seed(0)
    mixture = gmm_subspace.Mixture.random(12, generator)
    first, second, components = gmm_subspace.draw_pairs(mixture, mixture, 200_000, 0.3, generator)
    found = gmm_subspace.discriminants(first, components)
    assert subspaces.principal_angles(found, mixture.fisher())[-1] < 3
    for side in gmm_subspace.canonical_directions(first, second, gmm_subspace.RANK):
        assert subspaces.principal_angles(side, mixture.fisher())[-1] < 10
    components_of_variance = subspaces.principal_components(first, gmm_subspace.RANK)
    assert subspaces.principal_angles(components_of_variance, mixture.fisher())[-1] > 80


def test_partners_agree_more_often_than_by_chance() -> None:
    mixture = gmm_subspace.Mixture(1e3 * torch.eye(4), torch.eye(4))
    generator = torch.Generator().manual_seed(0)
    first, second, components = gmm_subspace.draw_pairs(mixture, mixture, 20_000, 0.8, generator)
    assert torch.equal(first.argmax(dim=1), components)
    agree = (second.argmax(dim=1) == components).float().mean()
    assert agree == pytest.approx(0.2 + 0.8 / 4, abs=0.02)


@pytest.mark.parametrize("rule", alpha_cl.RULES)
def test_contrast_of_linear_outputs_is_a_trace(rule: str) -> None:
    first, second = torch.randn(2, 11, 7, dtype=torch.float64)
    network = torch.randn(3, 7, dtype=torch.float64)
    alpha = alpha_cl.fixed_importance(first, second, rule)
    assert alpha.diagonal().abs().max() == 0
    loss = 0.0
    for i in range(11):
        for j in range(11):
            apart, together = network @ (first[i] - second[j]), network @ (first[i] - second[i])
            loss += 0.5 * alpha[i, j] * (together.square().sum() - apart.square().sum())
    covariance = alpha_cl.contrastive_covariance(first, second, alpha)
    torch.testing.assert_close(alpha_cl.contrast(first @ network.T, second @ network.T, alpha), loss)
    torch.testing.assert_close(-(network @ covariance @ network.T).trace(), loss)


def test_uniform_importance_of_one_view_is_pca() -> None:
    rows = torch.randn(40, 6, dtype=torch.float64) * torch.arange(1, 7)
    alpha = alpha_cl.fixed_importance(rows, rows, "uniform")
    covariance = alpha_cl.contrastive_covariance(rows, rows, alpha)
    torch.testing.assert_close(covariance, 40 * torch.cov(rows.T))
