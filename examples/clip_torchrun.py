"""CLIP on several ranks: each image meets the texts of all, so the curve is that of one process with the whole batch.

    torchrun --nproc-per-node 2 examples/clip_torchrun.py     # gloo on CPUs, NCCL on GPUs (not run on a GPU yet)
    python examples/clip_torchrun.py                          # one process, the same batches

Images and texts are noisy views of hidden topics through two random mixings, so that there is something to learn. What
several ranks need: the process group, each rank's slice of the batch, DDP around the model, and ``group=`` in the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import fastcl

TOPICS, PIXELS, WORDS, DIM = 12, 64, 48, 32


class Clip(nn.Module):
    """Two encoders and the logarithm of the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(PIXELS, 96), nn.GELU(), nn.Linear(96, DIM))
        self.text = nn.Sequential(nn.Linear(WORDS, 96), nn.GELU(), nn.Linear(96, DIM))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return normalize(self.image(images), dim=1), normalize(self.text(texts), dim=1), self.log_scale.exp()


def batches(size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Global batches, the same in every process."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    to_pixels, to_words = draw(TOPICS, PIXELS), draw(TOPICS, WORDS)
    for _ in range(steps):
        topics = draw(size, TOPICS)
        yield topics @ to_pixels + 0.5 * draw(size, PIXELS), topics @ to_words + 0.5 * draw(size, WORDS)


@contextlib.contextmanager
def process_group() -> Iterator[tuple[dist.ProcessGroup | None, torch.device]]:
    """The group that torchrun started, or None, and this rank's device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if "RANK" not in os.environ:
        yield None, device
        return
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield dist.group.WORLD, device
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="the global batch (default: 256)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--exchange", choices=("auto", "ring", "gather"), default="auto")
    args = parser.parse_args()
    with process_group() as (group, device):
        torch.manual_seed(0)
        model = Clip().to(device)
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        train = model if group is None else DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step, batch in enumerate(batches(args.batch, args.steps), 1):
            images, texts = (x.tensor_split(ranks)[rank].to(device) for x in batch)
            loss, stats = fastcl.clip_loss(
                *train(images, texts), return_stats=True, group=group, exchange=args.exchange
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if rank == 0 and step % 10 == 0:
                print(
                    f"step {step:3}: loss {loss:.4f}, accuracy {stats.accuracy:.3f}, scale {stats.scale:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
