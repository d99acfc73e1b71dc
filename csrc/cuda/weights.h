// S becomes W; and the kernel that writes one panel of the gradient matrix W from a recomputed S, which library
// products multiply.
//
// W[i, j] is the sum over terms of (incoming gradient) * (slope of the term at S[i, j]). With L a row's or column's
// log-sum-exp the slope is exp(S - L); as exp(S - c) * exp(c - L) it costs one exponential a pair for all terms
// together, which is right unless the row or column is flagged (fastcl/backends/shift.py): a tile with a flagged one
// takes each exponential apart. The incoming gradient is multiplied last, for the two factors may lie at opposite ends
// of float32.
#pragma once

#include "staging.h"
#include "sweep.h"

namespace fastcl::cuda {

// exp(c - L) would lose precision beyond; only statistics merged from other shards come near.
constexpr float kLargestExcess = 80.0f;

// What the terms of an axis need at each of a tile's rows or columns.
struct AxisFactors {
  float lse_log2[kMostTerms][kTile];  // +inf in place of an empty row's -inf, so that its slopes come out as 0
  float ratio[kMostTerms][kTile];     // exp(c - L)
  float incoming[kMostTerms][kTile];
  int targets[kTile];
};

template <bool kTagged>
struct TileFactors : TileTags<kTagged> {
  AxisFactors rows;
  AxisFactors columns;
};

// A term's log-sum-exp, sum or maximum at a row or column, and the loss's gradient with respect to it.
struct OneStatistic {
  float value;
  float incoming;
};

// Tiles of S that become W in a team's registers. Arguments is WeightsArguments or GradientArguments, whose operands
// may be exchanged: (j, i) of S is then at (i, j).
template <class Arguments, class Team, bool kTagged>
class TileWeights {
 public:
  using Accumulators = typename Team::Accumulators;
  using Memory = TileFactors<kTagged>;

  FASTCL_DEVICE TileWeights(const Arguments& x, Memory& memory)
      : x_(x), memory_(memory), scale_log2_(*x.s.scale * kLog2E), shift_log2_(shift_log2(x.s)) {}

  // What the t-th term along an axis came to at a row or column of it, neutral over the edge.
  FASTCL_DEVICE OneStatistic read_statistic(bool is_row, int t, int index) const {
    const int count = axis_count(is_row);
    if (index >= count) return {-kInfinity, 0.0f};
    const Statistics& statistics = is_row ? x_.rows : x_.columns;
    const int64_t at = static_cast<int64_t>(t) * count + index;
    return {statistics.values[at], statistics.incoming[at]};
  }

  // Leaves the factors of a term for the tile's k-th row or column in shared memory; whether it is flagged.
  FASTCL_DEVICE bool prepare_factors(bool is_row, int t, int k, OneStatistic statistic) {
    AxisFactors& factors = is_row ? memory_.rows : memory_.columns;
    factors.incoming[t][k] = statistic.incoming;
    if ((is_row ? x_.plan.rows : x_.plan.columns).at[t].reduce != Reduce::kLogSumExp) return false;
    const float lse = statistic.value;
    const float excess = lse - *x_.s.shift;
    factors.lse_log2[t][k] = lse == -kInfinity ? kInfinity : lse * kLog2E;
    factors.ratio[t][k] = exp2_fast(shift_log2_ - factors.lse_log2[t][k]);
    return (excess < x_.flag_below && lse > -kInfinity) || excess > kLargestExcess;
  }

  // Of all terms, for the k-th of those rows or columns that begin at `first`, and its target.
  FASTCL_DEVICE bool prepare_all_factors(bool is_row, int first, int k) {
    bool found = false;
    for (int t = 0; t < (is_row ? x_.plan.rows : x_.plan.columns).count; ++t) {
      found |= prepare_factors(is_row, t, k, read_statistic(is_row, t, first + k));
    }
    prepare_target(is_row, k, read_target(is_row, first + k));
    return found;
  }

  FASTCL_DEVICE int read_target(bool is_row, int index) const {
    return has_targets(is_row) && index < axis_count(is_row) ? x_.s.target[index] : -1;
  }
  FASTCL_DEVICE void prepare_target(bool is_row, int k, int target) {
    if (has_targets(is_row)) (is_row ? memory_.rows : memory_.columns).targets[k] = target;
  }

  // Whether the target of the k-th row or column, which this thread has prepared, is in the tile at (i0, j0).
  FASTCL_DEVICE bool has_target(bool is_row, int i0, int j0, int k) const {
    if (!has_targets(is_row)) return false;
    const int target = (is_row ? memory_.rows : memory_.columns).targets[k];
    const int opposite = is_row ? j0 : i0;
    return target >= opposite && target - opposite < (is_row ? tile_columns<Team>() : tile_rows<Team>());
  }

  FASTCL_DEVICE bool has_self_pair(int i0, int j0) const {
    constexpr int kRows = tile_rows<Team>(), kColumns = tile_columns<Team>();
    if (!x_.plan.uses_self) return false;
    return x_.exchanged ? cuda::has_self_pair(x_.s.shape, j0, i0, kColumns, kRows)
                        : cuda::has_self_pair(x_.s.shape, i0, j0, kRows, kColumns);
  }

  // Once the factors are there; `masked` where anything is flagged or for a mask to look at.
  FASTCL_DEVICE void form(bool masked, int i0, int j0, Accumulators& values) {
    if (masked) {
      form<true>(i0, j0, values);
    } else {
      form<false>(i0, j0, values);
    }
  }

 private:
  static constexpr int kPartRows = Team::kPartRows;
  static constexpr int kPartColumns = Team::kPartColumns;
  using Part = float[kPartRows][kPartColumns];
  using PartPairs = PairSet<kPartRows, kPartColumns>;
  using PartSets = TagSets<kPartRows, kPartColumns>;

  FASTCL_DEVICE int axis_count(bool is_row) const { return is_row ? x_.s.operands.a.count : x_.s.operands.b.count; }

  // Whether rows, or columns, are those of S that have targets.
  FASTCL_DEVICE bool has_targets(bool is_row) const {
    return x_.plan.uses_target && (x_.plan.symmetric || is_row != x_.exchanged);
  }

  // S becomes W, a part at a time.
  template <bool kMasked>
  FASTCL_DEVICE void form(int i0, int j0, Accumulators& values) {
#pragma unroll
    for (int u = 0; u < Team::kRows; u += kPartRows) {
#pragma unroll
      for (int v = 0; v < Team::kColumns; v += kPartColumns) form_part<kMasked>(i0, j0, u, v, values);
    }
    if (x_.multiplier == nullptr) return;
    const float multiplier = *x_.multiplier;
#pragma unroll
    for (int u = 0; u < Team::kRows; ++u) {
#pragma unroll
      for (int v = 0; v < Team::kColumns; ++v) values.at(u, v) *= multiplier;
    }
  }

  template <bool kMasked>
  FASTCL_DEVICE void form_part(int i0, int j0, int u, int v, Accumulators& values) {
    const TilePairs pairs{x_.s.shape, i0, j0, memory_.rows.targets, memory_.columns.targets};
    Part weights = {};
    PartSets tags = {};
    if constexpr (kTagged) tags = tag_sets<Team, kPartRows, kPartColumns>(x_.s, memory_, i0, j0, values, u, v);
#pragma unroll
    for (int k = 0; k < kPartRows; ++k) {
#pragma unroll
      for (int l = 0; l < kPartColumns; ++l) {
        float& value = values.at(u + k, v + l);
        value = kMasked ? value * scale_log2_ : exp2_fast(value * scale_log2_ - shift_log2_);
      }
    }
    for (int t = 0; t < x_.plan.rows.count; ++t) add_along_rows<kMasked>(t, pairs, tags, u, v, values, weights);
    for (int t = 0; t < x_.plan.columns.count; ++t) add_along_columns<kMasked>(t, pairs, tags, u, v, values, weights);
#pragma unroll
    for (int k = 0; k < kPartRows; ++k) {
#pragma unroll
      for (int l = 0; l < kPartColumns; ++l) values.at(u + k, v + l) = weights[k][l];
    }
  }

  template <bool kMasked>
  FASTCL_DEVICE PartPairs counted_by(const PairTerm& term, const TilePairs& pairs, const PartSets& tags,
                                     bool along_columns, int u, int v) const {
    PartPairs counted = all_pairs<kPartRows, kPartColumns>();
    if (kMasked) {
      const bool turned = x_.plan.symmetric ? along_columns : x_.exchanged;
      counted = counted_pairs<Team, kPartRows, kPartColumns>(term, pairs, turned, Team::thread(), u, v);
    }
    if constexpr (kTagged) counted = tags.admitted(counted, term, along_columns);
    return counted;
  }

  template <bool kMasked>
  FASTCL_DEVICE void add_along_rows(int t, const TilePairs& pairs, const PartSets& tags, int u, int v,
                                    const Accumulators& values, Part& weights) {
    const PairTerm term = x_.plan.rows.at[t];
    if (term.reduce == Reduce::kMax || !contributes(term, kMasked)) return;
    const PartPairs counted = counted_by<kMasked>(term, pairs, tags, false, u, v);
#pragma unroll
    for (int k = 0; k < kPartRows; ++k) {
      const int row = Team::row(Team::thread(), u + k);
#pragma unroll
      for (int l = 0; l < kPartColumns; ++l) {
        const float part = slope<kMasked>(term, memory_.rows, t, row, values.at(u + k, v + l));
        if (counted.has(k, l)) weights[k][l] += part;
      }
    }
  }

  template <bool kMasked>
  FASTCL_DEVICE void add_along_columns(int t, const TilePairs& pairs, const PartSets& tags, int u, int v,
                                       const Accumulators& values, Part& weights) {
    const PairTerm term = x_.plan.columns.at[t];
    if (term.reduce == Reduce::kMax || !contributes(term, kMasked)) return;
    const PartPairs counted = counted_by<kMasked>(term, pairs, tags, true, u, v);
#pragma unroll
    for (int l = 0; l < kPartColumns; ++l) {
      const int column = Team::column(Team::thread(), v + l);
#pragma unroll
      for (int k = 0; k < kPartRows; ++k) {
        const float part = slope<kMasked>(term, memory_.columns, t, column, values.at(u + k, v + l));
        if (counted.has(k, l)) weights[k][l] += part;
      }
    }
  }

  // Times the incoming gradient; `value` is a logit in base 2 where masked, else its exponential.
  template <bool kMasked>
  FASTCL_DEVICE static float slope(const PairTerm& term, const AxisFactors& factors, int t, int index, float value) {
    if (term.reduce == Reduce::kSum) return factors.incoming[t][index];
    float slope = kMasked ? exp2_fast(value - factors.lse_log2[t][index]) : value * factors.ratio[t][index];
    // A probability, unless rounding moved a pair over a threshold since the forward: it isn't in L then.
    if (kTagged && term.above != Test::kAbsent && slope > 1.0f) slope = 1.0f;
    return slope * factors.incoming[t][index];
  }

  const Arguments& x_;
  Memory& memory_;
  const float scale_log2_;
  const float shift_log2_;
};

// A team's tiles of W. `staged` has room for one, on its way to memory.
template <class Precision, class Team, bool kTagged>
class Weights {
 public:
  using Accumulators = typename Team::Accumulators;
  using Memory = TileFactors<kTagged>;

  FASTCL_DEVICE Weights(const WeightsArguments& x, Memory& memory, unsigned char* staged)
      : x_(x), memory_(memory), weights_(x, memory), staged_(staged) {}

  // Between two calls, and before the first, the team has met.
  FASTCL_DEVICE void write_tile(int i0, int j0, Accumulators& values) {
    const bool masked = find_exceptions(i0, j0);
    weights_.form(masked, i0, j0, values);
    stage_tile<Precision, Team, false>(values, staged_);
    store(i0 - x_.panel.row_begin, j0 - x_.panel.column_begin);
    if (x_.panel.mirror && i0 < j0) {
      stage_tile<Precision, Team, true>(values, staged_);
      store(j0 - x_.panel.column_begin, i0 - x_.panel.row_begin);
    }
  }

 private:
  // Whether anything in this tile is flagged or for a mask to look at; leaves the axes' factors and tags in shared
  // memory.
  FASTCL_DEVICE bool find_exceptions(int i0, int j0) {
    bool found = weights_.has_self_pair(i0, j0);
    if constexpr (kTagged) load_tags<Team>(x_.s, i0, j0, memory_);
#pragma unroll
    for (int axis = Team::thread() / kTile; axis < 2; axis += Team::kThreads / kTile) {
      const int k = Team::thread() % kTile;
      found |= weights_.prepare_all_factors(axis == 0, axis == 0 ? i0 : j0, k);
      found |= weights_.has_target(axis == 0, i0, j0, k);
    }
    return Team::any(found);
  }

  // The staged tile into the panel, row by row in whole chunks.
  FASTCL_DEVICE void store(int row0, int column0) {
    constexpr int kElements = kChunkBytes / Precision::kBytes;
    constexpr int kAcross = kTile / kElements;
    for (int k = Team::thread(); k < kTile * kAcross; k += Team::kThreads) {
      const int row = k / kAcross;
      const int column = k % kAcross * kElements;
      unsigned char* const to =
          x_.out + (int64_t{row0} + row) * x_.out_pitch + (int64_t{column0} + column) * Precision::kBytes;
      *reinterpret_cast<Chunk*>(to) =
          *reinterpret_cast<const Chunk*>(staged_ + staged_offset(row, column, Precision::kBytes));
    }
  }

  const WeightsArguments& x_;
  Memory& memory_;
  TileWeights<WeightsArguments, Team, kTagged> weights_;
  unsigned char* const staged_;
};

template <bool kTagged>
struct WeightsMemory {
  alignas(128) unsigned char stages[kStages * kStageBytes];
  TileFactors<kTagged> factors;
};
static_assert(kTile * kTile * 4 <= kStages * kStageBytes, "a tile of W is staged where the operands were");

// A block has one tile of the panel.
template <class Precision, bool kTagged>
FASTCL_KERNEL(kThreads, Precision::kBlocksPerSm)
weights_kernel(FASTCL_PARAMETER(WeightsArguments) x) {
  auto& memory = *reinterpret_cast<WeightsMemory<kTagged>*>(shared_memory());
  const SuperTile tile = panel_tile(block_index(), x.panel);
  const OneTile at(x.panel.row_begin + tile.r * kTile, x.panel.column_begin + tile.c * kTile);
  Weights<Precision, BlockTeam, kTagged> weights(x, memory.factors, memory.stages);
  for_each_tile<Precision>(x.s.operands, at, memory.stages, [&](const OneTile& tile, Accumulators& values) {
    weights.write_tile(tile.i(), tile.j(), values);
  });
}

}  // namespace fastcl::cuda
