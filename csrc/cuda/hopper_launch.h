// Which kernels of the Hopper path there are and how they are launched: sweep and weights in the place of the portable
// ones, for bfloat16 and float16. `map(vectors, depth_bytes, precision)` makes a TensorMap; `launch` is as in launch.h.
#pragma once

#include "engine.h"
#include "hopper_sweep.h"
#include "hopper_weights.h"

namespace fastcl::cuda::hopper {

// One set of kernels for each of the two types that wgmma multiplies without a conversion of operands.
template <class Call>
void for_precision(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return call(BFloat16());
    case Dtype::kFloat16:
      return call(Float16());
    default:
      return;
  }
}

template <class Precision, class Map>
MappedOperands map_operands(const Operands& x, Map map) {
  return {map(x.a, x.depth_bytes, Precision()), map(x.b, x.depth_bytes, Precision()),
          static_cast<int>(ceil_div(x.depth_bytes, kDepthBytes)), kDepthBytes / Precision::kBytes};
}

// `most_blocks`: as many as the device holds at a time.
template <class Precision, class Map, class Launch>
void launch_sweep(const SweepArguments& x, int most_blocks, Map map, Launch launch) {
  launch(sweep_kernel<Precision>, smaller(most_blocks, super_tiles(x.rows, x.columns, x.plan.symmetric)), kThreads,
         sizeof(SweepMemory), SweepKernelArguments{map_operands<Precision>(x.s.operands, map), x});
}

template <class Precision, class Map, class Launch>
void launch_weights(const WeightsArguments& x, int most_blocks, Map map, Launch launch) {
  launch(weights_kernel<Precision>, smaller(most_blocks, panel_tiles(x.panel)), kThreads, sizeof(WeightsMemory),
         WeightsKernelArguments{map_operands<Precision>(x.s.operands, map), x});
}

}  // namespace fastcl::cuda::hopper
