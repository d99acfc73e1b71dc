// Tiles of A @ B.T, one after another: operands come through a ring of stages in shared memory, always kStages - 1
// blocks of depth ahead of the products, also across tiles. So the operands of a tile arrive while the one before it is
// reduced.
#pragma once

#include "precision.h"
#include "problem.h"

namespace fastcl::cuda {

// What a thread holds of a tile: the number at its u-th row and v-th column.
template <int kDown, int kAcross>
struct ProductAccumulators {
  float products[kDown][kAcross][4];

  FASTCL_DEVICE float& at(int u, int v) { return products[u / 2][v / 2][u % 2 * 2 + v % 2]; }
  FASTCL_DEVICE float at(int u, int v) const { return products[u / 2][v / 2][u % 2 * 2 + v % 2]; }
};
using Accumulators = ProductAccumulators<kProductsDown, kProductsAcross>;

// A block's threads, all of which share a tile.
struct BlockTeam : BlockFragments {
  using Accumulators = cuda::Accumulators;

  FASTCL_DEVICE static int thread() { return thread_index(); }
  FASTCL_DEVICE static void sync() { sync_threads(); }
  FASTCL_DEVICE static bool any(bool predicate) { return any_thread(predicate); }
};

// For kernels that have no registers left for what follows from a thread's index.
struct FrugalBlockTeam : BlockTeam {
  FASTCL_DEVICE static int thread() { return thread_index_anew(); }
};

// This thread's share of the copies from memory into stages.
template <class Walk>
class Loader {
 public:
  FASTCL_DEVICE Loader(const Operands& operands, const Walk& walk, unsigned char* stages)
      : operands_(operands), walk_(walk), stages_(stages) {}

  // Starts to copy the next block of depth, if there is one, into a stage. One group of copies in either case.
  FASTCL_DEVICE void issue(int stage) {
    if (!walk_.done()) {
      copy(operands_.a, walk_.i(), stages_ + stage * kStageBytes);
      copy(operands_.b, walk_.j(), stages_ + stage * kStageBytes + kOperandBytes);
      depth_ += kDepthBytes;
      if (depth_ >= operands_.depth_bytes) {
        depth_ = 0;
        walk_.next();
      }
    }
    commit_copies();
  }

 private:
  // Addresses are computed anew each time: registers are dearer.
  FASTCL_DEVICE void copy(const Vectors& from, int first, unsigned char* to) const {
    const int chunk = thread_index() % kDepthChunks;
    const int begin = depth_ + chunk * kChunkBytes;
    const int there = larger(0, smaller(operands_.depth_bytes - begin, kChunkBytes));
#pragma unroll
    for (int k = 0; k < kTile * kDepthChunks / kThreads; ++k) {
      const int row = thread_index() / kDepthChunks + k * (kThreads / kDepthChunks);
      copy_async(to + operand_offset(row, chunk), row_address(from, first + row) + (there > 0 ? begin : 0), there);
    }
  }

  const Operands& operands_;
  Walk walk_;
  unsigned char* stages_;
  int depth_ = 0;
};

// Adds the products of one stage.
template <class Precision>
FASTCL_DEVICE void multiply_stage(const unsigned char* stage, Accumulators& sums) {
  const int lane = lane_of(thread_index());
  const int a_row = warp_down(thread_index()) * kWarpRows + left_row(lane);
  const int b_row = warp_across(thread_index()) * kWarpColumns + right_row(lane);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    typename Precision::template Fragment<2> b[kProductsAcross];
#pragma unroll
    for (int across = 0; across < kProductsAcross; across += 2) {
      uint32_t loaded[4];
      load_matrices(loaded,
                    stage + kOperandBytes +
                        operand_offset(b_row + across * kProductColumns, step * kStepChunks + right_chunk(lane)));
#pragma unroll
      for (int r = 0; r < 4; ++r) b[across + r / 2].bits[r % 2] = loaded[r];
      b[across].prepare();
      b[across + 1].prepare();
    }
#pragma unroll
    for (int down = 0; down < kProductsDown; ++down) {
      typename Precision::template Fragment<4> a;
      load_matrices(a.bits, stage + operand_offset(a_row + down * kProductRows, step * kStepChunks + left_chunk(lane)));
      a.prepare();
#pragma unroll
      for (int across = 0; across < kProductsAcross; ++across) {
        Precision::multiply(sums.products[down][across], a, b[across]);
      }
    }
  }
}

// Calls consume(walk, sums) with each tile's products. Between two calls all threads have met.
template <class Precision, class Walk, class Consume>
FASTCL_DEVICE void for_each_tile(const Operands& operands, Walk walk, unsigned char* stages, Consume consume) {
  const int blocks_of_depth = static_cast<int>(ceil_div(operands.depth_bytes, kDepthBytes));
  Loader<Walk> loader(operands, walk, stages);
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) loader.issue(stage);
  int stage = 0;
  for (; !walk.done(); walk.next()) {
    Accumulators sums = {};
    for (int k = 0; k < blocks_of_depth; ++k) {
      wait_for_copies<kStages - 2>();
      sync_threads();
      // What this overwrites was multiplied by everyone before they met.
      loader.issue((stage + kStages - 1) % kStages);
      multiply_stage<Precision>(stages + stage * kStageBytes, sums);
      stage = (stage + 1) % kStages;
    }
    consume(walk, sums);
  }
}

}  // namespace fastcl::cuda
