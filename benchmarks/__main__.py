"""The command: ``python -m benchmarks`` measures the losses. Its other words do something else:

fastest notes in fastcl/tuning which backend a run found to be faster, gradcache measures a training step in chunks,
status brings the README's and the GPU page's tables up to date, rates measures plain products and copies, roofline
predicts from a cost model, targets judges the rows of a run, tune looks for the Triton kernels' block sizes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from benchmarks import fastest, gradcache, peak_table, plots, predictions, rates, status, targets, tune
from benchmarks.cases import SUITES, Case, suite
from benchmarks.environment import device_slug, git_commit
from benchmarks.measure import GemmRate
from benchmarks.providers import Provider, providers
from benchmarks.report import Machine, Row, format_case, make_rows, read_csv, write_csv
from benchmarks.runner import Limits, Runner

ROOT = Path(__file__).resolve().parent
_SUITE_HELP = "comma-separated, default usual. " + "; ".join(f"{name}: {what}" for name, what in SUITES.items())
COMMANDS = {
    "fastest": fastest.main,
    "gradcache": gradcache.main,
    "status": status.main,
    "rates": rates.main,
    "roofline": predictions.main,
    "targets": targets.main,
    "tune": tune.main,
}
QUICK = Limits(rounds=3, budget_s=0.2, call_s=5.0, request_s=60.0, total_s=90.0)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    return measure(parse(arguments))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", type=_suites, default=("usual",), help=_SUITE_HELP)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, within two minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the CSV file and the plots")
    parser.add_argument("--keep", action="store_true", help="write to benchmarks/results/<device> instead of --out")
    parser.add_argument("--cases", help="comma-separated parts of case names, for example nt_xent-512x")
    parser.add_argument("--providers", help="comma-separated parts of provider names, for example fastcl,dense")
    parser.add_argument("--threads", type=int, default=0, help="threads of each process (default: torch's own choice)")
    parser.add_argument(
        "--one-thread", action="store_true", help="the CPU engine on one thread as well, to see how it scales"
    )
    parser.add_argument("--dtype", help="comma-separated dtypes (default: the suite's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--limit", type=float, help="seconds after which remaining cases are left out")
    parser.add_argument("--list", action="store_true", help="print the names of cases and providers")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    offered = [suite(device, name, quick=options.quick, dtypes=_parts(options.dtype)) for name in options.suite]
    cases = _chosen(list(dict.fromkeys(itertools.chain(*offered))), options.cases)
    competitors = _chosen(providers(device, one_thread=options.one_thread), options.providers)
    if options.list:
        print(*[case.name for case in cases], "", *[provider.name for provider in competitors], sep="\n")
        return 0
    if not cases or not competitors:
        print("no case or no provider has a name like that; --list prints them", file=sys.stderr)
        return 2
    limits = QUICK if options.quick else Limits()
    if options.limit is not None:
        limits.total_s = options.limit
    rows: list[Row] = []
    start = time.monotonic()
    with Runner(device, competitors, limits, threads=options.threads, progress=_progress) as runner:
        runner.start_workers(cases)
        machine = describe_machine(runner, device, cases)
        _say(f"{machine.device}, torch {machine.torch}")
        for rate in machine.rates.values():
            _say(f"torch.mm: {rate}")
        folder = ROOT / "results" / device_slug(machine.device) if options.keep else options.out
        for number, case in enumerate(cases):
            results = runner.run(case, len(cases) - number)
            if not results:
                continue
            case_rows = make_rows(results, machine)
            rows += case_rows
            _say(format_case(case_rows))
            # After each case, so that an interrupted run has what it measured.
            write_csv(rows, folder / "results.csv")
    _say(f"\n{len(rows)} rows in {time.monotonic() - start:.0f} s: {folder / 'results.csv'}")
    if table := peak_table.table(read_csv(folder / "results.csv") if rows else []):
        _say(f"\n{table}\n")
    for line in plots.draw(rows, folder):
        _say(line)
    return 1 if any(row.status == "gate red" and row.provider.startswith("fastcl") for row in rows) else 0


def describe_machine(runner: Runner, device: str, cases: list[Case]) -> Machine:
    """The device, and its GEMM rate in each dtype that will be used."""
    about = runner.ask_judge("describe")
    rates = {}
    for dtype in dict.fromkeys(case.dtype for case in cases):
        _progress(f"torch.mm in {dtype}")
        rate = runner.ask_judge("gemm", dtype=dtype)
        rates[dtype] = GemmRate(rate["flops"], dtype, rate["library"], rate["size"])
    return Machine(about["device"], device, about["torch"], git_commit(), about["threads"], about["level"], rates)


def _suites(text: str) -> tuple[str, ...]:
    names = _parts(text)
    for name in names:
        if name not in SUITES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SUITES)}")
    return names


def _chosen(items: list[Case] | list[Provider], wanted: str | None) -> list:
    parts = _parts(wanted)
    return [item for item in items if parts is None or any(part in item.name for part in parts)]


def _parts(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
