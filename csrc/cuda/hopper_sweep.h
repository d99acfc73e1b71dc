// The forward sweep on Hopper: the reductions of sweep.h on tiles of hopper_product.h.
#pragma once

#include "hopper_product.h"
#include "sweep.h"

namespace fastcl::cuda::hopper {

struct SweepKernelArguments {
  MappedOperands operands;
  SweepArguments sweep;
};

// Rows of A are kept up to a depth of 256 numbers.
template <bool kTagged>
struct SweepMemory {
  Ring<4> ring;
  TileSums<WarpgroupTeam, kTagged> sums[kConsumers];
};
static_assert(sizeof(SweepMemory<true>) <= kMostSharedBytes);

// Persistent: any number of blocks does, and the same bits come out.
template <class Precision, bool kTagged>
FASTCL_KERNEL(kThreads, 1)
sweep_kernel(FASTCL_PARAMETER(SweepKernelArguments) x) {
  auto& memory = *reinterpret_cast<SweepMemory<kTagged>*>(swizzled_shared_memory());
  const SweepWork work{x.sweep.rows, x.sweep.columns, x.sweep.plan.symmetric, block_index(), block_count()};
  for_each_tile<Precision>(x.operands, work, memory.ring, [&] {
    Sweep<WarpgroupTeam, kTagged> sweep(x.sweep, memory.sums[WarpgroupTeam::consumer()]);
    return [sweep](const SuperTilesWalk& walk, Accumulators& values) mutable {
      sweep.reduce_tile(walk.at(), walk.tile(), values);
    };
  });
}

}  // namespace fastcl::cuda::hopper
