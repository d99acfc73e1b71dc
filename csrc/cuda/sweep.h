// The forward sweep: every term's partial results for one super-tile of S (order.h).
//
// exp(S - c) with one c for the sweep; terms of the same axis or of both share that exponential. A tile without a self
// pair, a target or an edge needs no mask, and most tiles are of that kind. Of a symmetric plan pair (i, j) of a tile
// above the diagonal also serves row j as (j, i), whose mask is evaluated by itself because a target need not be an
// involution. A plan with tags has them looked at in every tile, in kernels of its own.
#pragma once

#include "product.h"
#include "reduce.h"
#include "tags.h"

namespace fastcl::cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

// c in base 2, to the bit the same wherever it is added to or taken from an exponent.
FASTCL_DEVICE float shift_log2(const Similarity& s) { return multiply_rounded(*s.shift, kLog2E); }

struct SweepArguments {
  Similarity s;
  Plan plan;
  SuperAxis rows;
  SuperAxis columns;
  float* row_partials;     // [row terms, columns.slots, rows.count]
  float* column_partials;  // [column terms, rows.slots, columns.count]; of a symmetric plan the same
};

// What a team has of a tile's sums in shared memory, by those of its warps that share a row or a column.
template <class Team, bool kTagged>
struct TileSums : TileTags<kTagged> {
  float rows[kMostTerms][Team::kWarpsAcross][kTile];
  float columns[kMostTerms][Team::kWarpsDown][kTile];
  int row_targets[kTile];
  int column_targets[kTile];
};

FASTCL_HOST_DEVICE float nothing(Reduce reduce) { return reduce == Reduce::kMax ? Largest::kNothing : Add::kNothing; }
FASTCL_HOST_DEVICE float merge(Reduce reduce, float x, float y) {
  return reduce == Reduce::kMax ? Largest()(x, y) : Add()(x, y);
}

// At a masked tile a term looks pair by pair; at any other a dense term counts every pair, and a sparse one none.
FASTCL_HOST_DEVICE bool contributes(const PairTerm& term, bool masked) { return masked || is_dense(term); }

// A team's walks over super-tiles.
template <class Team, bool kTagged>
class Sweep {
 public:
  using Accumulators = typename Team::Accumulators;
  using Memory = TileSums<Team, kTagged>;

  FASTCL_DEVICE Sweep(const SweepArguments& x, Memory& memory) : x_(x), memory_(memory) {
    for (int t = 0; t < x_.plan.rows.count; ++t) {
      for (int k = Team::thread(); k < Team::kWarpsAcross * kTile; k += Team::kThreads) {
        memory_.rows[t][k / kTile][k % kTile] = nothing(x_.plan.rows.at[t].reduce);
      }
    }
  }

  // Between two calls, and before the first, the team has met.
  FASTCL_DEVICE void reduce_tile(SuperTile at, const SuperTileWalk& tile, Accumulators& values) {
    const int i0 = tile.i();
    const int j0 = tile.j();
    const bool mirrored = x_.plan.symmetric && i0 < j0;
    const bool along_columns = mirrored || (!x_.plan.symmetric && x_.plan.columns.count > 0);
    const bool masked = find_exceptions(i0, j0, mirrored);
    // Two copies of the code, each for a constant `masked`; with tags there are registers for one alone.
    if constexpr (kTagged) {
      reduce_terms(masked, i0, j0, along_columns, values);
    } else if (masked) {
      reduce_terms(true, i0, j0, along_columns, values);
    } else {
      reduce_terms(false, i0, j0, along_columns, values);
    }
    if (along_columns || tile.ends_row()) Team::sync();
    if (along_columns) flush_columns(at, i0, j0, masked);
    if (tile.ends_row()) flush_rows(at, i0);
  }

 private:
  using Sets = TagSets<Team::kRows, Team::kColumns>;

  // Whether masks have to look at this tile's places; leaves the targets and tags that they compare with in shared
  // memory.
  FASTCL_DEVICE bool find_exceptions(int i0, int j0, bool mirrored) {
    const Shape& shape = x_.s.shape;
    bool found = i0 > shape.rows - kTile || j0 > shape.columns - kTile;
    if (x_.plan.uses_self) found |= has_self_pair(shape, i0, j0, kTile, kTile);
    if constexpr (kTagged) load_tags<Team>(x_.s, i0, j0, memory_);
    if (!x_.plan.uses_target) {
      if constexpr (kTagged) Team::sync();
      return found;
    }
#pragma unroll
    for (int axis = Team::thread() / kTile; axis < 2; axis += Team::kThreads / kTile) {
      const int k = Team::thread() % kTile;
      if (axis == 0) {
        const int target = i0 + k < shape.rows ? x_.s.target[i0 + k] : -1;
        memory_.row_targets[k] = target;
        found |= target >= j0 && target - j0 < kTile;
      } else if (mirrored) {
        const int target = j0 + k < shape.columns ? x_.s.target[j0 + k] : -1;
        memory_.column_targets[k] = target;
        found |= target >= i0 && target - i0 < kTile;
      }
    }
    return Team::any(found);
  }

  // Sums and maxima of S first; then the exponentials take its place.
  FASTCL_DEVICE void reduce_terms(bool masked, int i0, int j0, bool along_columns, Accumulators& values) {
    const TilePairs pairs{x_.s.shape, i0, j0, memory_.row_targets, memory_.column_targets};
    // Read here and not once: registers are dearer.
    const float scale = *x_.s.scale;
    const float shift = shift_log2(x_.s);
    Sets tags = {};
    if constexpr (kTagged) tags = tag_sets<Team, Team::kRows, Team::kColumns>(x_.s, memory_, i0, j0, values, 0, 0);
#pragma unroll
    for (int u = 0; u < Team::kRows; ++u) {
#pragma unroll
      for (int v = 0; v < Team::kColumns; ++v) values.at(u, v) *= scale;
    }
    reduce_axes<Add>(masked, Reduce::kSum, pairs, tags, along_columns, values);
    reduce_axes<Largest>(masked, Reduce::kMax, pairs, tags, along_columns, values);
#pragma unroll
    for (int u = 0; u < Team::kRows; ++u) {
#pragma unroll
      for (int v = 0; v < Team::kColumns; ++v) values.at(u, v) = exp2_fast(values.at(u, v) * kLog2E - shift);
    }
    reduce_axes<Add>(masked, Reduce::kLogSumExp, pairs, tags, along_columns, values);
  }

  // All terms of one kind, whose values are there.
  template <class Merge>
  FASTCL_DEVICE void reduce_axes(bool masked, Reduce reduce, const TilePairs& pairs, const Sets& tags,
                                 bool along_columns, const Accumulators& values) {
    for (int t = 0; t < x_.plan.rows.count; ++t) {
      const PairTerm term = x_.plan.rows.at[t];
      if (term.reduce != reduce || !contributes(term, masked)) continue;
      const TeamPairs<Team> counted = counted_by(masked, term, pairs, tags, false);
      reduce_along_rows<Team>(Merge(), values, counted, memory_.rows[t][Team::across(Team::thread())]);
    }
    for (int t = 0; along_columns && t < x_.plan.columns.count; ++t) {
      const PairTerm term = x_.plan.columns.at[t];
      if (term.reduce != reduce || !contributes(term, masked)) continue;
      const TeamPairs<Team> counted = counted_by(masked, term, pairs, tags, true);
      reduce_along_columns<Team>(Merge(), values, counted, memory_.columns[t][Team::down(Team::thread())]);
    }
  }

  FASTCL_DEVICE TeamPairs<Team> counted_by(bool masked, const PairTerm& term, const TilePairs& pairs, const Sets& tags,
                                           bool along_columns) const {
    constexpr int kRows = Team::kRows, kColumns = Team::kColumns;
    TeamPairs<Team> counted = all_pairs<kRows, kColumns>();
    if (masked) {
      const bool turned = along_columns && x_.plan.symmetric;
      counted = counted_pairs<Team, kRows, kColumns>(term, pairs, turned, Team::thread(), 0, 0);
    }
    if constexpr (kTagged) counted = tags.admitted(counted, term, along_columns);
    return counted;
  }

  // The same thread writes a column's partial results for all tiles above one another, and a row's: no fence is needed.
  FASTCL_DEVICE void flush_columns(SuperTile at, int i0, int j0, bool masked) {
    const int k = Team::thread();
    if (k >= kTile || j0 + k >= x_.columns.count) return;
    const bool first = begins_columns(at, x_.rows, i0);
    for (int t = 0; t < x_.plan.columns.count; ++t) {
      const PairTerm term = x_.plan.columns.at[t];
      const bool has_part = contributes(term, masked);
      if (!has_part && !first) continue;
      float value = nothing(term.reduce);
      for (int w = 0; has_part && w < Team::kWarpsDown; ++w)
        value = merge(term.reduce, value, memory_.columns[t][w][k]);
      float& partial = x_.column_partials[partial_index(t, at.r, int64_t{j0} + k, x_.rows.slots, x_.columns.count)];
      partial = first ? value : merge(term.reduce, partial, value);
    }
  }

  FASTCL_DEVICE void flush_rows(SuperTile at, int i0) {
    const int k = Team::thread();
    if (k >= kTile) return;
    const bool first = begins_rows(at, x_.rows, i0, x_.plan.symmetric);
    for (int t = 0; t < x_.plan.rows.count; ++t) {
      const PairTerm term = x_.plan.rows.at[t];
      float value = nothing(term.reduce);
      for (int w = 0; w < Team::kWarpsAcross; ++w) {
        value = merge(term.reduce, value, memory_.rows[t][w][k]);
        memory_.rows[t][w][k] = nothing(term.reduce);
      }
      if (i0 + k >= x_.rows.count) continue;
      float& partial = x_.row_partials[partial_index(t, at.c, int64_t{i0} + k, x_.columns.slots, x_.rows.count)];
      partial = first ? value : merge(term.reduce, partial, value);
    }
  }

  const SweepArguments& x_;
  Memory& memory_;
};

template <bool kTagged>
using SweepTeam = std::conditional_t<kTagged, FrugalBlockTeam, BlockTeam>;

template <bool kTagged>
struct SweepMemory {
  alignas(128) unsigned char stages[kStages * kStageBytes];
  TileSums<SweepTeam<kTagged>, kTagged> sums;
};

template <class Precision, bool kTagged>
FASTCL_KERNEL(kThreads, Precision::kBlocksPerSm)
sweep_kernel(FASTCL_PARAMETER(SweepArguments) x) {
  auto& memory = *reinterpret_cast<SweepMemory<kTagged>*>(shared_memory());
  Sweep<SweepTeam<kTagged>, kTagged> sweep(x, memory.sums);
  const SuperTile at = super_tile(block_index(), x.columns, x.plan.symmetric);
  for_each_tile<Precision>(
      x.s.operands, SuperTileWalk(at, x.rows, x.columns, x.plan.symmetric), memory.stages,
      [&](const SuperTileWalk& tile, Accumulators& values) { sweep.reduce_tile(at, tile, values); });
}

}  // namespace fastcl::cuda
