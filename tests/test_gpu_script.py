"""benchmarks/gpu.sh without a GPU: it says so and stops; with stand-ins for what it runs, the flow of its stages."""

from __future__ import annotations

import csv
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import rates
from benchmarks.cases import TARGET_CASES
from benchmarks.report import COLUMNS
from benchmarks.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

STAND_IN = f"""#!/bin/bash
# Answers as a python on a machine with a GPU would, but for what needs none.
echo "$*" >>"$CALLS"
case "$*" in
  *"-m benchmarks targets "*) exec {sys.executable} "$@" ;;
  *"-m pytest"*) exit "${{PYTEST_CODE:-0}}" ;;
  *"-m benchmarks "*"--limit"*)
    while [[ $1 != --out ]]; do shift; done
    mkdir -p "$2" && cp "$CANNED" "$2/results.csv" ;;
  *"-m benchmarks rates"*) while [[ $1 != --out ]]; do shift; done; echo '{{}}' >"$2" ;;
esac
"""


def _run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def _executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment in which gpu.sh finds a python and an nvidia-smi that pretend, and results to copy."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _executable(folder / "nvidia-smi", "#!/bin/bash\n")
    case = TARGET_CASES[0]
    row = dict.fromkeys(COLUMNS, "") | {
        "kind": "cuda", "device": "a GPU", "loss": case.loss, "pairs": case.pairs, "rows": case.rows, "dim": case.dim,
        "dtype": case.dtype, "provider": "fastcl triton", "median_ms": 7.0, "fraction_of_floor": 0.795,
    }  # fmt: skip
    with (tmp_path / "canned.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerow(row)
    return {
        "PYTHON": str(_executable(folder / "python", STAND_IN)),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CANNED": str(tmp_path / "canned.csv"),
        "CALLS": str(tmp_path / "calls"),
    }


def test_without_a_gpu(tmp_path: Path) -> None:
    done = _run([str(tmp_path / "out")], PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no NVIDIA GPU" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.txt"]


def test_usage() -> None:
    done = _run([])
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


def test_stages(stand_ins: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _run([str(out)], **stand_ins)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"log.txt", "rates.json", "targets.csv", "results.csv"} <= {path.name for path in out.iterdir()}
    log = (out / "log.txt").read_text()
    assert "pass          clip of 32,768 rows x 512, of the floor: 80 %" in log
    assert log.count("not measured") == len(TARGETS) - 1
    calls = Path(stand_ins["CALLS"]).read_text()
    assert calls.index("benchmarks rates") < calls.index("-m pytest") < calls.index("--suite targets --device")


def test_quick_and_failures(stand_ins: dict[str, str], tmp_path: Path) -> None:
    """A stage that fails is named at the end, and the next ones run all the same."""
    done = _run([str(tmp_path / "out"), "--quick"], **stand_ins, PYTEST_CODE="1")
    assert done.returncode == 1
    assert "failed: tests, tests of cuda (" in done.stdout
    assert "--suite targets --quick" in Path(stand_ins["CALLS"]).read_text()
    assert (tmp_path / "out" / "results.csv").exists()


def test_limits_add_up() -> None:
    """Under four and ten minutes, should every stage take all it may; the sanitizer has three."""
    text = SCRIPT.read_text()
    fixed = sum(map(int, re.findall(r"^ +stage \w+ (\d+) ", text, re.MULTILINE)))
    assert fixed > 0
    lines = [line + " " + " ".join(re.findall(r"sanitizer_s=\d+", line) * 2) for line in text.splitlines()]
    totals = [fixed + sum(map(int, re.findall(r"_s=(\d+)", line))) for line in lines if "rates_s=" in line]
    assert totals[0] < 4 * 60
    assert totals[1] < 10 * 60


def test_rates() -> None:
    found = rates.measure("cpu", 0.01)
    assert set(found) == {"device", "bfloat16", "float16", "tf32", "float32", "copy"}
    assert all(rate > 0 for name, rate in found.items() if name != "device")
