"""How many negatives are worth it, at which temperature and width: ``python -m examples.negatives [--small]``.

InfoNCE on scikit-learn's digits, without labels. Each query has its other view as positive and the same shared
negatives as all others: views of random images, encoded anew in every step. One of three numbers varies, the others
stay; the batch of queries and the steps are the same for all. A linear classifier on held-out images tells what was
learned, and the memory of the loss is measured beside the dense one's.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcl
from benchmarks.measure import peak_memory
from examples.demo.digits import augment, load_images
from examples.linear_probe import DRAWS, FEW, Accuracy, linear_probe, split, spread_percent

BATCH, STEPS, SMALL_STEPS, SEEDS, SMALL_SEEDS, RATE, POOL = 256, 100, 30, 3, 1, 4e-3, 8192


@dataclass(frozen=True)
class Setting:
    """What a training is done with."""

    negatives: int = 256
    temperature: float = 0.2
    width: int = 32
    """of the projection in whose space similarities are taken"""


SWEEPS: dict[str, Sequence[float]] = {
    "negatives": (1, 4, 16, 64, 256, 1024, 4096),
    "temperature": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "width": (2, 4, 8, 16, 32, 128),
}
SMALL_SWEEPS: dict[str, Sequence[float]] = {"negatives": (1, 256), "temperature": (0.2, 1.0), "width": (2, 32)}
MEASURED = (1024, 4096, 16_384, 65_536)
"""numbers of negatives whose loss is measured for memory"""

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def fast_loss(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Of rows of unit length, so that no copy of the negatives is made."""
    return fastcl.info_nce(query, key, temperature, negatives=negatives, normalize=False)


def dense_loss(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """The same by its formula."""
    positive = (query * key).sum(dim=1, keepdim=True)
    logits = torch.cat((positive, query @ negatives.T), dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


class Encoder(nn.Sequential):
    """8 x 8 pixels to 128 features."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128))


def train(setting: Setting, steps: int, seed: int, images: Tensor, labels: Tensor) -> Accuracy:
    """The probe of an encoder, which no label was used for."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    features = Encoder()
    model = nn.Sequential(features, nn.ReLU(), nn.Linear(128, setting.width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    kept = images[split(labels)[0]]
    pool = augment(kept[torch.randint(len(kept), (POOL,), generator=generator)], generator)
    for _ in range(steps):
        batch = kept[torch.randperm(len(kept), generator=generator)[:BATCH]]
        query, key = (F.normalize(model(augment(batch, generator))) for _ in range(2))
        negatives = F.normalize(model(pool[torch.randperm(POOL, generator=generator)[: setting.negatives]]))
        loss = fast_loss(query, key, negatives, setting.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return linear_probe(features(images), labels)


def peak_megabytes(loss: Loss, negatives: int, setting: Setting) -> float:
    """Of value and gradients, the gradients included, beyond the features."""
    generator = torch.Generator().manual_seed(0)
    features = [
        F.normalize(torch.randn(rows, setting.width, generator=generator)).requires_grad_()
        for rows in (BATCH, BATCH, negatives)
    ]

    def step() -> None:
        torch.autograd.grad(loss(*features, setting.temperature), features)

    if negatives == MEASURED[0]:  # libraries are loaded by the first call
        step()
    return peak_memory(step) / 1e6


def draw(found: dict[str, dict[float, list[Accuracy]]], pixels: Accuracy, memory: dict[str, list], path: Path) -> None:
    """Accuracies against each of the three numbers, and memory against the negatives."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 4.2), layout="constrained")
    for panel, (name, curve) in zip(axes, found.items(), strict=False):
        for labelled, color, label in (("few", "#d98a29", f"{FEW} labels per digit"), ("all", "#1f6fb4", "all labels")):
            values = [[100 * getattr(accuracy, labelled) for accuracy in runs] for runs in curve.values()]
            means = [statistics.mean(x) for x in values]
            deviations = [statistics.stdev(x) if len(x) > 1 else 0 for x in values]
            panel.errorbar(list(curve), means, deviations, fmt="o-", capsize=3, color=color, label=label)
            panel.axhline(100 * getattr(pixels, labelled), color=color, linestyle=":", linewidth=1)
        panel.set(xscale="log", xlabel=name, ylim=(70, 100))
        ticks = list(curve)[::2] if len(curve) > 6 else list(curve)
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.minorticks_off()
    axes[0].set(ylabel="accuracy of a linear probe, %")
    axes[0].legend(frameon=False, loc="lower right", title="dotted: raw pixels")
    for (name, values), color in zip(memory.items(), ("#888888", "#1f6fb4"), strict=True):
        axes[3].plot(MEASURED, values, "o-", color=color, label=name)
    axes[3].set(xscale="log", xlabel="negatives", title=f"MB of the loss of {BATCH} queries")
    axes[3].set_xticks(MEASURED, [f"{tick:,}" for tick in MEASURED])
    axes[3].minorticks_off()
    axes[3].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.negatives", description=__doc__)
    parser.add_argument("--small", action="store_true", help="few settings and steps, to see that it runs")
    parser.add_argument("--picture", type=Path, default=Path("negatives.png"), help="where to write the picture")
    options = parser.parse_args()
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"the example needs {' and '.join(missing)}; `make demo` installs them\n")
    sweeps, steps, seeds = (SMALL_SWEEPS, SMALL_STEPS, SMALL_SEEDS) if options.small else (SWEEPS, STEPS, SEEDS)

    print(f"MB that value and gradients of {BATCH} queries take at their peak; the negatives' own gradient is in both")
    columns = ("negatives", "their gradient", "one copy of the logits", "dense, measured", "fastcl, measured")
    print("  ".join(columns))
    memory: dict[str, list[float]] = {"dense": [], "fastcl": []}
    for negatives in MEASURED:
        for name, loss in (("fastcl", fast_loss), ("dense", dense_loss)):
            memory[name].append(peak_megabytes(loss, negatives, Setting()))
        logits = 4 * BATCH * (negatives + 1) / 1e6
        numbers = (4 * negatives * Setting.width / 1e6, logits, memory["dense"][-1], memory["fastcl"][-1])
        cells = (f"{number:{len(column)}.1f}" for number, column in zip(numbers, columns[1:], strict=True))
        print(f"{negatives:9,}  " + "  ".join(cells), flush=True)

    images, labels = load_images()
    pixels = linear_probe(images, labels)
    settings = {name: [replace(Setting(), **{name: value}) for value in values] for name, values in sweeps.items()}
    runs = {
        setting: [train(setting, steps, seed, images, labels) for seed in range(seeds)]
        for setting in dict.fromkeys(setting for sweep in settings.values() for setting in sweep)
    }
    print(f"\n{steps} steps of {BATCH} images; mean and deviation of {seeds} seeds; unless varied, {Setting()}")
    print(f"linear probe on held-out digits, from {FEW} labels per digit (mean of {DRAWS} draws) and from all labels")
    print(f"{'raw pixels':20} {spread_percent([pixels])}")
    found: dict[str, dict[float, list[Accuracy]]] = {}
    for name, sweep in settings.items():
        found[name] = {asdict(setting)[name]: runs[setting] for setting in sweep}
        for value, accuracies in found[name].items():
            print(f"{name:11} {value:8,} {spread_percent(accuracies)}")
    draw(found, pixels, memory, options.picture)
    print(f"\n{options.picture}; {time.process_time():.0f} s of processor time")


if __name__ == "__main__":
    main()
