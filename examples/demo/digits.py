"""SimCLR on scikit-learn's digits, twice from the same seed: with ``fastcl.nt_xent`` and with the dense loss.

1,797 real images of 8 x 8 pixels that come with scikit-learn. The encoder never sees a label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcl
from examples.demo.reference import dense_nt_xent

TAU = 0.5
_BATCH, _RATE, _SEED, _DRAWS = 512, 1e-3, 0, 20


@dataclass(frozen=True)
class Digits:
    """What came out of the two trainings."""

    curves: dict[str, list[float]]
    accuracies: dict[str, float]

    def largest_difference(self, steps: int | None = None) -> float:
        """Between the two curves, in all steps or in the first few.

        Training amplifies the last bit of a gradient: the dense loss in float64 parts from the one in float32 as fast.
        """
        fast, dense = self.curves.values()
        return max(abs(a - b) for a, b in zip(fast[:steps], dense[:steps], strict=True))


class _Encoder(nn.Sequential):
    """Three small convolutions, 8 x 8 pixels to 128 features."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 128)),
        )


@dataclass
class _Training:
    """One encoder with its head, its loss, and a stream of random numbers of its own."""

    loss: Callable[[Tensor, Tensor, float], Tensor]
    steps: int
    device: str
    curve: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            self.encoder = _Encoder()
            head = nn.Sequential(
                *(nn.ReLU(), nn.Linear(128, 128)),
                *(nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64)),
            )
        self.model = nn.Sequential(self.encoder, head).to(self.device)
        self.generator = torch.Generator().manual_seed(_SEED)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), eps=1e-5)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, _RATE, total_steps=self.steps)

    def step(self, images: Tensor) -> None:
        batch = images[torch.randperm(len(images), generator=self.generator)[:_BATCH]]
        first, second = (augment(batch, self.generator).to(self.device) for _ in range(2))
        loss = self.loss(self.model(first), self.model(second), TAU)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.curve.append(loss.item())


def train_on_digits(steps: int, device: str) -> Digits:
    """Train both in lockstep and report the accuracy that one labelled image for each digit gives."""
    images, labels = load_images()
    untrained = _Training(fastcl.nt_xent, steps, device)
    features = {"raw pixels": images.flatten(1), "random encoder": _features(untrained, images)}

    trainings = {"fastcl": _Training(fastcl.nt_xent, steps, device), "dense": _Training(dense_nt_xent, steps, device)}
    torch.backends.cudnn.deterministic = True
    for step in range(1, steps + 1):
        for training in trainings.values():
            training.step(images)
        if step % max(1, steps // 6) == 0:
            losses = ", ".join(f"{training.curve[-1]:.6f} with {name}" for name, training in trainings.items())
            print(f"step {step:4} of {steps}: loss {losses}", flush=True)
    features["trained encoder"] = _features(trainings["fastcl"], images)
    accuracies = {name: one_label_accuracy(x, labels) for name, x in features.items()}
    return Digits({name: training.curve for name, training in trainings.items()}, accuracies)


def load_images() -> tuple[Tensor, Tensor]:
    """All images [1797, 1, 8, 8] in 0 to 1, and their digits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().div(16).view(-1, 1, 8, 8), torch.from_numpy(labels).long()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift of up to one pixel, rotation, scale and contrast of each image, and noise."""

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, zoom = uniform(math.radians(15)), 1 + uniform(0.15)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # Coordinates run from -1 to 1 over 8 pixels: 0.25 is one of them.
    affine = torch.stack((cos, -sin, uniform(0.25), sin, cos, uniform(0.25)), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, images.shape, align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    contrast = 1 + uniform(0.3).view(-1, 1, 1, 1)
    return moved * contrast + 0.1 * torch.randn(images.shape, generator=generator)


def one_label_accuracy(features: Tensor, labels: Tensor) -> float:
    """How many images get the label of the most similar of ten labelled ones, one for each digit; mean over draws."""
    unit = F.normalize(features, dim=1)
    generator = torch.Generator().manual_seed(_SEED)
    of_digit = [(labels == digit).nonzero().flatten() for digit in range(10)]
    hits = []
    for _ in range(_DRAWS):
        labelled = torch.stack([x[torch.randint(len(x), (), generator=generator)] for x in of_digit])
        correct = (unit @ unit[labelled].T).argmax(dim=1) == labels
        correct[labelled] = False  # each labelled image is its own nearest
        hits.append(correct.sum() / (len(labels) - 10))
    return torch.stack(hits).mean().item()


@torch.no_grad()
def _features(training: _Training, images: Tensor) -> Tensor:
    return training.encoder(images.to(training.device)).cpu()
