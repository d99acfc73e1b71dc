#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go and without a network:
#
#   bash benchmarks/gpu.sh OUTDIR [--quick]
#
# measures the device's rates of matrix products and of copying, builds the C++ extension in place, runs the tests marked
# `gpu`, then the cases of the targets and the quick benchmark against every peer that can be imported. Leaves log.txt,
# rates.json, targets.csv, results.csv and the plots in OUTDIR; the log's end says of each target whether it holds. Needs
# a torch built for CUDA and pytest; under ten minutes, with --quick (without the case of a million pairs) under four. A
# stage that fails doesn't stop the next ones; the exit code says that one did. A target that doesn't hold is no failure.
#
#   PYTHON=python3.12     the interpreter to use
#   WHEELS=dir            wheels of peers (and of pytest, matplotlib), installed beside this run and nowhere else
set -u

out=${1:-}
if [[ -z $out || $out == --* ]]; then
  sed -n '4s/^# */usage: /p' "$0" >&2
  exit 2
fi
python=${PYTHON:-python3}
if [[ ${2:-} == --quick ]]; then
  quick=(--quick) rates_s=12 build_s=30 wheels_s=8 tests_s=45 cuda_tests_s=12 sanitizer_s=0 targets_s=40 bench_s=30
else
  quick=() rates_s=25 build_s=75 wheels_s=20 tests_s=120 cuda_tests_s=40 sanitizer_s=25 targets_s=125 bench_s=55
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

failed=()
stage() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS code=0
  shift 2
  echo
  echo "== $name: $*"
  # Interrupted, pytest still says what it has found.
  timeout --signal=INT --kill-after=10 "$seconds" "$@" || code=$?
  if ((code == 124 || code == 137)); then echo "== $name: stopped after $seconds s"; fi
  echo "== $name: exit code $code after $((SECONDS - start)) s"
  return "$code"
}

run() {
  if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "no NVIDIA GPU that $python's torch can use: nothing was run"
    return 1
  fi

  stage machine 10 nvidia-smi || failed+=(machine)
  stage versions 20 "$python" - <<'EOF' || failed+=(versions)
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print(torch.cuda.get_device_name(), "compute capability", torch.cuda.get_device_capability())
for name in ("triton", "numpy", "pytest", "matplotlib", "inf_cl", "liger-kernel", "cut-cross-entropy", "lightly"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
EOF

  stage rates "$rates_s" "$python" -m benchmarks rates --device cuda --out "$out/rates.json" || failed+=(rates)

  if ! stage build "$build_s" "$python" setup.py -q build_ext --inplace; then
    echo "the C++ extension was not built: the CPU engine is missing here, the GPU's tests and benchmarks don't need it"
  fi

  if [[ -n ${WHEELS:-} ]]; then
    # Without dependencies: a peer must not bring another torch along.
    stage wheels "$wheels_s" "$python" -m pip install -q --no-index --no-deps --target "$scratch/peers" "$WHEELS"/*.whl ||
      failed+=(wheels)
    # After the environment's own packages, which stay what they are.
    echo "import sys; sys.path.append('$scratch/peers')" >"$scratch/sitecustomize.py"
    export PYTHONPATH="$scratch${PYTHONPATH:+:$PYTHONPATH}"
  fi

  # Hundreds of kernels are compiled, each by one core. An address out of bounds ends every later test of its process, so
  # that the kernels in CUDA C++ have a process of their own.
  local pytest=("$python" -m pytest -m gpu -q -p no:cacheprovider --tb=short --maxfail=40 tests/test_gpu.py) workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
  stage tests "$tests_s" "${pytest[@]}" -k "not cuda" "${workers[@]}" || failed+=(tests)
  stage "tests of cuda" "$cuda_tests_s" "${pytest[@]}" -k cuda || failed+=("tests of cuda")
  if ((sanitizer_s)) && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
      # What initcheck doesn't watch counts as never written.
      local watched=(--kernel-regex kns=fastcl)
      if [[ $tool == initcheck ]]; then watched=(); fi
      stage "$tool" "$sanitizer_s" compute-sanitizer --tool "$tool" "${watched[@]}" --error-exitcode 1 \
        "${pytest[@]}" -k "cuda and bfloat16 and (nt_xent-33x17 or clip-33x17)" || failed+=("$tool")
    done
  fi

  # The limits are the runner's own: it ends in time to write what it has.
  stage "benchmark of the targets" "$targets_s" "$python" -m benchmarks --suite targets "${quick[@]}" --device cuda \
    --limit $((targets_s - 20)) --out "$scratch/targets" || failed+=(targets)
  cp "$scratch/targets/results.csv" "$out/targets.csv" 2>/dev/null || failed+=(targets.csv)
  stage benchmark "$bench_s" "$python" -m benchmarks --quick --device cuda --limit $((bench_s - 20)) \
    --out "$scratch/out" || failed+=(benchmark)
  cp "$scratch/out/results.csv" "$out"/ 2>/dev/null || failed+=(results.csv)
  find "$scratch/out" -name '*.png' 2>/dev/null | sort | head -6 | while read -r plot; do cp "$plot" "$out"/; done

  stage summary 30 "$python" -m benchmarks targets "$out/targets.csv" "$out/results.csv" || failed+=(summary)

  echo
  if ((${#failed[@]})); then
    printf -v names '%s, ' "${failed[@]}"
    echo "failed: ${names%, } (after $SECONDS s); see $out/log.txt"
    return 1
  fi
  echo "all stages passed in $SECONDS s; see $out"
}

run 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
