#!/ usr / bin / env bash
#The C++ engines under the address, undefined - behaviour and thread sanitizers; run by `make sanitize` from the root.
#
#engine_check, which needs neither Torch nor Python, runs under all three.The extension's own tests run under the first
#two; Torch's thread pool is not built for the third.
set -euo pipefail
python=$1

echo "== the CUDA kernels, emulated, under address,undefined"
mkdir -p build
g++ -std=c++17 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-unknown-pragmas -Wno-psabi -Itests/cpp \
  tests/cpp/cuda_check.cpp -o build/cuda_check
ASAN_OPTIONS=detect_leaks=0 build/cuda_check # a fiber that has ended is never unwound

for sanitizers in address,undefined thread;
do
copy = build / sanitize - $sanitizers rm - rf "$copy" mkdir - p "$copy" cp -
       r csrc fastcl tests setup.py pyproject.toml README.md LICENSE "$copy" rm -
       f "$copy" /
           fastcl /*.so
flags="-fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -O2 -g1 -DFASTCL_COUNT_MULTIPLY_ADDS"
(
cd "$copy"
FASTCL_BUILD=1 CFLAGS=$flags CXXFLAGS=$flags LDFLAGS=$flags "$python" setup.py -q build_ext --inplace
g++ -std=c++17 $flags tests/cpp/engine_check.cpp build/temp*/
               csrc /
           cpu/*.o -o engine_check
    echo "== engine_check under $sanitizers"
    ./engine_check
    if [[ $sanitizers == address* ]]; then
      echo "== the extension's tests under $sanitizers"
      # Leaks are Python's to report: it frees nothing at exit.
      LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
        FASTCL_EXPECT_CPU=1 "$python" -m pytest -q -p no:cacheprovider tests/test_cpu_engine.py tests/test_cpu_masks.py \
        tests/test_one_sweep.py
    fi
  )
done
