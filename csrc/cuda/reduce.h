// Sums and maxima of what a warp holds of a tile, along its rows or its columns.
#pragma once

#include "product.h"

namespace fastcl::cuda {

// Every pair of a thread.
constexpr uint64_t kAllPairs = ~uint64_t{0};

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

// Merges x[k] over the lanes that differ in the bits kFirst ... kLast, and halves with each bit which k a lane goes on
// with: 8 numbers take 7 shuffles over 8 lanes, 6 over 4.
template <int kFirst, int kLast, class Merge>
FASTCL_DEVICE void merge_across(float (&x)[kOwn], Merge merge) {
  int left = kOwn;
#pragma unroll
  for (int bit = kFirst; bit >= kLast; bit /= 2) {
    left /= 2;
    const bool upper = lane_of(thread_index()) & bit;
#pragma unroll
    for (int k = 0; k < left; ++k) {
      const float theirs = shuffle_xor(upper ? x[k] : x[k + left], bit);
      x[k] = merge(upper ? x[k + left] : x[k], theirs);
    }
  }
}

// Merges the values of the pairs in `counted` (terms.h) along this warp's columns into what the warps across have for
// the tile's rows so far. Each of the kTile numbers has one thread that writes it, always the same.
template <class Merge>
FASTCL_DEVICE void reduce_along_rows(Merge merge, const Accumulators& values, uint64_t counted, float* row_sums) {
  float x[kOwn];
#pragma unroll
  for (int u = 0; u < kOwn; ++u) {
    x[u] = Merge::kNothing;
#pragma unroll
    for (int v = 0; v < kOwn; ++v) {
      x[u] = merge(x[u], counted >> (u * kOwn + v) & 1 ? values.at(u, v) : Merge::kNothing);
    }
  }
  merge_across<2, 1>(x, merge);
  const int first = own_row(thread_index(), row_after_sum(lane_of(thread_index())));
  row_sums[first] = merge(row_sums[first], x[0]);
  row_sums[first + 8] = merge(row_sums[first + 8], x[1]);
}

// The tile's columns along this warp's rows.
template <class Merge>
FASTCL_DEVICE void reduce_along_columns(Merge merge, const Accumulators& values, uint64_t counted, float* column_sums) {
  float x[kOwn];
#pragma unroll
  for (int v = 0; v < kOwn; ++v) {
    x[v] = Merge::kNothing;
#pragma unroll
    for (int u = 0; u < kOwn; ++u) {
      x[v] = merge(x[v], counted >> (u * kOwn + v) & 1 ? values.at(u, v) : Merge::kNothing);
    }
  }
  merge_across<16, 4>(x, merge);
  column_sums[own_column(thread_index(), column_after_sum(lane_of(thread_index())))] = x[0];
}

}  // namespace fastcl::cuda
