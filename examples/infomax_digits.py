"""Deep InfoMax on handwritten digits, without labels: ``python -m examples.infomax_digits [--small]``.

One vector for the whole image should tell the parts of this image from the parts of others (Hjelm et al., 2019): for
each image and each of 16 places of its feature map, InfoNCE against all places of all other images of the batch. And
the same across views (Bachman et al., 2019), the parts from one augmentation of the image and the whole from another
one, so that what they share is the digit and not the strokes' exact place. What the vector knows is told by a linear
classifier on held-out images.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcl
from examples.demo.digits import augment, load_images
from examples.linear_probe import DRAWS, FEW, Accuracy, linear_probe, split
from fastcl import Mask, Reduce, Term

BATCH, STEPS, SMALL_STEPS, PROBED_EVERY, SEED = 256, 300, 40, 50, 0
DIM, TEMPERATURE, RATE = 64, 0.2, 2e-3


class Encoder(nn.Module):
    """Images as vectors of 128 features, by way of maps [64, 4, 4] of which each place sees 5 x 5 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()),
        )
        self.whole = nn.Sequential(
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 128)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.whole(self.local(images))


class InfoMax(nn.Module):
    """An encoder, and the two projections in whose space parts and wholes are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.project_local = nn.Sequential(nn.Conv2d(64, 128, 1), nn.ReLU(), nn.Conv2d(128, DIM, 1))
        self.project_whole = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, DIM))

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        """The parts of one view against the whole of the other."""
        local, whole = self.encoder.local(first), self.encoder(second)
        return local_global_loss(self.project_local(local).flatten(2), self.project_whole(whole), TEMPERATURE)


def local_global_loss(local: Tensor, whole: Tensor, tau: float) -> Tensor:
    """Of feature maps [B, D, places] and vectors [B, D]: the mean over images and places.

    -log of the positive's share among itself and the places of all other images; other places of the same image are
    neither positive nor negative.
    """
    whole, places = F.normalize(whole, dim=1), F.normalize(local, dim=1).unbind(dim=2)
    of_others = [Term(Reduce.LSE, Mask(self_pair=False))]
    negatives = torch.stack([fastcl.pairwise(whole, place, of_others, 1 / tau)[0] for place in places]).logsumexp(dim=0)
    positives = torch.stack([(whole * place).sum(dim=1) for place in places]) / tau
    return F.softplus(negatives - positives).mean()


Views = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]

VARIANTS: dict[str, Views] = {
    "Deep InfoMax": lambda batch, generator: (batch, batch),
    "across views": lambda batch, generator: (augment(batch, generator), augment(batch, generator)),
}


@dataclass
class Run:
    """What a training leaves behind."""

    losses: list[float] = field(default_factory=list)
    accuracies: dict[int, Accuracy] = field(default_factory=dict)
    """by step"""


def probe(encoder: Encoder, images: Tensor, labels: Tensor) -> Accuracy:
    with torch.no_grad():
        return linear_probe(encoder(images), labels)


def train(views: Views, steps: int, images: Tensor, labels: Tensor) -> Run:
    """From the same seed for each way to make views; only the probe looks at labels."""
    torch.manual_seed(SEED)
    model, run = InfoMax(), Run()
    kept, _ = split(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(SEED)
    run.accuracies[0] = probe(model.encoder, images, labels)
    for step in range(1, steps + 1):
        batch = images[kept[torch.randperm(len(kept), generator=generator)[:BATCH]]]
        loss = model.loss(*views(batch, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        if step % PROBED_EVERY == 0 or step == steps:
            run.accuracies[step] = probe(model.encoder, images, labels)
    return run


def draw(runs: dict[str, Run], pixels: Accuracy, path: Path) -> None:
    """The losses, and the accuracies from few labels and from all beside those of the pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss, few, everything) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for (name, run), color in zip(runs.items(), ("#d98a29", "#1f6fb4"), strict=True):
        loss.plot(range(1, len(run.losses) + 1), run.losses, color=color, linewidth=1)
        for axes, labelled in ((few, "few"), (everything, "all")):
            values = [100 * getattr(accuracy, labelled) for accuracy in run.accuracies.values()]
            axes.plot(run.accuracies.keys(), values, "o-", color=color, label=name)
    few.axhline(100 * pixels.few, color="#888888", linestyle=":", label="raw pixels")
    everything.axhline(100 * pixels.all, color="#888888", linestyle=":", label="raw pixels")
    loss.set(xlabel="step", title="Loss")
    few.set(xlabel="step", ylabel="accuracy, %", title=f"Linear probe, {FEW} labels per digit")
    everything.set(xlabel="step", ylabel="accuracy, %", title="Linear probe, all labels")
    few.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.infomax_digits", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--picture", type=Path, default=Path("infomax_digits.png"), help="where to write the picture")
    options = parser.parse_args()
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"the example needs {' and '.join(missing)}; `make demo` installs them\n")
    start, steps = time.perf_counter(), SMALL_STEPS if options.small else STEPS
    images, labels = load_images()
    runs = {}
    for name, views in VARIANTS.items():
        began = time.perf_counter()
        runs[name] = run = train(views, steps, images, labels)
        print(f"{name}: {steps} steps in {time.perf_counter() - began:.0f} s, loss {run.losses[-1]:.3f}", flush=True)
    pixels = linear_probe(images, labels)
    accuracies = {"raw pixels": pixels, "random encoder": runs["Deep InfoMax"].accuracies[0]}
    accuracies |= {name: run.accuracies[steps] for name, run in runs.items()}
    print(f"\nlinear probe on held-out digits, from {FEW} labels per digit (mean of {DRAWS} draws) and from all labels")
    for name, accuracy in accuracies.items():
        print(f"{name:15} {accuracy}")
    draw(runs, pixels, options.picture)
    print(f"\n{options.picture}; {time.perf_counter() - start:.0f} s in total")


if __name__ == "__main__":
    main()
