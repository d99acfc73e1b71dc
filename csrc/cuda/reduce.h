// Sums and maxima of what a warp holds of a tile, along its rows or its columns. A Team is a type of fragments (tile.h)
// with the instructions that its threads meet by, and the accumulators that they hold.
#pragma once

#include "primitives.h"
#include "terms.h"

namespace fastcl::cuda {

// Some of the pairs that a thread of a team holds.
template <class Team>
using TeamPairs = PairSet<Team::kRows, Team::kColumns>;

constexpr float kInfinity = __builtin_huge_valf();

struct Add {
  static constexpr float kNothing = 0.0f;
  FASTCL_HOST_DEVICE float operator()(float x, float y) const { return x + y; }
};

// As torch.amax: NaN wins.
struct Largest {
  static constexpr float kNothing = -kInfinity;
  FASTCL_HOST_DEVICE float operator()(float x, float y) const { return x != x || x > y ? x : y; }
};

// Merges x[k] over the lanes that differ in the bits kBit ... kLast, and halves with each bit which of the kLeft
// numbers a lane goes on with: 8 numbers take 7 shuffles over 8 lanes, 6 over 4.
template <class Team, int kBit, int kLast, int kLeft, int kCount, class Merge>
FASTCL_DEVICE void merge_across(float (&x)[kCount], Merge merge) {
  const bool upper = lane_of(Team::thread()) & kBit;
#pragma unroll
  for (int k = 0; k < kLeft / 2; ++k) {
    const float theirs = shuffle_xor(upper ? x[k] : x[k + kLeft / 2], kBit);
    x[k] = merge(upper ? x[k + kLeft / 2] : x[k], theirs);
  }
  if constexpr (kBit > kLast) merge_across<Team, kBit / 2, kLast, kLeft / 2>(x, merge);
}

// Merges the values of the pairs in `counted` (terms.h) along this warp's columns into what the warps across have for
// the tile's rows so far. Each of the kTile numbers has one thread that writes it, always the same.
template <class Team, class Merge>
FASTCL_DEVICE void reduce_along_rows(Merge merge, const typename Team::Accumulators& values,
                                     const TeamPairs<Team>& counted, float* row_sums) {
  float x[Team::kRows];
#pragma unroll
  for (int u = 0; u < Team::kRows; ++u) {
    x[u] = Merge::kNothing;
#pragma unroll
    for (int v = 0; v < Team::kColumns; ++v) {
      x[u] = merge(x[u], counted.has(u, v) ? values.at(u, v) : Merge::kNothing);
    }
  }
  merge_across<Team, 2, 1, Team::kRows>(x, merge);
  const int first = row_after_sum<Team>(lane_of(Team::thread()));
#pragma unroll
  for (int k = 0; k < Team::kRows / 4; ++k) {
    float& sum = row_sums[Team::row(Team::thread(), first + k)];
    sum = merge(sum, x[k]);
  }
}

// The tile's columns along this warp's rows.
template <class Team, class Merge>
FASTCL_DEVICE void reduce_along_columns(Merge merge, const typename Team::Accumulators& values,
                                        const TeamPairs<Team>& counted, float* column_sums) {
  float x[Team::kColumns];
#pragma unroll
  for (int v = 0; v < Team::kColumns; ++v) {
    x[v] = Merge::kNothing;
#pragma unroll
    for (int u = 0; u < Team::kRows; ++u) {
      x[v] = merge(x[v], counted.has(u, v) ? values.at(u, v) : Merge::kNothing);
    }
  }
  merge_across<Team, 16, 4, Team::kColumns>(x, merge);
  const int first = column_after_sum<Team>(lane_of(Team::thread()));
#pragma unroll
  for (int k = 0; k < Team::kColumns / 8; ++k) column_sums[Team::column(Team::thread(), first + k)] = x[k];
}

}  // namespace fastcl::cuda
