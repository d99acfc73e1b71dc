// A panel of W on Hopper: the weights of weights.h on tiles of hopper_product.h.
#pragma once

#include "hopper_product.h"
#include "weights.h"

namespace fastcl::cuda::hopper {

struct WeightsKernelArguments {
  MappedOperands operands;
  WeightsArguments weights;
};

// Tiles of a panel follow each other down a column, and keep no rows.
template <bool kTagged>
struct WeightsMemory {
  Ring<0> ring;
  alignas(128) unsigned char staged[kConsumers][kTile * kTile * HalfPrecision::kBytes];
  TileFactors<kTagged> factors[kConsumers];
};
static_assert(sizeof(WeightsMemory<true>) <= kMostSharedBytes);

template <class Precision, bool kTagged>
FASTCL_KERNEL(kThreads, 1)
weights_kernel(FASTCL_PARAMETER(WeightsKernelArguments) x) {
  auto& memory = *reinterpret_cast<WeightsMemory<kTagged>*>(swizzled_shared_memory());
  const PanelWork work{x.weights.panel, block_index(), block_count()};
  for_each_tile<Precision>(x.operands, work, memory.ring, [&] {
    const int consumer = WarpgroupTeam::consumer();
    using Team = std::conditional_t<kTagged, FrugalWarpgroupTeam, WarpgroupTeam>;
    Weights<Precision, Team, kTagged> weights(x.weights, memory.factors[consumer], memory.staged[consumer]);
    return [weights](const PanelWalk& walk, Accumulators& values) mutable {
      weights.write_tile(walk.i(), walk.j(), values);
    };
  });
}

}  // namespace fastcl::cuda::hopper
