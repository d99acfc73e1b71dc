// The interface of csrc/cuda/engine.h by the emulation: the kernels' own source, on the CPU.
#include "../../csrc/cuda/hopper_launch.h"
#include "../../csrc/cuda/launch.h"

namespace fastcl::cuda {
namespace {

constexpr auto kLaunch = [](auto kernel, int blocks, int threads, size_t shared_bytes, const auto& arguments) {
  emulation::launch({}, kernel, blocks, threads, shared_bytes, arguments);
};
constexpr int kMultiprocessors = 2;

}  // namespace

int statistics(Dtype dtype, Path path, const StatisticsCall& call, void*) {
  const SweepArguments sweep = sweep_arguments(call, kMostSuperTiles);
  if (path == Path::kHopper) {
    hopper::for_precision(dtype, [&](auto p) {
      hopper::launch_sweep<decltype(p)>(sweep, kMultiprocessors, hopper::emulation::Map(), kLaunch);
    });
  }
  for_precision(dtype, [&](auto p) {
    if (path == Path::kPortable) launch_sweep<decltype(p)>(sweep, kLaunch);
    launch_finish<decltype(p)>(call, sweep, kLaunch);
  });
  return 0;
}

int weights(Dtype dtype, Path path, const WeightsArguments& call, void*) {
  if (path == Path::kHopper) {
    hopper::for_precision(dtype, [&](auto p) {
      hopper::launch_weights<decltype(p)>(call, kMultiprocessors, hopper::emulation::Map(), kLaunch);
    });
  } else {
    for_precision(dtype, [&](auto p) { launch_weights<decltype(p)>(call, kLaunch); });
  }
  return 0;
}

int gradient(Dtype dtype, const GradientArguments& call, void*) {
  hopper::for_precision(dtype, [&](auto p) { launch_gradient<decltype(p)>(call, kLaunch); });
  return 0;
}

int pairs(Dtype dtype, const PairsArguments& call, void*) {
  for_precision(dtype, [&](auto p) { launch_pairs<decltype(p)>(call, kLaunch); });
  return 0;
}

}  // namespace fastcl::cuda
