"""Run the demo: ``python -m examples.demo [--quick]`` from the repository's root."""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING

from examples.demo.compiled import CompiledDense

if TYPE_CHECKING:
    from examples.demo.table import Cells

_SIZES, _QUICK_SIZES = (512, 1024, 2048, 4096, 8192), (128, 256, 512)
_DIM, _LARGE_DIM, _TAU = 128, 64, 0.1
_LIMIT_S, _QUICK_LIMIT_S = 60.0, 2.0
_STEPS, _QUICK_STEPS, _FIRST_STEPS = 200, 12, 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="fastcl on this machine, shown.")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs: half a minute")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="where to write the picture")
    arguments = parser.parse_args()
    quick = arguments.quick
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"the demo needs {' and '.join(missing)}; `make demo` installs them\n")
    sizes = _QUICK_SIZES if quick else _SIZES
    start = time.perf_counter()

    # Before anything imports torch here: that takes seconds in which the other process gets on with its own.
    compiled = CompiledDense((sizes[0], sizes[-2]), _DIM, _TAU)
    try:
        import torch

        from benchmarks.environment import describe_device
        from examples.demo.table import fill_table
        from fastcl import doctor

        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(doctor.summary(), flush=True)
        print(f"\n1. NT-Xent of a batch of pairs: float32, dim {_DIM}, tau {_TAU}", flush=True)
        cells = fill_table(sizes, _DIM, _TAU, device, compiled)
    finally:
        compiled.close()

    from examples.demo.digits import train_on_digits
    from examples.demo.large import run_large_batch
    from examples.demo.picture import draw

    limit = _QUICK_LIMIT_S if quick else _LIMIT_S
    print(f"\n2. The largest batch within {limit:.0f} s", flush=True)
    run_large_batch(_LARGE_DIM, _TAU, device, limit)

    print("\n3. SimCLR on 1,797 images of handwritten digits, without labels, twice from the same seed", flush=True)
    digits = train_on_digits(_QUICK_STEPS if quick else _STEPS, device)
    first = digits.largest_difference(_FIRST_STEPS)
    print(
        f"largest difference between the two curves: {digits.largest_difference():.1e}, "
        f"in the first {_FIRST_STEPS} steps {first:.1e}"
    )
    accuracies = ", ".join(f"{name} {100 * accuracy:.0f} %" for name, accuracy in digits.accuracies.items())
    print(f"accuracy from one labelled image per digit, mean of 20 draws: {accuracies}")

    machine = describe_device(device)
    draw(cells, digits, f"fastcl on {machine}: NT-Xent, float32, dim {_DIM}", arguments.picture)
    print(f"\n{arguments.picture} shows all of it; {time.perf_counter() - start:.0f} s in total")
    print(verdict(cells, machine))


def verdict(cells: Cells, machine: str) -> str:
    """This machine's own sentence, at the largest batch that the eager loss could do."""
    from examples.demo.table import COMPILED, EAGER, FASTCL, Measured, largest_measured, number

    pairs = largest_measured(cells, EAGER)
    if pairs is None:
        return f"{machine}: no batch of the table fits into memory with the dense loss"
    eager, compiled, fast = (cells[pairs, name] for name in (EAGER, COMPILED, FASTCL))
    parts = [f"{number(eager.ms / fast.ms)}x faster than eager"]
    if isinstance(compiled, Measured):
        parts.append(f"{number(compiled.ms / fast.ms)}x faster than torch.compile")
    # A peak of zero only says that the process already held what the call needed.
    parts.append(f"{number(eager.peak / max(fast.peak, 1 << 20))}x less memory")
    return f"{pairs:,} pairs on {machine}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
