// Launches on a stream, the first error kept. The runtime keeps its last one, too, until it is read: the next launch
// would report it.
#pragma once

#include <cuda_runtime_api.h>

namespace fastcl::cuda {

class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <class Arguments>
  void operator()(void (*kernel)(Arguments), int blocks, int threads, size_t shared_bytes, const Arguments& arguments) {
    if (error != cudaSuccess) return;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return;
    }
    kernel<<<blocks, threads, shared_bytes, stream_>>>(arguments);
    error = cudaGetLastError();
  }

  cudaError_t error = cudaSuccess;

 private:
  cudaStream_t stream_;
};

}  // namespace fastcl::cuda
