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
