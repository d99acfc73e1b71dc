"""The importance of pairs, fixed and adaptive: ``python -m examples.alpha_cl [--small]``.

Tian (2022, arXiv:2201.12680) writes contrastive losses as a weighted sum over pairs, whose weights alpha are a rule of
the similarities that no gradient passes through: the softmax gives InfoNCE, other rules give other losses. Where alpha
is fixed, a deep linear network maximises the variance of its output under one matrix, the contrastive covariance, and
ends at the principal components of that matrix. The first half shows this, step by step; the second one trains an
encoder with three of the rules and asks a linear classifier what was learned.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcl
from examples.demo.digits import augment, load_images
from examples.linear_probe import DRAWS, FEW, Accuracy, linear_probe, split, spread_percent
from examples.negatives import Encoder
from examples.subspaces import principal_angles, principal_components

LAYERS = (64, 48, 32, 4)
"""widths of the deep linear network, from pixels to output"""
IMAGES, NETWORK_STEPS, NETWORK_RATE, SHOWN_AT = 400, 300, 0.5, (0, 3, 10, 30, 100)
SMALL_IMAGES, SMALL_NETWORK_STEPS = 200, 200
BATCH, STEPS, SMALL_STEPS, SEEDS, SMALL_SEEDS, RATE, TEMPERATURE, WIDTH = 256, 200, 30, 3, 1, 4e-3, 0.2, 32


RULES = ("softmax", "uniform", "power")


@torch.no_grad()
def pair_importance(distances: Tensor, to_positive: Tensor, negative: Tensor, tau: float, importance: str) -> Tensor:
    """alpha [n, m] of half squared distances [n, m], 0 where not ``negative``; those to the positives are [n, 1].

    "softmax" is exp(-d / tau) over the sum with the positive: InfoNCE. "uniform" is the same for all, "power" is
    exp(-d ** 2 / tau) over the sum: both sum to 1.
    """
    raised = {"softmax": distances, "uniform": torch.zeros_like(distances), "power": distances.square()}[importance]
    weights = negative * (-raised / tau).exp()
    total = weights.sum(dim=1, keepdim=True)
    return weights / (total + (-to_positive / tau).exp() if importance == "softmax" else total)


def fixed_importance(first: Tensor, second: Tensor, importance: str) -> Tensor:
    """alpha [n, n] by the cosines of the first view of i and the second view of j."""
    distances = 1 - F.normalize(first) @ F.normalize(second).T
    different = ~torch.eye(len(first), dtype=torch.bool)
    return pair_importance(distances, distances.diagonal()[:, None], different, TEMPERATURE, importance)


def contrast(first: Tensor, second: Tensor, alpha: Tensor) -> Tensor:
    """The sum over i and j of alpha_ij (d_ii - d_ij), d_ij half the squared distance of first i and second j."""
    apart = 0.5 * (alpha * torch.cdist(first, second).square()).sum()
    together = 0.5 * (alpha.sum(dim=1) * (first - second).square().sum(dim=1)).sum()
    return together - apart


def contrastive_covariance(first: Tensor, second: Tensor, alpha: Tensor) -> Tensor:
    """C [D, D] such that ``contrast`` of linear outputs W x is -trace(W C W^T).

    The weighted covariance of different examples, minus that of the two views of one.
    """
    rows, columns = alpha.sum(dim=1), alpha.sum(dim=0)
    crossed = first.T @ alpha @ second
    apart = first.T @ (rows[:, None] * first) + second.T @ (columns[:, None] * second) - crossed - crossed.T
    difference = first - second
    together = difference.T @ (rows[:, None] * difference)
    return 0.5 * (apart - together)


def unit_norm(weight: Tensor) -> Tensor:
    """The theorem's constraint on a layer: Frobenius norm 1. The optimum has rank 1."""
    return weight / weight.norm()


def orthonormal(weight: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows: all outputs stay in use."""
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return left @ right


CONSTRAINTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "orthonormal rows": (orthonormal, LAYERS[-1]),
    "unit norm": (unit_norm, 1),
}
"""each with the rank that the network ends with"""


@dataclass
class Course:
    """What a deep linear network looks at, step by step."""

    angles: list[float] = field(default_factory=list)
    """degrees, the largest between the network's leading directions and those of C"""
    ratios: list[float] = field(default_factory=list)
    """second singular value of the network over the first one"""


def train_network(first: Tensor, second: Tensor, alpha: Tensor, constraint: str, steps: int) -> Course:
    """Gradient steps on the loss of the outputs with alpha fixed; then each layer is brought back to its constraint."""
    constrain, rank = CONSTRAINTS[constraint]
    generator = torch.Generator().manual_seed(0)
    shapes = zip(LAYERS[1:], LAYERS, strict=False)
    layers = [constrain(torch.randn(*shape, generator=generator, dtype=first.dtype)) for shape in shapes]
    values, vectors = torch.linalg.eigh(contrastive_covariance(first, second, alpha))
    course = Course()

    def look(network: Tensor) -> None:
        _, sizes, directions = torch.linalg.svd(network, full_matrices=False)
        course.angles.append(principal_angles(directions[:rank], vectors[:, -rank:].T)[-1].item())
        course.ratios.append((sizes[1] / sizes[0]).item())

    for _ in range(steps):
        layers = [layer.detach().requires_grad_() for layer in layers]
        network = torch.linalg.multi_dot(layers[::-1])
        look(network.detach())
        # In units of the largest eigenvalue, be it negative, and of the product's size, which starts out tiny.
        unit = values.abs().max() * torch.linalg.matrix_norm(network.detach(), ord=2) ** 2
        loss = contrast(first @ network.T, second @ network.T, alpha) / unit
        gradients = torch.autograd.grad(loss, layers)
        pairs = zip(layers, gradients, strict=True)
        layers = [constrain(layer.detach() - NETWORK_RATE * gradient) for layer, gradient in pairs]
    look(torch.linalg.multi_dot(layers[::-1]))
    return course


def fixed_cases(count: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Centred views of digits in float64 with each rule's alpha of them; and a single view, whose C is plain PCA's."""
    images, labels = load_images()
    generator = torch.Generator().manual_seed(0)
    batch = images[split(labels)[0][:count]]
    first, second = (augment(batch, generator).flatten(1).double() for _ in range(2))
    first, second = first - first.mean(dim=0), second - first.mean(dim=0)
    cases = {rule: (first, second, fixed_importance(first, second, rule)) for rule in RULES}
    return cases | {"uniform, one view": (first, first, fixed_importance(first, first, "uniform"))}


def train(rule: str, steps: int, seed: int, images: Tensor, labels: Tensor) -> Accuracy:
    """The probe of an encoder, which no label was used for; a seed's batches are the same for each rule."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    features = Encoder()
    model = nn.Sequential(features, nn.ReLU(), nn.Linear(128, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    kept, _ = split(labels)
    for _ in range(steps):
        batch = images[kept[torch.randperm(len(kept), generator=generator)[:BATCH]]]
        z1, z2 = (model(augment(batch, generator)) for _ in range(2))
        loss = fastcl.alpha_cl_loss(z1, z2, TEMPERATURE, importance=rule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return linear_probe(features(images), labels)


def draw(courses: dict[str, dict[str, Course]], accuracies: dict[str, list[Accuracy]], path: Path) -> None:
    """The angles over the steps, the collapse to rank 1, and the accuracies of the rules."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 4.2), layout="constrained")
    for name, color in zip(courses, ("#1f6fb4", "#7a4fa3", "#d98a29", "#888888"), strict=True):
        for panel, constraint in zip(axes, CONSTRAINTS, strict=False):
            panel.plot([max(angle, 1e-6) for angle in courses[name][constraint].angles], color=color, label=name)
        axes[2].plot([max(ratio, 1e-6) for ratio in courses[name]["unit norm"].ratios[:31]], color=color)
    for panel, what in zip(
        axes, (f"{LAYERS[-1]} directions, orthonormal rows", "first direction, unit norm"), strict=False
    ):
        panel.set(yscale="log", xlabel="step", title=f"Angle to C's, degrees: {what}")
        panel.title.set_fontsize(10)
    axes[0].legend(frameon=False, title="fixed alpha")
    axes[2].set(yscale="log", xlabel="step")
    axes[2].set_title("Unit norm: second singular value / first", fontsize=10)
    for place, runs in enumerate(accuracies.values()):
        for shift, labelled, color in ((-0.2, "few", "#1f6fb499"), (0.2, "all", "#1f6fb4")):
            values = [100 * getattr(run, labelled) for run in runs]
            deviation = statistics.stdev(values) if len(values) > 1 else 0
            axes[3].barh(place + shift, statistics.mean(values), 0.38, xerr=deviation, color=color)
    axes[3].set_yticks(range(len(accuracies)), accuracies.keys())
    axes[3].invert_yaxis()
    axes[3].set(xlim=(50, 100), xlabel="accuracy, %")
    axes[3].set_title(f"Linear probe, {FEW} labels per digit (pale), all", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.alpha_cl", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--picture", type=Path, default=Path("alpha_cl.png"), help="where to write the picture")
    options = parser.parse_args()
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"the example needs {' and '.join(missing)}; `make demo` installs them\n")
    count, network_steps = (SMALL_IMAGES, SMALL_NETWORK_STEPS) if options.small else (IMAGES, NETWORK_STEPS)
    steps, seeds = (SMALL_STEPS, SMALL_SEEDS) if options.small else (STEPS, SEEDS)

    cases, shown = fixed_cases(count), (*SHOWN_AT, network_steps)
    print(f"deep linear network {LAYERS} on two views of {count} digits, alpha fixed; degrees to the leading")
    print(
        "eigenvectors of the contrastive covariance C, after so many steps, and the second singular value / the first"
    )
    print(f"{'layers':18}{'alpha':18}" + "".join(f"{step:8}" for step in shown) + f"{'ratio':>10}")
    courses: dict[str, dict[str, Course]] = {name: {} for name in cases}
    for constraint in CONSTRAINTS:
        for name, case in cases.items():
            course = courses[name][constraint] = train_network(*case, constraint, network_steps)
            angles = "".join(f"{course.angles[step]:8.2f}" for step in shown)
            print(f"{constraint:18}{name:18}{angles}{course.ratios[-1]:10.1e}", flush=True)
    print(f"\n{'C against PCA of the images, ' + str(LAYERS[-1]) + ' directions, degrees':48}")
    for name, (first, second, alpha) in cases.items():
        leading = torch.linalg.eigh(contrastive_covariance(first, second, alpha)).eigenvectors[:, -LAYERS[-1] :].T
        angles = principal_angles(leading, principal_components(first, LAYERS[-1]))
        print(f"{name:18}" + "".join(f"{angle:8.2f}" for angle in angles.tolist()))

    images, labels = load_images()
    torch.manual_seed(0)
    with torch.no_grad():
        random = linear_probe(Encoder()(images), labels)
    accuracies = {"raw pixels": [linear_probe(images, labels)], "random encoder": [random]}
    for rule in RULES:
        accuracies[rule] = [train(rule, steps, seed, images, labels) for seed in range(seeds)]
    print(f"\nadaptive alpha, {steps} steps of {BATCH} images; mean and deviation of {seeds} seeds")
    print(f"linear probe on held-out digits, from {FEW} labels per digit (mean of {DRAWS} draws) and from all labels")
    for name, runs in accuracies.items():
        print(f"{name:18}{spread_percent(runs)}")
    draw(courses, accuracies, options.picture)
    print(f"\n{options.picture}; {time.process_time():.0f} s of processor time")


if __name__ == "__main__":
    main()
