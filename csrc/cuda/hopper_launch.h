// Which kernels of the Hopper path there are and how they are launched: sweep and weights in the place of the portable
// ones, for bfloat16 and float16. `map(boxes, precision)` makes a TensorMap; `launch` is as in launch.h.
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

// A matrix and the boxes that it is loaded in: a tile's rows by one block of depth, zeros beyond the matrix.
struct Boxes {
  const unsigned char* data;
  int64_t pitch;  // bytes from row to row
  int elements;
  int rows;
  int box_elements;
  int box_rows;
};

template <class Precision>
Boxes boxes(const Vectors& x, int depth_bytes) {
  constexpr int kBytes = Precision::kBytes;
  return {x.data, x.pitch, depth_bytes / kBytes, x.count, kDepthBytes / kBytes, kTile};
}

template <class Precision, class Map>
MappedOperands map_operands(const Operands& x, Map map) {
  const Boxes a = boxes<Precision>(x.a, x.depth_bytes);
  const Boxes b = boxes<Precision>(x.b, x.depth_bytes);
  return {map(a, Precision()), map(b, Precision()), static_cast<int>(ceil_div(a.elements, a.box_elements)),
          a.box_elements};
}

// `most_blocks`: as many as the device holds at a time.
template <class Precision, class Map, class Launch>
void launch_sweep(const SweepArguments& x, int most_blocks, Map map, Launch launch) {
  for_tags(x.plan, [&](auto tagged) {
    launch(sweep_kernel<Precision, tagged.value>,
           smaller(most_blocks, super_tiles(x.rows, x.columns, x.plan.symmetric)), kThreads,
           sizeof(SweepMemory<tagged.value>), SweepKernelArguments{map_operands<Precision>(x.s.operands, map), x});
  });
}

template <class Precision, class Map, class Launch>
void launch_weights(const WeightsArguments& x, int most_blocks, Map map, Launch launch) {
  for_tags(x.plan, [&](auto tagged) {
    launch(weights_kernel<Precision, tagged.value>, smaller(most_blocks, panel_tiles(x.panel)), kThreads,
           sizeof(WeightsMemory<tagged.value>), WeightsKernelArguments{map_operands<Precision>(x.s.operands, map), x});
  });
}

}  // namespace fastcl::cuda::hopper
