"""``python -m benchmarks rates``: a device's rates of plain matrix products and of copying, as JSON.

They are what every time is a fraction of, and what ``python -m benchmarks roofline --rates`` predicts with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.environment import describe_device
from benchmarks.measure import copy_rate, gemm_rate


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks rates", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each rate")
    options = parser.parse_args(arguments)
    rates = measure(options.device, options.budget)
    for name, rate in rates.items():
        if name != "device":
            print(f"{name:<10}{rate / 1e12:>10,.3f} {'TB/s' if name == 'copy' else 'TFLOP/s'}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rates, indent=2) + "\n")
    return 0


def measure(device: str, budget_s: float) -> dict[str, float | str]:
    """FLOP/s by dtype, ``tf32`` being float32 at the matmul precision "high", and bytes/s of ``copy``."""
    rates: dict[str, float | str] = {"device": describe_device(device)}
    precision = torch.get_float32_matmul_precision()
    try:
        for name in ("bfloat16", "float16", "tf32", "float32"):
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            dtype = torch.float32 if name == "tf32" else getattr(torch, name)
            rates[name] = gemm_rate(dtype, device, budget_s=budget_s).flops
    finally:
        torch.set_float32_matmul_precision(precision)
    size = 1 << (30 if device == "cuda" else 26)
    return rates | {"copy": copy_rate(device, size=size, budget_s=budget_s)}
