"""MoCo, MoCHi and BYOL on handwritten digits, without labels: ``python -m examples.moco_digits [--small]``.

Three ways to use an encoder that follows the trained one by momentum. MoCo takes its outputs as keys and keeps those
of past batches in a queue, as negatives; MoCHi adds mixtures of the hardest of them; BYOL has no negatives and predicts
the other view's output. What each learns is told by a linear classifier on held-out images.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcl
from examples.demo.digits import augment, load_images
from examples.linear_probe import DRAWS, FEW, Accuracy, linear_probe, split
from fastcl import Reduce, Term
from fastcl.memory import MomentumEncoder, Queue, cosine_momentum

BATCH, QUEUE, STEPS, SMALL_STEPS, PROBED_EVERY, SEED = 256, 1024, 300, 40, 50, 0
DIM, TEMPERATURE, RATE, MOMENTUM = 64, 0.2, 2e-3, 0.98
HARDEST, MIXED, MIXED_WITH_QUERY = 128, 64, 16
"""MoCHi's N, s and s': how many negatives are mixed, and how many mixtures there are of each kind"""


class Encoder(nn.Sequential):
    """Three convolutions, 8 x 8 pixels to 128 features."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 128)),
        )


def mlp(inputs: int) -> nn.Sequential:
    """A projector or a predictor."""
    return nn.Sequential(nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, DIM))


class MoCo(nn.Module):
    """The key of the other view against a queue of past keys."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.online = nn.Sequential(self.encoder, mlp(128))
        self.target = MomentumEncoder(self.online, MOMENTUM)
        self.queue = Queue(QUEUE, DIM)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        """The keys join the queue; until that is full, the negatives are the other keys of the batch."""
        query, key = F.normalize(self.online(first)), F.normalize(self.target(second))
        loss = self.contrast(query, key) if len(self.queue) == QUEUE else fastcl.info_nce(query, key, TEMPERATURE)
        self.queue.enqueue(key)
        return loss

    def contrast(self, query: Tensor, key: Tensor) -> Tensor:
        return fastcl.info_nce(query, key, TEMPERATURE, negatives=self.queue.keys)

    def follow(self, step: int, steps: int) -> None:
        """After each step of the optimizer."""
        self.target.update(self.online)


class MoCHi(MoCo):
    """MoCo, whose queue is joined by mixtures of each query's hardest negatives, some of them with the query itself."""

    def contrast(self, query: Tensor, key: Tensor) -> Tensor:
        negatives = self.queue.keys.clone()
        (of_queue,) = fastcl.pairwise(query, negatives, [Term(Reduce.LSE)], 1 / TEMPERATURE)
        mixed = torch.einsum("bd,bkd->bk", query, mix(query.detach(), negatives)) / TEMPERATURE
        positive = (query * key).sum(dim=1) / TEMPERATURE
        return F.softplus(torch.logaddexp(of_queue, mixed.logsumexp(dim=1)) - positive).mean()


class BYOL(nn.Module):
    """The other view's output is predicted, both ways; nothing is a negative."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.online = nn.Sequential(self.encoder, mlp(128))
        self.predictor = mlp(DIM)
        self.target = MomentumEncoder(self.online, MOMENTUM)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        pairs = ((first, second), (second, first))
        return sum(fastcl.negative_cosine_similarity(self.predictor(self.online(x)), self.target(y)) for x, y in pairs)

    def follow(self, step: int, steps: int) -> None:
        """After each step of the optimizer: the slower, the later."""
        self.target.update(self.online, cosine_momentum(step, steps, MOMENTUM))


METHODS = {"MoCo": MoCo, "MoCo + MoCHi": MoCHi, "BYOL": BYOL}


def mix(query: Tensor, negatives: Tensor) -> Tensor:
    """Synthetic negatives [B, MIXED + MIXED_WITH_QUERY, D] of each query, of unit length (Kalantidis et al., 2020).

    Pairs of its hardest negatives at random proportions, and hardest negatives with up to half of the query.
    """
    hardest = negatives[fastcl.top_k(query, negatives, HARDEST).indices]

    def draw(count: int) -> Tensor:
        chosen = torch.randint(HARDEST, (len(query), count))
        return hardest.gather(1, chosen[:, :, None].expand(-1, -1, query.shape[1]))

    pairs = torch.lerp(draw(MIXED), draw(MIXED), torch.rand(len(query), MIXED, 1))
    share = 0.5 * torch.rand(len(query), MIXED_WITH_QUERY, 1)
    return F.normalize(torch.cat((pairs, torch.lerp(draw(MIXED_WITH_QUERY), query[:, None], share)), dim=1), dim=2)


@dataclass
class Run:
    """What a training leaves behind."""

    losses: list[float] = field(default_factory=list)
    accuracies: dict[int, Accuracy] = field(default_factory=dict)
    """by step"""


def probe(encoder: Encoder, images: Tensor, labels: Tensor) -> Accuracy:
    with torch.no_grad():
        return linear_probe(encoder(images), labels)


def train(method: type[nn.Module], steps: int, images: Tensor, labels: Tensor) -> Run:
    """From the same seed for each method: the same first encoder, batches and views."""
    torch.manual_seed(SEED)
    model, run = method(), Run()
    kept, _ = split(labels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(SEED)
    run.accuracies[0] = probe(model.encoder, images, labels)
    for step in range(1, steps + 1):
        batch = images[kept[torch.randperm(len(kept), generator=generator)[:BATCH]]]
        loss = model.loss(augment(batch, generator), augment(batch, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.follow(step, steps)
        run.losses.append(loss.item())
        if step % PROBED_EVERY == 0 or step == steps:
            run.accuracies[step] = probe(model.encoder, images, labels)
    return run


def draw(accuracies: dict[str, Accuracy], runs: dict[str, Run], path: Path) -> None:
    """The losses and the accuracies while training, and the accuracies at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss, curve, bars) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    colors = dict(zip(runs, ("#1f6fb4", "#7a4fa3", "#d98a29"), strict=True))
    for name, run in runs.items():
        axes = loss.twinx() if name == "BYOL" else loss
        axes.plot(range(1, len(run.losses) + 1), run.losses, color=colors[name], linewidth=1)
        few = [100 * accuracy.few for accuracy in run.accuracies.values()]
        curve.plot(run.accuracies.keys(), few, "o-", color=colors[name], label=name)
    loss.set(xlabel="step", title="Loss (BYOL's: axis on the right)")
    curve.set(xlabel="step", ylabel="accuracy, %", title=f"Linear probe, {FEW} labels per digit")
    curve.legend(frameon=False)
    for place, (name, accuracy) in enumerate(accuracies.items()):
        color = colors.get(name, "#888888")
        bars.barh(
            [place - 0.2, place + 0.2], [100 * accuracy.few, 100 * accuracy.all], 0.38, color=[color + "99", color]
        )
    bars.set_yticks(range(len(accuracies)), accuracies.keys())
    bars.invert_yaxis()
    bars.set(xlim=(50, 100), xlabel="accuracy, %", title=f"{FEW} labels per digit (pale), all labels")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.moco_digits", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--picture", type=Path, default=Path("moco_digits.png"), help="where to write the picture")
    options = parser.parse_args()
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"the example needs {' and '.join(missing)}; `make demo` installs them\n")
    start, steps = time.perf_counter(), SMALL_STEPS if options.small else STEPS
    images, labels = load_images()
    runs = {}
    for name, method in METHODS.items():
        began = time.perf_counter()
        runs[name] = train(method, steps, images, labels)
        print(
            f"{name}: {steps} steps in {time.perf_counter() - began:.0f} s, loss {runs[name].losses[-1]:.3f}",
            flush=True,
        )
    accuracies = {"raw pixels": linear_probe(images, labels), "random encoder": runs["MoCo"].accuracies[0]}
    accuracies |= {name: run.accuracies[steps] for name, run in runs.items()}
    print(f"\nlinear probe on held-out digits, from {FEW} labels per digit (mean of {DRAWS} draws) and from all labels")
    for name, accuracy in accuracies.items():
        print(f"{name:15} {accuracy}")
    draw(accuracies, runs, options.picture)
    print(f"\n{options.picture}; {time.perf_counter() - start:.0f} s in total")


if __name__ == "__main__":
    main()
