// The backward sweep of one task: W from recomputed logits, tile by tile, and its products with the operands.
#pragma once

#include <cmath>

#include "exp2.h"
#include "masks.h"
#include "tile_products.h"

namespace fastcl::cpu {
namespace {

// The dense terms' factors along the rows of a strip or the columns of a tile, padded so that the padding weighs 0.
template <int64_t kSize, int kMaxTerms = kMaxDense>
struct Factors {
  alignas(64) float gradient[kMaxTerms][kSize];
  alignas(64) float ratio[kMaxTerms][kSize];
  alignas(64) float value[kMaxTerms][kSize];
  int count;

  void gather(const AxisGradient& axis, int64_t first, int64_t size) {
    count = axis.dense_count;
    for (int t = 0; t < count; ++t) {
      for (int64_t i = 0; i < kSize; ++i) {
        const int64_t at = first + i;
        gradient[t][i] = i < size ? axis.dense[t].gradient[at] : 0.0f;
        ratio[t][i] = i < size ? axis.dense[t].ratio[at] : 0.0f;
        value[t][i] = i < size ? axis.dense[t].value[at] : INFINITY;
      }
    }
  }
};

// Overwrites a strip's dots with W, the sum of g * exp(S - L) over the one dense term of each axis. They share one
// exponential e = exp(S - shift), as exp(S - L) = e * ratio. The incoming gradient is multiplied last: its product with
// the ratio alone could underflow.
template <bool kRows, bool kColumns>
inline void weigh_shared(const Strip& strip, float scale, float shift, const Factors<kStrip>& rows,
                         const Factors<kMaxTile>& columns) {
  for (int64_t v = 0; v < strip.vectors; ++v) {
    const int64_t c = strip.column + v * kLanes;
    const Vector column_gradient = kColumns ? load(columns.gradient[0] + c) : Vector{};
    const Vector column_ratio = kColumns ? load(columns.ratio[0] + c) : Vector{};
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      float* p = strip.dots + r * kTilePitch + v * kLanes;
      const Vector e = exp2(load(p) * scale - shift);
      Vector w{};
      if (kRows) w = rows.gradient[0][r] * (e * rows.ratio[0][r]);
      if (kColumns) w += column_gradient * (e * column_ratio);
      store(p, w);
    }
  }
}

// The same for any number of terms and any L, with an exponential for each.
inline void weigh_apart(const Strip& strip, float scale, const Factors<kStrip>& rows,
                        const Factors<kMaxTile>& columns) {
  for (int64_t v = 0; v < strip.vectors; ++v) {
    const int64_t c = strip.column + v * kLanes;
    for (int r = 0; r < kStrip; ++r) {
      float* p = strip.dots + r * kTilePitch + v * kLanes;
      const Vector logits = load(p) * scale;
      Vector w{};
      for (int t = 0; t < rows.count; ++t) w += rows.gradient[t][r] * exp2((logits - rows.value[t][r]) * kLog2E);
      for (int t = 0; t < columns.count; ++t) {
        w += load(columns.gradient[t] + c) * exp2((logits - load(columns.value[t] + c)) * kLog2E);
      }
      store(p, w);
    }
  }
}

// One axis' share in W at an exceptional pair.
inline double exceptional_weight(const AxisTerms& axis, const AxisGradient& gradient, int64_t index,
                                 const PairOutcome& pair, double logit) {
  double weight = 0.0;
  for (int t = 0; t < axis.count; ++t) {
    if (!admits(axis.terms[t], pair) || axis.terms[t].reduce == Reduce::kMax) continue;
    const int64_t at = t * gradient.size + index;
    weight += gradient.incoming[at] * slope(axis.terms[t].reduce, gradient.values[at], logit);
  }
  return weight;
}

inline bool any_flagged(const AxisGradient& axis, int64_t first, int64_t size) {
  return axis.dense_count > 0 && std::memchr(axis.flagged + first, 1, size) != nullptr;
}

// W where all dense terms agree on the pairs that are not exceptional.
struct SharedWeights {
  const Sweep& sweep;
  const AxisGradient& rows;
  const AxisGradient& columns;
  const Scale scale{sweep.scale};
  const float factor = scale.logit * kLog2E;
  const float shift = sweep.shift * kLog2E;
  bool apart = false;
  Factors<kMaxTile> column_factors;

  void begin_columns(const Tile& tile) { column_factors.gather(columns, tile.column, tile.columns); }

  void begin(const Tile& tile) {
    apart = rows.dense_count > 1 || columns.dense_count > 1 || any_flagged(rows, tile.row, tile.rows) ||
            any_flagged(columns, tile.column, tile.columns);
  }

  void weigh(const Tile& tile, const Strip& strip) {
    Factors<kStrip> row_factors;
    row_factors.gather(rows, tile.row + strip.row, strip.height);
    if (apart) {
      weigh_apart(strip, scale.logit, row_factors, column_factors);
    } else if (rows.dense_count > 0 && columns.dense_count > 0) {
      weigh_shared<true, true>(strip, factor, shift, row_factors, column_factors);
    } else if (rows.dense_count > 0) {
      weigh_shared<true, false>(strip, factor, shift, row_factors, column_factors);
    } else if (columns.dense_count > 0) {
      weigh_shared<false, true>(strip, factor, shift, row_factors, column_factors);
    } else {
      weigh_shared<false, false>(strip, factor, shift, row_factors, column_factors);
    }
  }
};

// W of a masked sweep: each dense term's share where its mask admits the pair.
struct MaskedWeights {
  using RowFactors = Factors<kStrip, kMaxSlopes>;
  const Sweep& sweep;
  const AxisGradient& rows;
  const AxisGradient& columns;
  const float factor = sweep.scale * kLog2E;
  const float shift = sweep.shift * kLog2E;
  bool apart = false;
  TileTags tags;
  Factors<kMaxTile, kMaxSlopes> column_factors;

  void begin_columns(const Tile& tile) {
    tags.gather_columns(sweep, tile);
    column_factors.gather(columns, tile.column, tile.columns);
  }

  void begin(const Tile& tile) {
    apart = any_flagged(rows, tile.row, tile.rows) || any_flagged(columns, tile.column, tile.columns);
  }

  // Adds a term's share in a block of W along one axis or, where it has one mask along both, along both.
  template <bool kRows, bool kColumns>
  void add_share(Reduce reduce, const Lanes* pairs, const RowFactors& row, int k, int64_t c, const float* dots,
                 const float* e, float* w) const {
    const auto for_each_row = [&](const auto& share) {
#pragma GCC unroll 16
      for (int r = 0; r < kStrip; ++r) store(w + r * kLanes, load(w + r * kLanes) + only(pairs[r], share(r)));
    };
    const Vector gradient = kColumns ? load(column_factors.gradient[k] + c) : Vector{};
    if (reduce == Reduce::kSum) {
      for_each_row([&](int r) { return kRows ? gradient + row.gradient[k][r] : gradient; });
    } else if (!apart) {
      const Vector ratio = kColumns ? load(column_factors.ratio[k] + c) : Vector{};
      for_each_row([&](int r) {
        const Vector value = load(e + r * kLanes);
        Vector share = gradient * (value * ratio);
        if (kRows) share += row.gradient[k][r] * (value * row.ratio[k][r]);
        return share;
      });
    } else {
      const Vector value = kColumns ? load(column_factors.value[k] + c) : Vector{};
      for_each_row([&](int r) {
        const Vector logits = load(dots + r * kTilePitch) * sweep.scale;
        Vector share{};
        if (kColumns) share = gradient * exp2((logits - value) * kLog2E);
        if (kRows) share += row.gradient[k][r] * exp2((logits - row.value[k][r]) * kLog2E);
        return share;
      });
    }
  }

  [[gnu::noinline]] void weigh(const Tile& tile, const Strip& strip) {
    RowFactors row_factors;
    row_factors.gather(rows, tile.row + strip.row, strip.height);
    tags.gather_rows(sweep, tile, strip);
    const bool exponentials = !apart && (sweep.rows.dense_sum || sweep.columns.dense_sum);
    Block block;
    alignas(64) float e[kStrip * kLanes] = {};
    alignas(64) float w[kStrip * kLanes];
    for (int64_t v = 0; v < strip.vectors; ++v) {
      float* dots = strip.dots + v * kLanes;
      const int64_t c = strip.column + v * kLanes;
      test_block(sweep, tags, strip, v, block);
#pragma GCC unroll 16
      for (int r = 0; r < kStrip; ++r) {
        if (exponentials) store(e + r * kLanes, exp2(load(dots + r * kTilePitch) * factor - shift));
        store(w + r * kLanes, Vector{});
      }
      BlockMask mask(block);
      // The slopes of a symmetric plan are those of both axes, and all but a threshold is the same for both.
      const auto serves_both = [&](const PairTerm& term) { return sweep.symmetric && term.above == Test::kAbsent; };
      for (int k = 0; k < rows.dense_count; ++k) {
        const PairTerm& term = sweep.rows.terms[rows.dense[k].term];
        const Lanes* pairs = mask.of(term, block.row_above);
        if (serves_both(term)) {
          add_share<true, true>(term.reduce, pairs, row_factors, k, c, dots, e, w);
        } else {
          add_share<true, false>(term.reduce, pairs, row_factors, k, c, dots, e, w);
        }
      }
      for (int k = 0; k < columns.dense_count; ++k) {
        const PairTerm& term = sweep.columns.terms[columns.dense[k].term];
        if (serves_both(term)) continue;
        add_share<false, true>(term.reduce, mask.of(term, block.column_above), row_factors, k, c, dots, e, w);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kStrip; ++r) store(dots + r * kTilePitch, load(w + r * kLanes));
    }
  }
};

template <class Dot, class Weights>
void gradient_task(const Sweep& sweep, const AxisGradient& rows, const AxisGradient& columns, const Task& task,
                   void* memory) {
  Workspace space;
  lay_out<Dot>(sweep, static_cast<char*>(memory), space);
  const int64_t depth = sweep.x.depth;
  Weights weights{sweep, rows, columns};
  const auto pack = [&](const Tile& tile) {
    prepare_columns<Dot>(sweep, tile, rows.product.wanted(), space);
    weights.begin_columns(tile);
  };
  for_each_tile(sweep, task, pack, [&](const Tile& tile) {
    prepare_tile_rows<Dot>(sweep, tile, columns.product.wanted(), space);
    weights.begin(tile);
    for_each_strip<Dot>(sweep, tile, space, Dot::kPairs == 1, [&](const Strip& strip) {
      weights.weigh(tile, strip);
      const int64_t s = strip.row / kStrip;
      for (int32_t i = space.exceptional->strip_end[s]; i < space.exceptional->strip_end[s + 1]; ++i) {
        const Exceptional& pair = space.exceptional->pairs[i];
        const int64_t x = tile.row + pair.row;
        const int64_t y = tile.column + pair.column;
        const float logit = pair.dot * sweep.scale;
        const PairOutcomes outcomes = test_pair(sweep, x, y, logit);
        double weight = exceptional_weight(sweep.rows, rows, x, outcomes.row, logit);
        // On the diagonal W + W.T is twice W, and both products add it.
        if (!tile.diagonal || x != y) {
          weight += exceptional_weight(sweep.columns, columns, y, outcomes.column, logit);
        }
        strip.dots[(pair.row - strip.row) * kTilePitch + pair.column - strip.column] = static_cast<float>(weight);
      }
      store_weights<Dot>(strip, space);
    });
    add_products<Dot>(tile, task, depth, space, rows.product, columns.product);
  });
}

}  // namespace
}  // namespace fastcl::cpu
