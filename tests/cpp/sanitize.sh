#!/usr/bin/env bash
# The C++ engines under the address, undefined-behaviour and thread sanitizers; run by `make sanitize` from the root.
#
# engine_check, which needs neither Torch nor Python, runs under all three; the third looks at the baseline level alone,
# since threads take turns alike at all of them. The extension's own tests run under the first two; Torch's thread pool
# is not built for the third. With -O1, which compiles five times as fast as -O2 here.
set -euo pipefail
python=$1
flags="-std=c++17 -O1 -g1 -fno-sanitize-recover=all -fno-omit-frame-pointer"
mkdir -p build

# Beside the rest, which leaves a core free most of the time. Leaks do not count: a fiber that has ended is never unwound.
emulate() {
  echo "== the CUDA kernels, emulated, under address,undefined"
  for check in cuda_check cuda_pairs_check; do
    g++ $flags -fsanitize=address,undefined -Wno-unknown-pragmas -Wno-psabi -Itests/cpp "tests/cpp/$check.cpp" -o "build/$check"
    ASAN_OPTIONS=detect_leaks=0 "build/$check"
  done
}
log=$PWD/build/sanitize-cuda.log
emulate >"$log" 2>&1 &
emulation=$!
trap 'kill "$emulation" 2>/dev/null || true' EXIT

echo "== engine_check under thread"
threads=build/sanitize-thread
rm -rf "$threads"
mkdir -p "$threads"
printf '%s\n' csrc/cpu/{levels,schedule,shared_operands,statistics,gradient,cross_entropy,sigmoid,pairs,triplets,level_baseline} tests/cpp/engine_check |
  xargs -P "$(nproc)" -I{} sh -c 'g++ '"$flags"' -fsanitize=thread -DFASTCL_BASELINE_ONLY \
    -DFASTCL_COUNT_MULTIPLY_ADDS -c {}.cpp -o "'"$threads"'/$(basename {}).o"'
g++ -fsanitize=thread "$threads"/*.o -o "$threads/engine_check"
"$threads/engine_check" threads

copy=build/sanitize-address
rm -rf "$copy"
mkdir -p "$copy"
cp -r csrc fastcl tests setup.py pyproject.toml README.md LICENSE "$copy"
rm -f "$copy"/fastcl/*.so
cd "$copy"
flags+=" -fsanitize=address,undefined -DFASTCL_COUNT_MULTIPLY_ADDS"
FASTCL_BUILD=1 CFLAGS=$flags CXXFLAGS=$flags LDFLAGS=$flags "$python" setup.py -q build_ext --inplace
g++ $flags tests/cpp/engine_check.cpp build/temp*/csrc/cpu/*.o -o engine_check
echo "== engine_check under address,undefined"
./engine_check
echo "== the extension's tests under address,undefined"
# Leaks are Python's to report: it frees nothing at exit. Other backends, rates and bits have nothing to say here.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
  FASTCL_EXPECT_CPU=1 "$python" -m pytest -q -p no:cacheprovider -n auto --dist loadfile \
  -k "not dense and not tiled and not peak and not bits" tests/test_cpu_engine.py tests/test_cpu_masks.py \
  tests/test_one_sweep.py tests/test_sigmoid.py tests/test_panel_kernels.py
wait "$emulation" && code=0 || code=$?
cat "$log"
exit "$code"
