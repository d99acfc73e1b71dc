"""CLIP on handwritten digits with a batch of 16,384 pairs: ``python -m examples.clip_digits [--quick]``.

Two towers learn from images, drawn anew in every step from scikit-learn's digits, and their descriptions ("a large
faint seven leaning left"). GradCache runs both towers in chunks, so that a step stays within PEAK_MB of memory on a
CPU. Digits that were held out are then told apart by descriptions alone: no classifier is trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcl
from benchmarks.measure import peak_memory
from examples.demo.digits import load_images

PEAK_MB = 128
"""what a step may take beyond the batch itself; the run fails if one takes more"""
BATCH, CHUNK, STEPS, DIM = 16_384, 512, 40, 64
QUICK_BATCH, QUICK_STEPS = 1_024, 30
HELD_OUT, RATE, TEMPERATURE, SEED = 360, 2.5e-3, 0.1, 0

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES, INKS = ("small", "", "large"), ("faint", "", "bold")
LEANS = (("leaning", "left"), (), ("leaning", "right"))
VOCABULARY = ["", "a", *DIGITS, "small", "large", "faint", "bold", "leaning", "left", "right"]
LENGTH = 6
"""words of the longest description"""


class ImageEncoder(nn.Sequential):
    """Three convolutions, [rows, 1, 8, 8] to [rows, DIM]."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(32 * 4 * 4, DIM)),
        )


class TextEncoder(nn.Module):
    """A bag of words, mixed: [rows, LENGTH] to [rows, DIM]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(len(VOCABULARY), 64, padding_idx=0, mode="sum")
        self.mix = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(self.words(tokens))


def description(digit: str, size: str = "", ink: str = "", lean: tuple[str, ...] = ()) -> str:
    """Such as "a large faint seven leaning left"."""
    return " ".join(word for word in ("a", size, ink, digit, *lean) if word)


def tokenize(text: str) -> list[int]:
    """The words' numbers, padded with zeros."""
    words = [VOCABULARY.index(word) for word in text.split()]
    return words + [0] * (LENGTH - len(words))


DESCRIPTIONS = [
    description(digit, size, ink, lean) for digit in DIGITS for size in SIZES for ink in INKS for lean in LEANS
]
TOKENS = torch.tensor([tokenize(text) for text in DESCRIPTIONS])


def draw_pairs(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of random digits, sizes, contrasts and slants, and the tokens of what describes them."""

    def choose(options: int) -> Tensor:
        return torch.randint(options, (count,), generator=generator)

    def around(values: tuple[float, float, float], choice: Tensor, spread: float) -> Tensor:
        return torch.tensor(values)[choice] + spread * (2 * torch.rand(count, generator=generator) - 1)

    source, size, ink, lean = choose(len(images)), choose(3), choose(3), choose(3)
    angle, zoom = around((-0.5, 0.0, 0.5), lean, math.radians(8)), around((1.3, 1.0, 0.8), size, 0.05)
    cos, sin, zero = zoom * angle.cos(), zoom * angle.sin(), torch.zeros(count)
    grid = F.affine_grid(
        torch.stack((cos, -sin, zero, sin, cos, zero), dim=1).view(-1, 2, 3), [count, 1, 8, 8], align_corners=False
    )
    moved = F.grid_sample(images[source], grid, align_corners=False)
    drawn = around((0.6, 1.0, 1.4), ink, 0.1).view(-1, 1, 1, 1) * moved
    drawn = drawn + 0.05 * torch.randn(drawn.shape, generator=generator)
    return drawn, TOKENS[((labels[source] * 3 + size) * 3 + ink) * 3 + lean]


@dataclass
class Run:
    """What a training leaves behind."""

    image: ImageEncoder
    text: TextEncoder
    held_out: Tensor
    """which images the training never sees"""
    losses: list[float] = field(default_factory=list)
    accuracies: dict[int, float] = field(default_factory=dict)
    """of the held-out digits, by step"""
    peak_mb: float = 0.0


def train(batch: int, steps: int) -> Run:
    """Train both towers; the second step is also measured."""
    torch.manual_seed(SEED)
    images, labels = load_images()
    shuffled = torch.randperm(len(images))
    held_out, kept = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    run = Run(ImageEncoder(), TextEncoder(), held_out)
    loss = fastcl.nn.ClipLoss(TEMPERATURE, normalize=True)
    parameters = [p for module in (run.image, run.text, loss) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    cache = fastcl.GradCache([run.image, run.text], loss, chunk_size=CHUNK)
    generator = torch.Generator().manual_seed(SEED)

    for step in range(1, steps + 1):
        pairs = draw_pairs(images[kept], labels[kept], batch, generator)

        def compute(pairs: tuple[Tensor, Tensor] = pairs) -> None:
            optimizer.zero_grad(set_to_none=False)
            run.losses.append(cache(*pairs).item())

        if step == 2:  # libraries are loaded and gradients exist
            run.peak_mb = peak_memory(compute) / 1e6
        else:
            compute()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 8) == 0 or step == steps:
            run.accuracies[step] = zero_shot(run, images[held_out], labels[held_out])
            accuracy = f"{100 * run.accuracies[step]:.1f} % of the held-out digits named right"
            print(f"step {step:3} of {steps}: loss {run.losses[-1]:.3f}, {accuracy}", flush=True)
    return run


@torch.no_grad()
def zero_shot(run: Run, images: Tensor, labels: Tensor) -> float:
    """How many images are nearest to the description of their own digit."""
    run.image.eval()
    prompts = torch.tensor([tokenize(description(digit)) for digit in DIGITS])
    similarity = F.normalize(run.image(images)) @ F.normalize(run.text(prompts)).T
    run.image.train()
    return (similarity.argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def best_description(run: Run, image: Tensor) -> str:
    """The nearest of all descriptions."""
    run.image.eval()
    similarity = F.normalize(run.image(image[None])) @ F.normalize(run.text(TOKENS)).T
    run.image.train()
    return DESCRIPTIONS[similarity.argmax()]


def draw(run: Run, batch: int, path: Path) -> None:
    """The loss, the accuracy, and what the model says about eight drawings of held-out digits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    images, labels = load_images()
    generator = torch.Generator().manual_seed(SEED + 1)
    drawings, _ = draw_pairs(images[run.held_out], labels[run.held_out], 8, generator)
    figure, axes = plt.subplot_mosaic([["curve", *"abcd"], ["curve", *"efgh"]], figsize=(14, 4.6), layout="constrained")
    for name, drawing in zip("abcdefgh", drawings, strict=True):
        axes[name].imshow(drawing[0], cmap="gray_r", vmin=0, vmax=1.4)
        axes[name].set_title(best_description(run, drawing).replace(" leaning", "\nleaning"), fontsize=9)
        axes[name].axis("off")
    curve, accuracy = axes["curve"], axes["curve"].twinx()
    curve.plot(range(1, len(run.losses) + 1), run.losses, color="#1f6fb4", linewidth=2)
    curve.set(xlabel="step", ylabel="CLIP loss")
    curve.yaxis.label.set_color("#1f6fb4")
    accuracy.plot(run.accuracies.keys(), [100 * x for x in run.accuracies.values()], "o-", color="#d98a29")
    accuracy.set(ylim=(0, 100), ylabel="zero-shot accuracy, %")
    accuracy.yaxis.label.set_color("#d98a29")
    figure.suptitle(f"{batch:,} pairs a step in chunks of {CHUNK}: {run.peak_mb:.0f} MB", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.clip_digits", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small batch, to see that it runs")
    parser.add_argument("--picture", type=Path, default=Path("clip_digits.png"), help="where to write the picture")
    options = parser.parse_args()
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"the example needs {' and '.join(missing)}; `make demo` installs them\n")
    batch, steps = (QUICK_BATCH, QUICK_STEPS) if options.quick else (BATCH, STEPS)
    start = time.perf_counter()
    print(f"{batch:,} pairs a step, both towers in chunks of {CHUNK}", flush=True)
    run = train(batch, steps)
    print(f"peak memory of a step beyond the batch: {run.peak_mb:.0f} MB, {PEAK_MB} MB allowed")
    if run.peak_mb > PEAK_MB:
        parser.exit(1, "that is too much\n")
    draw(run, batch, options.picture)
    accuracy = 100 * run.accuracies[steps]
    print(f"zero-shot accuracy {accuracy:.1f} %, {options.picture} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
