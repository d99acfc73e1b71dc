// The backward with its sums in registers, where rows have at most 256 numbers of 2 bytes: W @ B in one kernel, no part
// of W in memory.
//
// A block owns rows of A and goes over tiles of rows of B. What a thread holds of a tile of W, the accumulators of
// 16 x 8 products, are two by two the left operand of a 16 x 16 x 8 product once rounded to the operands' type; the
// right one is the tile of B that S was made from, read from shared memory transposed. A block is the only writer of
// its rows, and adds tile after tile: the same bits every time.
#pragma once

#include "weights.h"

namespace fastcl::cuda {

// Four warps one below the other, so that each has its rows of sums for itself. For rows of up to kDepth numbers: as
// many products down as sums of 128 registers allow, for what is loaded of B serves all of them. A tile has one warp's
// lanes of columns, few enough for a second or third block on the multiprocessor.
template <int kDepth>
struct OwnRowsFragments {
  static constexpr int kDown = kDepth <= 128 ? 2 : 1;
  static constexpr int kAcross = kLanes / kProductColumns;
  static constexpr int kBlocksPerSm = kDepth <= 64 ? 3 : 2;
  static constexpr int kWarpsDown = 4;
  static constexpr int kWarpsAcross = 1;
  static constexpr int kThreads = kLanes * kWarpsDown;
  static constexpr int kRows = 2 * kDown;
  static constexpr int kColumns = 2 * kAcross;
  static constexpr int kPartRows = 2;
  static constexpr int kPartColumns = kColumns;

  FASTCL_HOST_DEVICE static int row(int thread, int u) {
    return (thread / kLanes * kDown + u / 2) * kProductRows + u % 2 * 8 + lane_of(thread) / 4;
  }
  FASTCL_HOST_DEVICE static int column(int thread, int v) {
    return v / 2 * kProductColumns + lane_of(thread) % 4 * 2 + v % 2;
  }
};

template <int kDepth>
struct OwnRowsTeam : OwnRowsFragments<kDepth> {
  using Accumulators = ProductAccumulators<OwnRowsFragments<kDepth>::kDown, OwnRowsFragments<kDepth>::kAcross>;
  using Sums = ProductAccumulators<OwnRowsFragments<kDepth>::kDown, kDepth / kProductColumns>;

  FASTCL_DEVICE static int thread() { return thread_index(); }
};

// Where a chunk of a row lies in shared memory: permuted within 128 bytes, so that eight rows at one chunk, which is
// what a warp loads at a time, fall on all 32 banks.
template <int kDepth>
FASTCL_HOST_DEVICE int whole_row_offset(int row, int chunk) {
  return row * kDepth * HalfPrecision::kBytes + (chunk ^ (row & 7)) * kChunkBytes;
}

// The same so many chunks further on, an even number of them, from the first or the second chunk.
FASTCL_HOST_DEVICE int chunks_further(int offset, int chunks) {
  return (offset ^ (chunks & 7) * kChunkBytes) + (chunks & ~7) * kChunkBytes;
}

// A block's share of shared memory, in which the tiles of B take turns.
template <int kDepth>
struct GradientMemory {
  static constexpr int kRowBytes = kDepth * HalfPrecision::kBytes;

  alignas(128) unsigned char own[tile_rows<OwnRowsFragments<kDepth>>() * kRowBytes];
  alignas(128) unsigned char tiles[2][tile_columns<OwnRowsFragments<kDepth>>() * kRowBytes];
  TileFactors<false> factors;
};

// Starts to copy kCount rows from `first` on.
template <int kDepth, int kCount>
FASTCL_DEVICE void copy_rows(const Vectors& from, int depth_bytes, int first, unsigned char* to) {
  constexpr int kChunks = kDepth * HalfPrecision::kBytes / kChunkBytes;
  constexpr int kTogether = OwnRowsFragments<kDepth>::kThreads / kChunks;
  const int chunk = thread_index() % kChunks;
  const int begin = chunk * kChunkBytes;
  const int there = larger(0, smaller(depth_bytes - begin, kChunkBytes));
#pragma unroll
  for (int k = 0; k < kCount; k += kTogether) {
    const int row = k + thread_index() / kChunks;
    copy_async(to + whole_row_offset<kDepth>(row, chunk), row_address(from, first + row) + (there > 0 ? begin : 0),
               there);
  }
}

// Own rows times a tile's.
template <class Precision, int kDepth>
FASTCL_DEVICE typename OwnRowsTeam<kDepth>::Accumulators multiply_rows(const unsigned char* own,
                                                                       const unsigned char* tile) {
  using Team = OwnRowsTeam<kDepth>;
  const int lane = lane_of(thread_index());
  const int own_row = thread_index() / kLanes * Team::kDown * kProductRows + left_row(lane);
  const int a_first = whole_row_offset<kDepth>(own_row, left_chunk(lane));
  const int b_first = whole_row_offset<kDepth>(right_row(lane), right_chunk(lane));
  constexpr int kRowBytes = GradientMemory<kDepth>::kRowBytes;
  typename Team::Accumulators values = {};
#pragma unroll
  for (int chunk = 0; chunk < kRowBytes / kChunkBytes; chunk += kStepChunks) {
    typename Precision::template Fragment<2> b[Team::kAcross];
#pragma unroll
    for (int across = 0; across < Team::kAcross; across += 2) {
      uint32_t loaded[4];
      load_matrices(loaded, tile + chunks_further(b_first, chunk) + across * kProductColumns * kRowBytes);
#pragma unroll
      for (int r = 0; r < 4; ++r) b[across + r / 2].bits[r % 2] = loaded[r];
    }
#pragma unroll
    for (int down = 0; down < Team::kDown; ++down) {
      typename Precision::template Fragment<4> a;
      load_matrices(a.bits, own + chunks_further(a_first, chunk) + down * kProductRows * kRowBytes);
#pragma unroll
      for (int across = 0; across < Team::kAcross; ++across) {
        Precision::multiply(values.products[down][across], a, b[across]);
      }
    }
  }
  return values;
}

// Adds a tile's weights times its rows.
template <class Precision, int kDepth>
FASTCL_DEVICE void add_weighted_rows(const typename OwnRowsTeam<kDepth>::Accumulators& weights,
                                     const unsigned char* tile, typename OwnRowsTeam<kDepth>::Sums& sums) {
  using Team = OwnRowsTeam<kDepth>;
  const int lane = lane_of(thread_index());
  const int first = whole_row_offset<kDepth>(left_row(lane), left_chunk(lane));
  constexpr int kRowBytes = GradientMemory<kDepth>::kRowBytes;
#pragma unroll
  for (int k = 0; k < Team::kAcross; k += 2) {
    typename Precision::template Fragment<4> a[Team::kDown];
#pragma unroll
    for (int down = 0; down < Team::kDown; ++down) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float (&from)[4] = weights.products[down][k + r / 2];
        Precision::store(&a[down].bits[r], from[r % 2 * 2], from[r % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int across = 0; across < kDepth / kProductColumns; across += 2) {
      uint32_t loaded[4];
      load_matrices_transposed(loaded, tile + chunks_further(first, across) + k * kProductColumns * kRowBytes);
      typename Precision::template Fragment<2> b[2];
#pragma unroll
      for (int r = 0; r < 4; ++r) b[r / 2].bits[r % 2] = loaded[r];
#pragma unroll
      for (int down = 0; down < Team::kDown; ++down) {
        Precision::multiply(sums.products[down][across], a[down], b[0]);
        Precision::multiply(sums.products[down][across + 1], a[down], b[1]);
      }
    }
  }
}

// A block's rows of the result.
template <int kDepth>
FASTCL_DEVICE void store_rows(const GradientArguments& x, int i0, const typename OwnRowsTeam<kDepth>::Sums& sums) {
  using Team = OwnRowsTeam<kDepth>;
  const int depth = x.s.operands.depth_bytes / HalfPrecision::kBytes;
  const float unlifted = x.multiplier == nullptr ? 1.0f : 1.0f / *x.multiplier;  // a power of two
#pragma unroll
  for (int u = 0; u < Team::kRows; ++u) {
    const int row = i0 + Team::row(thread_index(), u);
    if (row >= x.s.operands.a.count) continue;
    float* const out = x.out + static_cast<int64_t>(row) * depth;
#pragma unroll
    for (int v = 0; v < kDepth / kProductColumns * 2; ++v) {
      const int column = Team::column(thread_index(), v);
      if (column < depth) out[column] = sums.at(u, v) * unlifted;
    }
  }
}

// A block has the tile_rows() of A from its index on.
template <class Precision, int kDepth>
FASTCL_KERNEL(OwnRowsFragments<kDepth>::kThreads, OwnRowsFragments<kDepth>::kBlocksPerSm)
gradient_kernel(FASTCL_PARAMETER(GradientArguments) x) {
  using Team = OwnRowsTeam<kDepth>;
  constexpr int kRows = tile_rows<Team>(), kColumns = tile_columns<Team>();
  auto& memory = *reinterpret_cast<GradientMemory<kDepth>*>(shared_memory());
  const Operands& operands = x.s.operands;
  const int i0 = block_index() * kRows;
  copy_rows<kDepth, kRows>(operands.a, operands.depth_bytes, i0, memory.own);
  copy_rows<kDepth, kColumns>(operands.b, operands.depth_bytes, 0, memory.tiles[0]);
  commit_copies();

  TileWeights<GradientArguments, Team, false> weights(x, memory.factors);
  // Row factors stay. Of the columns' a thread has one term at one column, read while the tile before is multiplied.
  const int own = thread_index();
  static_assert(kRows <= Team::kThreads && Team::kThreads == kMostTerms * kColumns);
  const bool flagged = own < kRows && weights.prepare_all_factors(true, i0, own);
  const int k = thread_index() % kColumns;
  const int t = thread_index() / kColumns;
  OneStatistic statistic = {};
  if (t < x.plan.columns.count) statistic = weights.read_statistic(false, t, k);
  int target = weights.read_target(false, k);
  typename Team::Sums sums = {};
  int stage = 0;
  for (int j0 = 0; j0 < operands.b.count; j0 += kColumns) {
    wait_for_copies<0>();
    sync_threads();
    // What this overwrites was multiplied by everyone before they met.
    const int next = j0 + kColumns;
    if (next < operands.b.count) {
      copy_rows<kDepth, kColumns>(operands.b, operands.depth_bytes, next, memory.tiles[1 - stage]);
    }
    commit_copies();
    bool found = flagged || weights.has_self_pair(i0, j0) || next > operands.b.count;
    found |= own < kRows && weights.has_target(true, i0, j0, own);
    if (t < x.plan.columns.count) {
      found |= weights.prepare_factors(false, t, k, statistic);
      statistic = weights.read_statistic(false, t, next + k);
    }
    if (t == 0) {
      weights.prepare_target(false, k, target);
      found |= weights.has_target(false, i0, j0, k);
      target = weights.read_target(false, next + k);
    }
    auto values = multiply_rows<Precision, kDepth>(memory.own, memory.tiles[stage]);
    weights.form(any_thread(found), i0, j0, values);
    add_weighted_rows<Precision, kDepth>(values, memory.tiles[stage], sums);
    stage = 1 - stage;
  }
  store_rows<kDepth>(x, i0, sums);
}

}  // namespace fastcl::cuda
