"""``python -m benchmarks fastest FILE.csv...``: notes in fastcl/tuning which of two backends a run found to be faster.

Where no backend is asked for, the one of the nearest case is then taken on devices of this class. **Not run on a GPU
yet.**
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import family, tune
from benchmarks.cases import Case
from benchmarks.providers import FASTCL
from benchmarks.report import read_csv
from fastcl import engine, tuning

RIVALS = ("triton", "cuda")
GAIN = 0.98
"""The second backend is the faster one if it takes less than this share of the first one's time: the rest is noise."""
_PAIRS = 8
"""enough to see which plan a loss has"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks fastest", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="CSV files of runs on this machine's GPU")
    parser.add_argument("--out", type=Path, default=Path(tuning.__file__).parent, help="folder of the tables")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was noted", file=sys.stderr)
        return 1
    properties = torch.cuda.get_device_properties(0)
    rows = [row for path in options.files for row in read_csv(path) if row["device"] == properties.name]
    found = entries(rows)
    if not found:
        print(f"no case has times of {' and '.join(RIVALS)} on {properties.name}")
        return 0
    capability = properties.major, properties.minor
    path, content = tune.table_file(options.out, capability, properties.name, properties.shared_memory_per_block_optin)
    tune.write(path, merged(content, found))
    for entry in found:
        print(*entry.values())
    print(f"wrote {len(found)} entries to {path}")
    return 0


def entries(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """What a table says of each case that both backends were timed on."""
    times: dict[Case, dict[str, float]] = {}
    for row in rows:
        backend = row["provider"].removeprefix(f"{FASTCL} ")
        if row["kind"] == "cuda" and backend in RIVALS and row["median_ms"]:
            case = Case(row["loss"], int(row["pairs"]), int(row["dim"]), row["dtype"])
            times.setdefault(case, {})[backend] = float(row["median_ms"])
    found = []
    for case, of_backend in times.items():
        first, second = (of_backend.get(rival) for rival in RIVALS)
        kind = kind_of_plan(case) if first and second else None
        if kind is not None:
            found.append(
                {
                    "plan": kind,
                    "precision": tuning.precision_class(case.torch_dtype, "ieee"),
                    "shape": {"n": case.rows, "d": case.dim},
                    "fastest": RIVALS[second < GAIN * first],
                }
            )
    return found


def kind_of_plan(case: Case) -> str | None:
    """The kind under which the engine looks up this loss, or None if it has no plan of its own."""
    features, tau = case.resized(_PAIRS).inputs("cpu", torch.float64)
    caught = family.catch(lambda: case.table_row.call(features, tau, reduction="mean", backend="tiled"))
    kinds = {engine.kind(plan) for plan in caught.plans}
    return kinds.pop() if len(kinds) == 1 else None


def merged(content: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table's content with what was found in place of entries of the same case; all others stay."""

    def case(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return entry["plan"], entry["precision"], sorted(entry["shape"].items())

    new = [case(entry) for entry in found]
    kept = [entry for entry in content.get("backends", ()) if case(entry) not in new]
    rest = {key: value for key, value in content.items() if key not in ("backends", "kernels")}
    return rest | {"backends": sorted((*kept, *found), key=case), "kernels": content["kernels"]}
