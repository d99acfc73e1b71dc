"""InfoNCE finds the subspace of linear discriminant analysis: ``python -m examples.gmm_subspace [--small]``.

A mixture of Gaussians with one covariance, whose directions of largest variance say nothing about the component. What
a classifier needs is Fisher's subspace, the span of inverse covariance times means; LDA finds it from labels. Bansal,
Kavis and Sanghavi (2024, arXiv:2411.03517) prove that InfoNCE with a linear encoder finds it from pairs of draws whose
components agree more often than by chance, where PCA doesn't, and that the CLIP loss does so for two modalities. Here
this is measured: by principal angles, on draws of growing number, and by clustering real digits.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastcl
from examples.demo.digits import augment, load_images
from examples.linear_probe import split, spread
from examples.subspaces import principal_angles, principal_components

COMPONENTS, DIM, TEXT_DIM = 4, 32, 24
RANK = COMPONENTS - 1
"""of Fisher's subspace, and of the encoders"""
SEPARATION, NUISANCES, NUISANCE_VARIANCE = 3.0, 6, 25.0
NOISES = (0.0, 0.5, 0.8)
"""how many partners are draws from the whole mixture instead of from the first one's component"""
PAIRS, SIZES, DRAWS, LARGEST = 4096, (256, 1024, 4096), 3, 16_384
SMALL_PAIRS, SMALL_SIZES, SMALL_DRAWS = 1024, (256, 1024), 2
COSINE_TEMPERATURE, ITERATIONS, HELD_OUT, COPIES = 0.5, 50, 2000, 4

Draw = tuple[Tensor, Tensor, Tensor]
"""two sides of pairs, and the first one's component"""


@dataclass(frozen=True)
class Mixture:
    """Gaussians at ``means`` [K, D], which sum to zero, with the covariance ``root.T @ root``."""

    means: Tensor
    root: Tensor

    @staticmethod
    def random(dim: int, generator: torch.Generator) -> Mixture:
        """A simplex of means, and larger variances in directions that don't tell the components apart."""
        simplex = torch.linalg.svd(torch.eye(COMPONENTS) - 1 / COMPONENTS).U[:, :RANK]
        means = torch.cat((simplex * SEPARATION * math.sqrt(COMPONENTS), torch.zeros(COMPONENTS, dim - RANK)), dim=1)
        variances = torch.ones(dim)
        variances[RANK : RANK + NUISANCES] = NUISANCE_VARIANCE
        # An oblique basis, so that Fisher's subspace is not the span of the means.
        basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
        basis = (torch.eye(dim) + 0.3 * torch.randn(dim, dim, generator=generator) / math.sqrt(dim)) @ basis
        return Mixture(means @ basis, variances.sqrt()[:, None] * basis)

    def draw(self, components: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(components), self.root.shape[0], generator=generator)
        return self.means[components] + noise @ self.root

    def fisher(self) -> Tensor:
        """Rows that span inverse covariance times means."""
        root = self.root.double()
        return torch.linalg.svd(torch.linalg.solve(root.T @ root, self.means.double().T).T).Vh[:RANK]


def draw_pairs(first: Mixture, second: Mixture, count: int, noise: float, generator: torch.Generator) -> Draw:
    """Draws and their partners, of which a share ``noise`` have a component of their own."""
    components, others = torch.randint(COMPONENTS, (2, count), generator=generator)
    partners = torch.where(torch.rand(count, generator=generator) < noise, others, components)
    return first.draw(components, generator), second.draw(partners, generator), components


def discriminants(rows: Tensor, labels: Tensor) -> Tensor:
    """LDA: [classes - 1, D], in whose image the mean covariance within a class is the identity."""
    means = torch.stack([rows[labels == label].mean(dim=0) for label in labels.unique()])
    within = torch.cov((rows - means[labels]).T) + 1e-3 * torch.eye(rows.shape[1])  # some pixels are always white
    values, vectors = torch.linalg.eigh(within)
    whitening = vectors * values.rsqrt() @ vectors.T
    return torch.linalg.svd((means - means.mean(dim=0)) @ whitening).Vh[: len(means) - 1] @ whitening


def canonical_directions(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """CCA of pairs: the closed form for what linear functions of the two sides have in common."""
    roots = [torch.linalg.cholesky(torch.cov(rows.T)) for rows in (first, second)]
    white = [
        torch.linalg.solve_triangular(root, (rows - rows.mean(dim=0)).T, upper=False)
        for rows, root in zip((first, second), roots, strict=True)
    ]
    left, _, right = torch.linalg.svd(white[0] @ white[1].T)
    sides = zip((left[:, :rank], right[:rank].T), roots, strict=True)
    one, other = (torch.linalg.solve_triangular(root.T, side, upper=True).T for side, root in sides)
    return one, other


def fit(loss: Callable[..., Tensor], shapes: Sequence[tuple[int, int]], generator: torch.Generator) -> list[Tensor]:
    """The linear encoders that minimise the loss over all pairs at once, by L-BFGS."""
    encoders = [(0.1 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]
    # Smaller changes of the loss are far below what another draw of the pairs would change.
    optimizer = torch.optim.LBFGS(
        encoders, max_iter=ITERATIONS, tolerance_change=1e-5, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*encoders)
        value.backward()
        return value

    optimizer.step(closure)
    return [encoder.detach() for encoder in encoders]


def fit_info_nce(first: Tensor, second: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """InfoNCE of inner products with one encoder for both sides, as in the theorem."""

    def loss(encoder: Tensor) -> Tensor:
        return fastcl.info_nce(first @ encoder.T, second @ encoder.T, 1.0, normalize=False)

    return fit(loss, [(rank, first.shape[1])], generator)[0]


def fit_nt_xent(first: Tensor, second: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """SimCLR's loss, of cosines: outside the theorem."""

    def loss(encoder: Tensor) -> Tensor:
        return fastcl.nt_xent(first @ encoder.T, second @ encoder.T, COSINE_TEMPERATURE)

    return fit(loss, [(rank, first.shape[1])], generator)[0]


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]] = {
    "PCA": lambda x, y, components, generator: principal_components(torch.cat((x, y)), RANK),
    "InfoNCE": lambda x, y, components, generator: fit_info_nce(x, y, RANK, generator),
    "NT-Xent (cosine)": lambda x, y, components, generator: fit_nt_xent(x, y, RANK, generator),
    "CCA": lambda x, y, components, generator: canonical_directions(x, y, RANK)[0],
    "LDA (labels)": lambda x, y, components, generator: discriminants(x, components),
}


class Clustering(NamedTuple):
    """How well k-means finds the classes: 1 is perfectly, an ARI of 0 as chance does."""

    ari: float
    nmi: float


def cluster(rows: Tensor, labels: Tensor) -> Clustering:
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found = KMeans(len(labels.unique()), n_init=10, random_state=0).fit_predict(rows.numpy())
    return Clustering(adjusted_rand_score(labels, found), normalized_mutual_info_score(labels, found))


class Found(NamedTuple):
    """Of one method on one draw: the largest angle to Fisher's subspace, and the clusters of fresh draws."""

    angle: float
    ari: float


def find(method: str, pairs: int, noise: float, seed: int) -> Found:
    """The same mixture and pairs for each method."""
    generator = torch.Generator().manual_seed(seed)
    mixture = Mixture.random(DIM, generator)
    held_out, _, classes = draw_pairs(mixture, mixture, HELD_OUT, 0.0, generator)
    first, second, components = draw_pairs(mixture, mixture, pairs, noise, generator)
    encoder = METHODS[method](first, second, components, generator)
    angle = principal_angles(encoder, mixture.fisher())[-1].item()
    return Found(angle, cluster(held_out @ encoder.T, classes).ari)


class Modality(NamedTuple):
    """The largest angles to a modality's own Fisher subspace."""

    pca: float
    clip: float
    lda: float


def find_two(pairs: int, noise: float, seed: int) -> tuple[Modality, Modality]:
    """Images and texts, each a mixture of its own, with encoders of their own."""
    generator = torch.Generator().manual_seed(seed)
    mixtures = [Mixture.random(dim, generator) for dim in (DIM, TEXT_DIM)]
    images, texts, components = draw_pairs(*mixtures, pairs, noise, generator)
    shapes = [(RANK, DIM), (RANK, TEXT_DIM)]
    encoders = fit(lambda a, b: fastcl.clip_loss(images @ a.T, texts @ b.T, 1.0), shapes, generator)
    clean = [mixture.draw(components, generator) for mixture in mixtures]
    of_image, of_text = (
        Modality(
            *(
                principal_angles(found, mixture.fisher())[-1].item()
                for found in (principal_components(rows, RANK), encoder, discriminants(rows, components))
            )
        )
        for mixture, encoder, rows in zip(mixtures, encoders, clean, strict=True)
    )
    return of_image, of_text


def find_shared(pairs: int, seed: int) -> tuple[float, float]:
    """Texts that can't tell two components apart: the encoders' largest angles, with the one direction less.

    The image encoder then finds a part of Fisher's subspace, and the angle is that between the part and the whole.
    """
    generator = torch.Generator().manual_seed(seed)
    images, texts = (Mixture.random(dim, generator) for dim in (DIM, TEXT_DIM))
    merged = texts.means.clone()
    merged[0] = merged[1] = merged[:2].mean(dim=0)
    texts = Mixture(merged, texts.root)
    x, y, _ = draw_pairs(images, texts, pairs, 0.0, generator)
    shapes = [(RANK - 1, DIM), (RANK - 1, TEXT_DIM)]
    of_image, of_text = fit(lambda a, b: fastcl.clip_loss(x @ a.T, y @ b.T, 1.0), shapes, generator)
    fisher_of_texts = texts.fisher()[: RANK - 1]
    return principal_angles(of_image, images.fisher())[-1].item(), principal_angles(of_text, fisher_of_texts)[-1].item()


def cluster_digits(copies: int) -> dict[str, Clustering]:
    """k-means of held-out digits in nine dimensions, which linear encoders of the 64 pixels found on the others."""
    images, labels = load_images()
    kept, held_out = split(labels)
    center = images[kept].mean(dim=0)
    pixels, known = (images - center).flatten(1), labels[kept]
    generator = torch.Generator().manual_seed(0)
    of_digit = [kept[known == digit] for digit in range(10)]

    def views() -> tuple[Tensor, Tensor]:
        batch = images[kept].repeat(copies, 1, 1, 1)
        first, second = ((augment(batch, generator) - center).flatten(1) for _ in range(2))
        return first, second

    def partners(noise: float) -> tuple[Tensor, Tensor]:
        chosen = kept.repeat(copies)
        random = torch.rand(len(chosen), generator=generator) < noise
        digits = torch.where(random, torch.randint(10, chosen.shape, generator=generator), labels[chosen])
        others = [of_digit[d][torch.randint(len(of_digit[d]), (), generator=generator)] for d in digits]
        return pixels[chosen], pixels[torch.stack(others)]

    encoders = {
        "PCA": principal_components(pixels[kept], 9),
        "InfoNCE, augmented views": fit_info_nce(*views(), 9, generator),
    }
    for noise in reversed(NOISES):
        encoders[f"InfoNCE, same digit, noise {noise}"] = fit_info_nce(*partners(noise), 9, generator)
    encoders["LDA (labels)"] = discriminants(pixels[kept], known)
    return {"pixels": cluster(pixels[held_out], labels[held_out])} | {
        name: cluster(pixels[held_out] @ encoder.T, labels[held_out]) for name, encoder in encoders.items()
    }


def print_table(table: dict[tuple[str, float], list[Found]]) -> None:
    for what, column, digits in (("largest angle to Fisher's subspace, degrees", 0, 1), ("ARI of k-means", 1, 2)):
        print(f"\n{what + '; noise:':48}" + "".join(f"{noise:>14}" for noise in NOISES))
        for method in METHODS:
            cells = (spread([found[column] for found in table[method, noise]], digits) for noise in NOISES)
            print(f"{method:48}" + "".join(f"{cell:>14}" for cell in cells))


def draw(curves: dict[tuple[str, float], dict[int, list[float]]], digits: dict[str, Clustering], path: Path) -> None:
    """Angles against the number of pairs, what PCA and InfoNCE see of the mixture, and the clusters of digits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (angles, pca, found, bars) = plt.subplots(
        1, 4, figsize=(16, 4.2), layout="constrained", width_ratios=(1.3, 1, 1, 1.2)
    )
    colors = dict(zip(NOISES, ("#1f6fb4", "#7a4fa3", "#d98a29"), strict=True))
    for (method, noise), curve in curves.items():
        means = [statistics.mean(values) for values in curve.values()]
        if method == "InfoNCE":
            angles.plot(curve.keys(), means, "o-", color=colors[noise], label=f"InfoNCE, noise {noise}")
        elif noise == NOISES[0]:
            style = {"color": "#888888", "linestyle": "--" if method == "PCA" else ":"}
            angles.plot(curve.keys(), means, **style, label=method)
    angles.set(xscale="log", yscale="log", xlabel="pairs", title="Largest angle to Fisher's subspace, degrees")
    angles.set_yticks([3, 10, 30, 90], ["3", "10", "30", "90"])
    angles.set_xticks(list(curves["PCA", NOISES[0]]), [f"{size:,}" for size in curves["PCA", NOISES[0]]])
    angles.minorticks_off()
    angles.legend(frameon=False, fontsize=8)

    generator = torch.Generator().manual_seed(0)
    mixture = Mixture.random(DIM, generator)
    first, second, components = draw_pairs(mixture, mixture, 2000, 0.5, generator)
    for axes, method in ((pca, "PCA"), (found, "InfoNCE")):
        rows = first @ METHODS[method](first, second, components, generator).T
        for component in range(COMPONENTS):
            points = rows[components == component][:150]
            axes.plot(points[:, 0], points[:, 1], ".", markersize=3)
        axes.set_title(f"Two of {RANK} directions: {method}")
        axes.set_xticks([])
        axes.set_yticks([])
    names = list(digits)
    bars.barh(names, [digits[name].ari for name in names], color="#1f6fb4")
    bars.invert_yaxis()
    bars.set(title="Digits: ARI of k-means", xlim=(0, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.gmm_subspace", description=__doc__)
    parser.add_argument("--small", action="store_true", help="fewer pairs and draws, to see that it runs")
    parser.add_argument("--picture", type=Path, default=Path("gmm_subspace.png"), help="where to write the picture")
    options = parser.parse_args()
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"the example needs {' and '.join(missing)}; `make demo` installs them\n")
    pairs, sizes, draws = (SMALL_PAIRS, SMALL_SIZES, SMALL_DRAWS) if options.small else (PAIRS, SIZES, DRAWS)

    print(
        f"{COMPONENTS} Gaussians in {DIM} dimensions, {pairs:,} pairs, mean and deviation of {draws} draws", flush=True
    )
    table = {
        (method, noise): [find(method, pairs, noise, seed) for seed in range(draws)]
        for method in METHODS
        for noise in NOISES
    }
    print_table(table)

    curves = {}
    for method, noise in [("PCA", 0.0), ("LDA (labels)", 0.0), *(("InfoNCE", noise) for noise in NOISES)]:
        curve = {
            size: [find(method, size, noise, seed).angle for seed in range(draws)] for size in sizes if size != pairs
        }
        curves[method, noise] = curve | {pairs: [found.angle for found in table[method, noise]]}
        if not options.small:
            curves[method, noise][LARGEST] = [find(method, LARGEST, noise, 0).angle]
    columns = list(curves["PCA", 0.0])
    print(f"\n{'largest angle, degrees; pairs:':48}" + "".join(f"{size:>14,}" for size in columns))
    for (method, noise), curve in curves.items():
        name = f"{method}, noise {noise}" if method == "InfoNCE" else method
        print(f"{name:48}" + "".join(f"{spread(values):>14}" for values in curve.values()), flush=True)

    print(f"\n{'CLIP loss, images | texts; noise:':48}" + "".join(f"{noise:>24}" for noise in NOISES))
    two = {noise: [find_two(pairs, noise, seed) for seed in range(draws)] for noise in NOISES}
    for method, name in (("pca", "PCA"), ("clip", "CLIP"), ("lda", "LDA (labels)")):
        cells = (
            " | ".join(spread([getattr(found[side], method) for found in two[noise]]) for side in range(2))
            for noise in NOISES
        )
        print(f"{name:48}" + "".join(f"{cell:>24}" for cell in cells))
    shared = [find_shared(pairs, seed) for seed in range(draws)]
    cell = " | ".join(spread([found[side] for found in shared]) for side in range(2))
    print(f"{'texts can not tell two components apart: CLIP':48}{cell:>24}", flush=True)

    digits = cluster_digits(1 if options.small else COPIES)
    print(f"\n{'held-out digits in 9 dimensions, k-means':48}{'ARI':>8}{'NMI':>8}")
    for name, (ari, nmi) in digits.items():
        print(f"{name:48}{ari:8.3f}{nmi:8.3f}")
    draw(curves, digits, options.picture)
    print(f"\n{options.picture}; {time.process_time():.0f} s of processor time")


if __name__ == "__main__":
    main()
