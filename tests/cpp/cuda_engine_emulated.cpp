// The interface of csrc/cuda/engine.h by the emulation: the kernels' own source, on the CPU.
#include "../../csrc/cuda/launch.h"

namespace fastcl::cuda {
namespace {

constexpr auto kLaunch = [](auto kernel, int blocks, size_t shared_bytes, const auto& arguments) {
  emulation::launch({}, kernel, blocks, kThreads, shared_bytes, arguments);
};

}  // namespace

int statistics(Dtype dtype, const StatisticsCall& call, void*) {
  for_precision(dtype, [&](auto p) { launch_statistics<decltype(p)>(call, kMostSuperTiles, kLaunch); });
  return 0;
}

int weights(Dtype dtype, const WeightsArguments& call, void*) {
  for_precision(dtype, [&](auto p) { launch_weights<decltype(p)>(call, kLaunch); });
  return 0;
}

}  // namespace fastcl::cuda
