// How many blocks of each kernel an SM holds, by cuda_occupancy.h. Reads lines "capability kernel registers", where a
// kernel is sweep, redo, weights, pairs, combine, hopper_sweep or hopper_weights, some with _tagged, or gradient_ with
// a depth, and prints lines "blocks shared-memory-per-block".
#include <cuda_occupancy.h>

#include <iostream>
#include <map>
#include <string>

#include "../../csrc/cuda/hopper_launch.h"
#include "../../csrc/cuda/launch.h"

namespace {

// What cudaGetDeviceProperties reports, from the CUDA programming guide's table of compute capabilities.
struct Device {
  int major;
  int minor;
  int maxThreadsPerBlock = 1024;
  int maxThreadsPerMultiProcessor;
  int regsPerBlock = 65536;
  int regsPerMultiprocessor = 65536;
  int warpSize = 32;
  size_t sharedMemPerBlock = 48 << 10;
  size_t sharedMemPerMultiprocessor;
  int multiProcessorCount = 108;
  size_t sharedMemPerBlockOptin;
  size_t reservedSharedMemPerBlock = 1 << 10;
};

Device device(int capability) {
  const bool large = capability % 10 == 0 && capability != 120;
  const size_t shared = (capability == 80 ? 164 : large ? 228 : 100) << 10;
  Device device{};
  device.major = capability / 10;
  device.minor = capability % 10;
  device.maxThreadsPerMultiProcessor = large ? 2048 : 1536;
  device.sharedMemPerMultiprocessor = shared;
  device.sharedMemPerBlockOptin = shared - (1 << 10);
  return device;
}

}  // namespace

int main() {
  using namespace fastcl::cuda;
  const std::map<std::string, size_t> shared{{"sweep", sizeof(SweepMemory<false>)},
                                             {"sweep_tagged", sizeof(SweepMemory<true>)},
                                             {"redo", sizeof(RedoMemory)},
                                             {"weights", sizeof(WeightsMemory<false>)},
                                             {"weights_tagged", sizeof(WeightsMemory<true>)},
                                             {"pairs", sizeof(PairsMemory)},
                                             {"combine", 0},
                                             {"gradient_64", sizeof(GradientMemory<64>)},
                                             {"gradient_128", sizeof(GradientMemory<128>)},
                                             {"gradient_256", sizeof(GradientMemory<256>)},
                                             {"hopper_sweep", sizeof(hopper::SweepMemory<false>)},
                                             {"hopper_sweep_tagged", sizeof(hopper::SweepMemory<true>)},
                                             {"hopper_weights", sizeof(hopper::WeightsMemory<false>)},
                                             {"hopper_weights_tagged", sizeof(hopper::WeightsMemory<true>)}};
  int capability, registers;
  std::string kernel;
  while (std::cin >> capability >> kernel >> registers) {
    const cudaOccDeviceProp properties(device(capability));
    const int threads = kernel.rfind("hopper", 0) == 0     ? hopper::kThreads
                        : kernel.rfind("gradient", 0) == 0 ? OwnRowsFragments<64>::kThreads
                                                           : kThreads;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = threads;
    function.numRegs = registers;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = shared.at(kernel);
    function.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &function, &state, threads, shared.at(kernel));
    std::cout << (error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1) << ' ' << shared.at(kernel)
              << '\n';
  }
}
