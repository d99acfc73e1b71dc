"""Gradient caching: ``python -m benchmarks gradcache`` measures a training step against the batch, for each library.

One encoder, a transformer over tokens that both sides of a pair share, one loss, InfoNCE, and one chunk size for all.
Everyone is measured in a process of its own, at each batch anew, and nobody is timed whose gradients are wrong.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastcl
from benchmarks.environment import describe_device, device_slug, git_commit, installed_version
from benchmarks.measure import (
    ValueAndGradients,
    available_bytes,
    peak_memory,
    relative_errors,
    sample_times,
    summarize_times,
)
from benchmarks.peers import import_peer

ROOT = Path(__file__).resolve().parent
TAU, CHUNK, TOKENS, WORDS, WIDTH = 0.05, 128, 16, 1000, 64
SIZES, QUICK_SIZES, GATE_PAIRS = (256, 1024, 4096, 16384), (256, 512), 300
TOLERANCE, MEMORY_SHARE = 1e-3, 0.4
PLAIN_BYTES_PER_PAIR = 600_000
"""what a step without chunks needs, measured"""
COLUMNS = (
    *("date", "commit", "device", "torch", "provider", "version", "pairs", "chunk", "status", "value_error"),
    *("gradient_error", "median_ms", "p20_ms", "p80_ms", "repeats", "cpu_ms", "peak_mb", "times_plain"),
)
"""cpu_ms is processor time, the mean of the repeats: a machine that others use as well changes it little"""

RATIO_OF = {"cpu": "cpu_ms", "cuda": "median_ms"}

Step = Callable[[], Tensor]
"""Adds to the parameters' gradients and returns the loss."""


class Encoder(nn.Sequential):
    """Two layers of a transformer over token ids, [rows, TOKENS] to [rows, WIDTH].

    Given a dict it answers in a dict, which is how sentence-transformers calls its models.
    """

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
        super().__init__(nn.Embedding(WORDS, WIDTH), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    def forward(self, tokens: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        if isinstance(tokens, dict):
            return {"sentence_embedding": self(tokens["input_ids"])}
        return super().forward(tokens).mean(dim=1)


def dense(x: Tensor, y: Tensor) -> Tensor:
    """What people write: the whole similarity matrix and its cross entropy."""
    logits = F.normalize(x) @ F.normalize(y).T / TAU
    return F.cross_entropy(logits, torch.arange(len(x), device=x.device))


def plain(encoder: nn.Module, x: Tensor, y: Tensor) -> Step:
    def step() -> Tensor:
        loss = fastcl.info_nce(encoder(x), encoder(y), TAU)
        loss.backward()
        return loss.detach()

    return step


def own(encoder: nn.Module, x: Tensor, y: Tensor) -> Step:
    cache = fastcl.GradCache([encoder, encoder], fastcl.nn.InfoNCELoss(TAU), chunk_size=CHUNK)
    return lambda: cache(x, y)


def luyug(encoder: nn.Module, x: Tensor, y: Tensor) -> Step:
    cache = import_peer("grad_cache").GradCache(models=[encoder, encoder], chunk_sizes=CHUNK, loss_fn=dense)
    return lambda: cache(x, y)


def sentence_transformers(encoder: nn.Module, x: Tensor, y: Tensor) -> Step:
    losses = import_peer("sentence_transformers.sentence_transformer.losses")
    loss = losses.CachedMultipleNegativesRankingLoss(encoder, scale=1 / TAU, mini_batch_size=CHUNK)

    def step() -> Tensor:
        value = loss([{"input_ids": x}, {"input_ids": y}], None)
        value.backward()
        return value.detach()

    return step


PROVIDERS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Step], str]] = {
    "without chunks": (plain, "fastcl"),
    "fastcl GradCache": (own, "fastcl"),
    "luyug GradCache": (luyug, "GradCache"),
    "sentence-transformers": (sentence_transformers, "sentence-transformers"),
}
"""for each name, the step, and the distribution it is from"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gradcache", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small batches only")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gradcache", help="folder for the CSV file and plot")
    parser.add_argument("--keep", action="store_true", help="write to benchmarks/results/<device>/gradcache instead")
    parser.add_argument("--sizes", type=int, nargs="*", help="batch sizes in pairs")
    parser.add_argument("--providers", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--measure", nargs=2, metavar=("PROVIDER", "PAIRS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.measure:
        provider, pairs = options.measure
        print(json.dumps(measure(provider, int(pairs), device)))
        return 0
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "device": describe_device(device),
        "torch": torch.__version__,
        "chunk": CHUNK,
    }
    folder = ROOT / "results" / device_slug(about["device"]) / "gradcache" if options.keep else options.out
    rows: list[dict] = []
    for pairs in options.sizes or (QUICK_SIZES if options.quick else SIZES):
        for provider in options.providers:
            found = _measure_in_its_own_process(provider, pairs, device)
            rows.append(about | {"provider": provider, "pairs": pairs} | found)
        _compare_to_plain(rows, RATIO_OF[device])
        for row in rows[-len(options.providers) :]:
            print(format_row(row), flush=True)
        write(rows, folder / "gradcache.csv")
    for line in draw(rows, folder / "gradcache.png", RATIO_OF[device]):
        print(line)
    return 1 if any(row["status"].startswith("gate red") for row in rows) else 0


def measure(provider: str, pairs: int, device: str) -> dict:
    """Errors, peak memory and times of one provider at one batch, in this process."""
    build, distribution = PROVIDERS[provider]
    found: dict = {"version": fastcl.__version__ if distribution == "fastcl" else installed_version(distribution) or ""}
    try:
        errors = relative_errors(*gate(build, device))
    except ImportError as error:
        return found | {"status": f"missing: {str(error).splitlines()[0]}"}
    found |= {"value_error": errors.value, "gradient_error": errors.gradient}
    if not max(errors) < TOLERANCE:
        return found | {"status": f"gate red: errors above {TOLERANCE:g}"}
    if build is plain and pairs * PLAIN_BYTES_PER_PAIR > MEMORY_SHARE * available_bytes(device):
        return found | {"status": f"left out: would need about {pairs * PLAIN_BYTES_PER_PAIR / 1e9:.1f} GB"}
    encoder, x, y = inputs(pairs, device)
    build(encoder, x[:CHUNK], y[:CHUNK])()  # the gradients exist, threads and libraries are there
    step = build(encoder, x, y)
    peak = peak_memory(step, device)
    start = time.process_time()
    times_ms = sample_times(step, device, budget_s=4.0, warmup=0)
    cpu_ms = (time.process_time() - start) * 1e3 / len(times_ms)
    times = {name: round(x, 3) for name, x in summarize_times(times_ms)._asdict().items()}
    return found | {"status": "ok", "peak_mb": round(peak / 1e6, 1), "cpu_ms": round(cpu_ms, 3)} | times


def gate(build: Callable, device: str) -> tuple[ValueAndGradients, ValueAndGradients]:
    """What a provider finds without dropout, and the dense loss of the whole batch in float64."""
    encoder, x, y = inputs(GATE_PAIRS, device)
    encoder.eval()
    value = build(encoder, x, y)()
    found = ValueAndGradients(value, tuple(p.grad for p in encoder.parameters()))
    encoder.zero_grad()
    encoder.double()
    exact = dense(encoder(x), encoder(y))
    exact.backward()
    return found, ValueAndGradients(exact.detach(), tuple(p.grad for p in encoder.parameters()))


def inputs(pairs: int, device: str) -> tuple[Encoder, Tensor, Tensor]:
    """The encoder and the tokens; the second of a pair is the first with some tokens changed."""
    torch.manual_seed(0)
    encoder = Encoder().to(device)
    x = torch.randint(WORDS, (pairs, TOKENS), device=device)
    y = torch.where(torch.rand(x.shape, device=device) < 0.3, torch.randint_like(x, WORDS), x)
    return encoder, x, y


def _measure_in_its_own_process(provider: str, pairs: int, device: str) -> dict:
    command = [sys.executable, "-m", "benchmarks", "gradcache", "--measure", provider, str(pairs)]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True)
    if done.returncode:
        return {"status": f"failed: {done.stderr.strip().splitlines()[-1][:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _compare_to_plain(rows: list[dict], column: str) -> None:
    plain_ms = {row["pairs"]: row.get(column) for row in rows if row["provider"] == "without chunks"}
    for row in rows:
        if row.get(column) and plain_ms.get(row["pairs"]):
            row["times_plain"] = round(row[column] / plain_ms[row["pairs"]], 3)


def format_row(row: dict) -> str:
    """One line for the terminal."""
    start = f"{row['pairs']:>7,} pairs  {row['provider']:<22}"
    if row["status"] != "ok":
        return start + row["status"]
    times = f"{row['times_plain']:.2f}x without chunks" if "times_plain" in row else ""
    ms = f"{row['median_ms']:>10,.0f} ms ({row['cpu_ms']:,.0f} of processor time)"
    return f"{start}{ms} {row['peak_mb']:>8,.0f} MB  {times}"


def write(rows: Sequence[dict], path: Path) -> None:
    """All rows, with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: Sequence[dict], path: Path, column: str) -> list[str]:
    """Time of a pair and peak memory against the batch; returns lines that say what was written, or why not."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return ["no plot: matplotlib is not installed"]
    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for provider in dict.fromkeys(row["provider"] for row in rows if row["status"] == "ok"):
        measured = [row for row in rows if row["provider"] == provider and row["status"] == "ok"]
        pairs = [row["pairs"] for row in measured]
        style = {"marker": "o", "markersize": 4, "linewidth": 2.2 if provider.startswith("fastcl") else 1.1}
        time_axes.plot(pairs, [row[column] / row["pairs"] for row in measured], label=provider, **style)
        memory_axes.plot(pairs, [row["peak_mb"] for row in measured], label=provider, **style)
    for axes, name in ((time_axes, f"{column} of a step for each pair"), (memory_axes, "peak memory of a step, MB")):
        axes.set(xlabel="pairs", ylabel=name, xscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    time_axes.set_ylim(bottom=0)
    memory_axes.set_yscale("log")
    time_axes.legend(fontsize=8)
    figure.suptitle(f"a training step in chunks of {CHUNK}: {rows[0]['device']}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return [f"plot: {path}"]
