"""GPUs as the cost model knows them: published figures, each with its source, and two rates that a run can replace.

Not in any data sheet, hence assumptions: ``SUSTAINED`` and ``l2_bytes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SUSTAINED = {"gemm": 0.80, "copy": 0.90}
"""What remains of the published peaks: 790 of 989 TFLOP/s (bf16) and 4.3 of 4.8 TB/s are reported for an H200."""


@dataclass(frozen=True)
class Device:
    """One GPU. Rates for each SM are in a clock; ``clock`` is the boost clock in Hz, at which all but products run."""

    name: str
    capability: tuple[int, int]
    sms: int
    clock: float
    gemm: Mapping[str, float]
    """FLOP/s of large library products by precision: half, tf32, float32"""
    copy: float
    """bytes/s of memory, read and written together"""
    l2_size: int
    l2_bytes: float
    """bytes/clock an SM gets from L2 while its neighbours ask for the same lines"""
    shared_memory: int
    """bytes of an SM"""
    sources: str
    exponentials: int = 16
    """MUFU results/clock, the same from sm_80 to sm_120: CUDA Programming Guide, arithmetic throughput"""
    lanes: int = 128
    """instructions/clock, four warps of 32"""
    shared_bytes: int = 128
    """bytes/clock of shared memory, read and written together"""
    registers: int = 65_536


def _sustained(half: float, tf32: float, float32: float) -> dict[str, float]:
    peaks = {"half": half, "tf32": tf32, "float32": float32}
    return {precision: SUSTAINED["gemm"] * 1e12 * peak for precision, peak in peaks.items()}


DEVICES = {
    "a100": Device(
        "A100 SXM 80 GB",
        (8, 0),
        108,
        1.41e9,
        _sustained(312, 156, 19.5),
        SUSTAINED["copy"] * 2.039e12,
        40 << 20,
        40,
        164 << 10,
        "NVIDIA A100 data sheet and architecture white paper",
    ),
    "h100": Device(
        "H100 SXM",
        (9, 0),
        132,
        1.83e9,
        _sustained(989.4, 494.7, 66.9),
        SUSTAINED["copy"] * 3.35e12,
        50 << 20,
        40,
        228 << 10,
        "NVIDIA H100 data sheet and architecture white paper",
    ),
    "h200": Device(
        "H200 SXM",
        (9, 0),
        132,
        1.83e9,
        _sustained(989.4, 494.7, 66.9) | {"half": 790e12},
        4.3e12,
        50 << 20,
        40,
        228 << 10,
        "NVIDIA H200 data sheet; bf16 products and copy as reported for such devices, not by a run of ours",
    ),
    "b200": Device(
        "B200",
        (10, 0),
        148,
        1.85e9,
        _sustained(2250, 1125, 75),
        SUSTAINED["copy"] * 7.7e12,
        126 << 20,
        40,
        228 << 10,
        "NVIDIA HGX B200 data sheet; SMs: Chips and Cheese, NVIDIA's B200; clock from the peak at 8,192 FLOP/clock/SM",
    ),
    "l4": Device(
        "L4",
        (8, 9),
        58,
        2.04e9,
        _sustained(121, 60, 30.3),
        SUSTAINED["copy"] * 0.3e12,
        48 << 20,
        16,
        100 << 10,
        "NVIDIA L4 data sheet (without sparsity)",
    ),
    "rtx4090": Device(
        "RTX 4090",
        (8, 9),
        128,
        2.52e9,
        _sustained(165.2, 82.6, 82.6),
        SUSTAINED["copy"] * 1.008e12,
        72 << 20,
        16,
        100 << 10,
        "NVIDIA Ada architecture white paper (float32 accumulation, without sparsity)",
    ),
}
"""By the name that ``--device`` takes."""
