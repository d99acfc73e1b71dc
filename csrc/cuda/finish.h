// The end of a forward sweep: partial results become statistics, and log-sum-exps that the fixed shift may have hurt
// are computed again with a running maximum (fastcl/backends/shift.py has the rule).
#pragma once

#include "sweep.h"

namespace fastcl::cuda {

struct CombineArguments {
  const float* partials;  // [terms, slots, count]
  const float* shift;
  float* statistics;  // [terms, count]
  Terms terms;
  int slots;
  int count;
};

// log(2^shift * total). The exponent of `total` meets the shift first: both are large, and their sum is exact.
FASTCL_DEVICE float shifted_log(float total, float shift_log2) {
  int exponent;
  const float fraction = frexpf(total, &exponent);
  return (log2f(fraction) + (static_cast<float>(exponent) + shift_log2)) * kLn2;
}

FASTCL_HOST_DEVICE int combine_blocks(int count) { return static_cast<int>(ceil_div(count, kThreads)); }

// Adds the slots in their order. A block has kThreads rows or columns.
FASTCL_KERNEL(kThreads, 1) combine_kernel(FASTCL_PARAMETER(CombineArguments) x) {
  const int64_t index = int64_t{block_index()} * kThreads + thread_index();
  if (index >= x.count) return;
  for (int t = 0; t < x.terms.count; ++t) {
    const Reduce reduce = x.terms.at[t].reduce;
    float value = nothing(reduce);
    for (int slot = 0; slot < x.slots; ++slot) {
      value = merge(reduce, value, x.partials[partial_index(t, slot, index, x.slots, x.count)]);
    }
    if (reduce == Reduce::kLogSumExp) value = shifted_log(value, multiply_rounded(*x.shift, kLog2E));
    x.statistics[static_cast<int64_t>(t) * x.count + index] = value;
  }
}

struct RedoArguments {
  Similarity s;  // with the own side, whose log-sum-exps these are, as its rows; shape and target as they were
  PairTerm term;
  bool own_is_row;
  float flag_below;
  float* statistics;  // [own]
};

// A sum of exponentials below a maximum of its own, both in base 2.
struct RunningSum {
  float largest = -kInfinity;
  float total = 0.0f;

  FASTCL_DEVICE void raise(float to) {
    const float high = to > largest ? to : largest;
    total *= exp2_fast(largest - (high == -kInfinity ? 0.0f : high));
    largest = high;
  }
  FASTCL_DEVICE void add(const RunningSum& other) {
    raise(other.largest);
    total += other.total * exp2_fast(other.largest - (largest == -kInfinity ? 0.0f : largest));
  }
};

struct RedoMemory : TileTags<true> {
  alignas(128) unsigned char stages[kStages * kStageBytes];
  RunningSum sums[kWarpsAcross][kTile];
};

// A block has kTile of the own side. Always launched, so that nobody has to ask the device whether it is needed; with
// nothing flagged it returns at once. A sum of 0 is flagged too: it doesn't tell an empty row from one that
// underflowed.
template <class Precision>
FASTCL_KERNEL(kThreads, 1)
redo_kernel(FASTCL_PARAMETER(RedoArguments) x) {
  RedoMemory& memory = *reinterpret_cast<RedoMemory*>(shared_memory());
  const int own0 = block_index() * kTile;
  const int own = own0 + thread_index();
  const int own_count = x.s.operands.a.count;
  const bool mine = thread_index() < kTile && own < own_count;
  const bool flagged = mine && x.statistics[own] - *x.s.shift < x.flag_below;
  if (!any_thread(flagged)) return;

  const float scale_log2 = *x.s.scale * kLog2E;
  RunningSum sums[BlockTeam::kRows];
  for_each_tile<Precision>(
      x.s.operands, RowWalk(own0, x.s.operands.b.count), memory.stages, [&](const RowWalk& tile, Accumulators& values) {
        TeamPairs<BlockTeam> admitted = all_pairs<BlockTeam::kRows, BlockTeam::kColumns>();
        if (tests_tags(x.term)) {
          load_tags<BlockTeam>(x.s, tile.i(), tile.j(), memory);
          sync_threads();
          const auto tags =
              tag_sets<BlockTeam, BlockTeam::kRows, BlockTeam::kColumns>(x.s, memory, tile.i(), tile.j(), values, 0, 0);
          admitted = tags.admitted(admitted, x.term, false);
        }
#pragma unroll
        for (int u = 0; u < BlockTeam::kRows; ++u) {
          const int here = tile.i() + BlockTeam::row(thread_index(), u);
          float largest = -kInfinity;
#pragma unroll
          for (int v = 0; v < BlockTeam::kColumns; ++v) {
            const int there = tile.j() + BlockTeam::column(thread_index(), v);
            const int i = x.own_is_row ? here : there;
            const int j = x.own_is_row ? there : here;
            const int target = x.s.target != nullptr && i < x.s.shape.rows ? x.s.target[i] : -1;
            const bool counted = admitted.has(u, v) && counts(x.term, x.s.shape, i, j, target);
            values.at(u, v) = counted ? values.at(u, v) * scale_log2 : -kInfinity;
            largest = values.at(u, v) > largest ? values.at(u, v) : largest;
          }
          sums[u].raise(largest);
          const float base = sums[u].largest == -kInfinity ? 0.0f : sums[u].largest;
#pragma unroll
          for (int v = 0; v < BlockTeam::kColumns; ++v) sums[u].total += exp2_fast(values.at(u, v) - base);
        }
      });
#pragma unroll
  for (int u = 0; u < BlockTeam::kRows; ++u) {
#pragma unroll
    for (int bit = 2; bit >= 1; bit /= 2) {
      sums[u].add({shuffle_xor(sums[u].largest, bit), shuffle_xor(sums[u].total, bit)});
    }
    if (lane_of(thread_index()) % 4 == 0) {
      memory.sums[warp_across(thread_index())][BlockTeam::row(thread_index(), u)] = sums[u];
    }
  }
  sync_threads();
  if (!flagged) return;
  RunningSum sum = memory.sums[0][thread_index()];
  for (int w = 1; w < kWarpsAcross; ++w) sum.add(memory.sums[w][thread_index()]);
  x.statistics[own] = shifted_log(sum.total, sum.largest);
}

}  // namespace fastcl::cuda
