// All instantiations of the portable kernels and their launches, and the choice between them and Hopper's.
#include "hopper.h"
#include "launch.h"
#include "launcher.h"

namespace fastcl::cuda {

#if !defined(FASTCL_HOPPER)
namespace hopper {
int sweep(Dtype, const SweepArguments&, void*) { return cudaErrorNoKernelImageForDevice; }
int weights(Dtype, const WeightsArguments&, void*) { return cudaErrorNoKernelImageForDevice; }
}  // namespace hopper
#endif

int statistics(Dtype dtype, Path path, const StatisticsCall& call, void* stream) {
  Launcher launcher(stream);
  const auto launch = [&](auto... arguments) { launcher(arguments...); };
  const SweepArguments sweep = sweep_arguments(call, kMostSuperTiles);
  for_precision(dtype, [&](auto precision) {
    using Precision = decltype(precision);
    if (path == Path::kHopper) {
      launcher.error = static_cast<cudaError_t>(hopper::sweep(dtype, sweep, stream));
    } else {
      launch_sweep<Precision>(sweep, launch);
    }
    launch_finish<Precision>(call, sweep, launch);
  });
  return launcher.error;
}

int weights(Dtype dtype, Path path, const WeightsArguments& call, void* stream) {
  if (path == Path::kHopper) return hopper::weights(dtype, call, stream);
  Launcher launcher(stream);
  for_precision(dtype, [&](auto precision) {
    launch_weights<decltype(precision)>(call, [&](auto... arguments) { launcher(arguments...); });
  });
  return launcher.error;
}

int gradient(Dtype dtype, const GradientArguments& call, void* stream) {
  Launcher launcher(stream);
  for_precision(dtype, [&](auto precision) {
    using Precision = decltype(precision);
    if constexpr (Precision::kBytes == 2) {
      launch_gradient<Precision>(call, [&](auto... arguments) { launcher(arguments...); });
    }
  });
  return launcher.error;
}

int pairs(Dtype dtype, const PairsArguments& call, void* stream) {
  Launcher launcher(stream);
  for_precision(dtype, [&](auto precision) {
    launch_pairs<decltype(precision)>(call, [&](auto... arguments) { launcher(arguments...); });
  });
  return launcher.error;
}

}  // namespace fastcl::cuda
