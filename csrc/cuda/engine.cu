// All instantiations of the kernels and their launches.
#include <cuda_runtime_api.h>

#include "launch.h"

namespace fastcl::cuda {
namespace {

class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <class Arguments>
  void operator()(void (*kernel)(Arguments), int blocks, size_t shared_bytes, const Arguments& arguments) {
    if (error != cudaSuccess) return;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return;
    kernel<<<blocks, kThreads, shared_bytes, stream_>>>(arguments);
    error = cudaGetLastError();
  }

  cudaError_t error = cudaSuccess;

 private:
  cudaStream_t stream_;
};

// One set of kernels for each kind of product; a plan, its masks and its symmetry are arguments. bfloat16 and float16
// are what models are trained in, tf32 is float32 under set_float32_matmul_precision("high"), tf32 x 3 under "highest".
template <class Call>
void for_precision(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return call(BFloat16());
    case Dtype::kFloat16:
      return call(Float16());
    case Dtype::kTf32:
      return call(Tf32());
    case Dtype::kTf32x3:
      return call(Tf32x3());
  }
}

}  // namespace

int statistics(Dtype dtype, const StatisticsCall& call, void* stream) {
  Launcher launch(stream);
  for_precision(dtype, [&](auto precision) {
    launch_statistics<decltype(precision)>(call, kMostSuperTiles, [&](auto... arguments) { launch(arguments...); });
  });
  return launch.error;
}

int weights(Dtype dtype, const WeightsArguments& call, void* stream) {
  Launcher launch(stream);
  for_precision(dtype, [&](auto precision) {
    launch_weights<decltype(precision)>(call, [&](auto... arguments) { launch(arguments...); });
  });
  return launch.error;
}

}  // namespace fastcl::cuda
