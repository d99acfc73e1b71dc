// The sweep of one panel of rows for value and gradient together: E = exp(S - shift) of the whole panel is kept, so
// that once the rows' sums are known, W = diag(r) E gives both products without computing S again: W @ Y = diag(r) (E @
// Y), formed along the way, and W.T @ X = E.T @ (diag(r) X).
#pragma once

#include <cmath>

#include "gradient_task.h"
#include "rows.h"
#include "statistics_task.h"

namespace fastcl::cpu {
namespace {

// One of each kind.
constexpr int kMaxPanelTerms = 3;
constexpr double kLn2 = 0.693147180559945309417;

struct PanelPair {
  int64_t column;
  int32_t row;  // within the panel
  float dot;
  float weight;  // W of the pair
};

struct PanelState {
  double sums[kMaxTile];      // of exp(S - shift) over the pairs that are not exceptional
  double log_sums[kMaxTile];  // the log of the sum of exp(S)
  double maxima[kMaxTile];
  double exceptional[kMaxPanelTerms][kMaxTile];
  double gradients[kMaxTile];  // of the loss with respect to the log-sum-exp
  double factors[kMaxTile];    // r: gradient * exp(shift - L)
  float shifts[kMaxTile];      // of each row, times log2(e)
  int64_t pair_count;
  PanelPair pairs[2 * kMaxTile];
};

struct PanelSpace {
  Workspace tile;
  PanelState* state;
  float* row;         // scratch of one row
  float* column_lhs;  // E as the LEFT of E.T @ X, tile after tile, where that is wanted
  int64_t column_lhs_size;
};

template <class Dot>
inline size_t lay_out_panel(const Sweep& sweep, const RowPanels& job, char* base, PanelSpace& space) {
  size_t used = lay_out<Dot>(sweep, base, space.tile);
  const auto take = [&](size_t bytes) {
    char* p = base + used;
    used += static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 64));
    return p;
  };
  space.state = reinterpret_cast<PanelState*>(take(sizeof(PanelState)));
  space.row = reinterpret_cast<float*>(take(sizeof(float) * sweep.x.depth));
  const int64_t tiles = (sweep.y.rows + sweep.tile - 1) / sweep.tile;
  space.column_lhs_size = round_up(sweep.row_block, kStrip) / Dot::kPairs * kTilePitch;
  space.column_lhs =
      reinterpret_cast<float*>(take(job.b == nullptr ? 0 : sizeof(float) * tiles * space.column_lhs_size));
  return used;
}

// The rows of a panel: whole strips, as evenly shared as can be.
inline Tile panel_tile(const Sweep& sweep, const RowPanels& job, int64_t panel) {
  const int64_t units = (sweep.x.rows + kPanelUnit - 1) / kPanelUnit;
  const int64_t first = units * panel / job.count * kPanelUnit;
  const int64_t end = smaller(sweep.x.rows, units * (panel + 1) / job.count * kPanelUnit);
  return {first, end - first, 0, 0, false};
}

// E = exp2(dot * scale - shift) of a strip, stored as the LEFT of both products, and its sums along the rows.
template <class Dot>
inline void exponentiate(const Strip& strip, float scale, const float* shifts, [[maybe_unused]] const Workspace& space,
                         float* row_sums) {
  Vector sums[kStrip];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) sums[r] = Vector{};
  for (int64_t v = 0; v < strip.vectors; ++v) {
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; r += 2) {
      float* even = strip.dots + r * kTilePitch + v * kLanes;
      float* odd = even + kTilePitch;
      const Vector e = exp2(load(even) * scale - shifts[r]);
      const Vector f = exp2(load(odd) * scale - shifts[r + 1]);
      sums[r] += e;
      sums[r + 1] += f;
      if constexpr (Dot::kPairs == 1) {
        store(even, e);
        store(odd, f);
      } else {
#ifdef __AVX512BF16__
        store_pair(e, f, strip.row + r, v * kLanes, space);
#endif
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) row_sums[r] = sum(sums[r]);
}

inline int term_of(const AxisTerms& axis, Reduce reduce) {
  int t = 0;
  while (t < axis.count && axis.terms[t].reduce != reduce) ++t;
  return t;
}

// E of the whole panel with the shifts that the state holds, the rows' sums, the exceptional pairs, and E @ Y.
template <class Dot, bool kMasked>
inline void sweep_panel(const Sweep& sweep, const RowPanels& job, Tile tile, PanelSpace& space) {
  PanelState& state = *space.state;
  const Scale scale(sweep.scale);
  const float factor = scale.logit * kLog2E;
  const int64_t depth = sweep.x.depth;
  Workspace own = space.tile;
  [[maybe_unused]] TileTags tags;
  state.pair_count = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    state.sums[r] = 0.0;
    state.maxima[r] = -INFINITY;
  }
  if (job.a != nullptr) std::memset(job.a + tile.row * depth, 0, sizeof(float) * tile.rows * depth);
  for (int64_t number = 0; tile.column < sweep.y.rows; tile.column += sweep.tile, ++number) {
    tile.columns = smaller(sweep.y.rows - tile.column, sweep.tile);
    prepare_columns<Dot>(sweep, tile, job.a != nullptr, own);
    if constexpr (kMasked) tags.gather_columns(sweep, tile);
    if (job.b != nullptr) {
      own.w_columns = space.column_lhs + number * space.column_lhs_size;
      if (Dot::kPairs == 1) own.logits = own.w_rows = own.w_columns;
    }
    for_each_strip<Dot>(sweep, tile, own, Dot::kPairs == 1, [&](const Strip& strip) {
      Strip seen = strip;
      if constexpr (kMasked) {
        tags.gather_rows(sweep, tile, strip);
        if (sweep.rows.dense_max) {
          seen.dots = own.masked;
          mask_strip(sweep, tags, strip, sweep.rows.terms[term_of(sweep.rows, Reduce::kMax)], seen.dots);
        }
      }
      if (sweep.rows.dense_max) merge_maxima(seen, scale.logit, tile.columns, state.maxima, nullptr);
      if constexpr (kMasked) {
        mask_strip(sweep, tags, strip, sweep.rows.terms[term_of(sweep.rows, Reduce::kLogSumExp)], strip.dots);
      }
      float sums[kStrip];
      exponentiate<Dot>(strip, factor, state.shifts + strip.row, own, sums);
      for (int64_t r = 0; r < strip.height; ++r) state.sums[strip.row + r] += sums[r];
    });
    for (int32_t i = 0; i < own.exceptional->strip_end[kMaxStrips]; ++i) {
      const Exceptional& pair = own.exceptional->pairs[i];
      state.pairs[state.pair_count++] = {tile.column + pair.column, pair.row, pair.dot, 0.0f};
    }
    if (job.a != nullptr) {
      add_product<Dot, Layout::kRowMajor>(own.w_rows, kTilePitch / Dot::kPairs, own.y_slices.words, own.y_slices.pitch,
                                          tile.columns, false, job.a + tile.row * depth, tile.rows, depth);
    }
  }
}

// The panel's rows as the RIGHT of E.T @ (diag(r) X).
template <class Dot>
inline void prepare_scaled_rows(const Sweep& sweep, const Tile& tile, PanelSpace& space) {
  const int64_t padded = round_up(tile.rows, kStrip);
  const int64_t depth = sweep.x.depth;
  const int64_t pitch = row_pitch(row_words<Dot>(depth));
  float* buffer = space.tile.x_buffer;
  for (int64_t r = 0; r < padded; ++r, buffer += pitch) {
    int64_t filled = 0;
    if (r < tile.rows) {
      filled = row_words<Dot>(depth);
      const float factor = static_cast<float>(space.state->factors[r]);
      widen_row(sweep.x, tile.row + r, space.row);
      if (Dot::kPairs == 1) {
        for (int64_t d = 0; d < depth; ++d) buffer[d] = space.row[d] * factor;
      } else {
        uint16_t* out = reinterpret_cast<uint16_t*>(buffer);
        for (int64_t d = 0; d < depth; ++d) out[d] = narrow_bfloat16(space.row[d] * factor);
        if (depth % 2 != 0) out[depth] = 0;
      }
    }
    std::memset(buffer + filled, 0, sizeof(float) * (pitch - filled));
  }
  pack_slices<Dot>({space.tile.x_buffer, pitch}, padded, depth, slice_size<Dot>(padded), space.tile.x_slices_buffer);
}

// What the terms are worth over a row's exceptional pairs.
inline void absorb_pairs(const Sweep& sweep, int64_t first_row, int64_t rows, PanelState& state) {
  const AxisTerms& axis = sweep.rows;
  for (int t = 0; t < axis.count; ++t) {
    for (int64_t r = 0; r < rows; ++r) state.exceptional[t][r] = empty_value(axis.terms[t].reduce);
  }
  for (int64_t e = 0; e < state.pair_count; ++e) {
    const PanelPair& pair = state.pairs[e];
    const float logit = pair.dot * sweep.scale;
    const PairOutcome outcome = test_pair(sweep, first_row + pair.row, pair.column, logit).row;
    for (int t = 0; t < axis.count; ++t) {
      if (!admits(axis.terms[t], outcome)) continue;
      double& value = state.exceptional[t][pair.row];
      value = absorb(axis.terms[t].reduce, value, logit);
    }
  }
}

inline double term_value(const AxisTerms& axis, const PanelState& state, int t, int64_t r) {
  const Reduce reduce = axis.terms[t].reduce;
  const double exceptional = state.exceptional[t][r];
  if (!is_dense(axis.terms[t]) || reduce == Reduce::kSum) return exceptional;
  return absorb(reduce, exceptional, reduce == Reduce::kLogSumExp ? state.log_sums[r] : state.maxima[r]);
}

// The panel's E, and what it says of the rows; where the one shift did not suffice, once more with one for each row.
template <class Dot, bool kMasked>
inline void sweep_rows(const Sweep& sweep, const RowPanels& job, const Tile& tile, PanelSpace& space) {
  PanelState& state = *space.state;
  const int log_sum_exp = term_of(sweep.rows, Reduce::kLogSumExp);
  prepare_tile_rows<Dot>(sweep, tile, false, space.tile);
  for (float& shift : state.shifts) shift = sweep.shift * kLog2E;
  sweep_panel<Dot, kMasked>(sweep, job, tile, space);
  absorb_pairs(sweep, tile.row, tile.rows, state);
  const double shift = state.shifts[0] * kLn2;
  bool flagged = !std::isfinite(sweep.shift);
  for (int64_t r = 0; r < tile.rows; ++r) {
    state.log_sums[r] = state.sums[r] == 0.0 ? -INFINITY : shift + std::log(state.sums[r]);
    const double value = term_value(sweep.rows, state, log_sum_exp, r);
    flagged |= value - sweep.shift < job.flag_below && !(job.trust_empty && value == -INFINITY);
  }
  if (!flagged) return;
  running_rows<Dot>(sweep, tile, sweep.rows.terms[log_sum_exp], state.log_sums, space.tile);
  for (int64_t r = 0; r < tile.rows; ++r) {
    state.shifts[r] = static_cast<float>(term_value(sweep.rows, state, log_sum_exp, r)) * kLog2E;
    // A row that admits nothing, or nothing but -inf, weighs nothing.
    if (std::isinf(state.shifts[r])) state.shifts[r] = INFINITY;
  }
  prepare_tile_rows<Dot>(sweep, tile, false, space.tile);
  sweep_panel<Dot, kMasked>(sweep, job, tile, space);
}

// Statistics, losses and weights of the panel's rows; E @ Y becomes W @ Y.
inline void finish_rows(const Sweep& sweep, const RowPanels& job, const Tile& tile, PanelSpace& space) {
  PanelState& state = *space.state;
  const int64_t depth = sweep.x.depth;
  const int log_sum_exp = term_of(sweep.rows, Reduce::kLogSumExp);
  const int positive = term_of(sweep.rows, Reduce::kSum);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t i = tile.row + r;
    for (int t = 0; t < sweep.rows.count; ++t) {
      job.statistics[t * sweep.x.rows + i] = static_cast<float>(term_value(sweep.rows, state, t, r));
    }
    const double l = term_value(sweep.rows, state, log_sum_exp, r);
    const double difference =
        l - (job.head.positive != nullptr ? job.head.positive[i] : term_value(sweep.rows, state, positive, r));
    const double weight = job.head.weights != nullptr ? job.head.weights[i] : 1.0;
    state.gradients[r] = weight == 0.0 ? 0.0 : weight * sigmoid(difference);
    state.factors[r] = l == -INFINITY ? 0.0 : state.gradients[r] * std::exp(state.shifts[r] * kLn2 - l);
    job.losses[i] = weight == 0.0 ? 0.0 : weight * softplus(difference);
    if (job.positive != nullptr) job.positive[i] = static_cast<float>(-state.gradients[r]);
    if (job.a == nullptr) continue;
    float* row = job.a + i * depth;
    for (int64_t d = 0; d < depth; ++d) row[d] = static_cast<float>(row[d] * state.factors[r]);
  }
  for (int64_t e = 0; e < state.pair_count; ++e) {
    PanelPair& pair = state.pairs[e];
    const int64_t i = tile.row + pair.row;
    const float logit = pair.dot * sweep.scale;
    const PairOutcome outcome = test_pair(sweep, i, pair.column, logit).row;
    double slopes = 0.0;
    for (int t : {log_sum_exp, positive}) {
      if (t == sweep.rows.count || !admits(sweep.rows.terms[t], outcome)) continue;
      const double value = term_value(sweep.rows, state, t, pair.row);
      const double sign = t == positive ? -1.0 : 1.0;
      slopes += sign * slope(sweep.rows.terms[t].reduce, value, logit);
    }
    pair.weight = static_cast<float>(state.gradients[pair.row] * slopes);
    if (job.a == nullptr) continue;
    widen_row(sweep.y, pair.column, space.row);
    add_scaled(pair.weight, space.row, depth, job.a + i * depth);
  }
}

template <class Dot>
void panel_task(const Sweep& sweep, const RowPanels& job, int64_t panel, void* memory) {
  PanelSpace space;
  lay_out_panel<Dot>(sweep, job, static_cast<char*>(memory), space);
  const Tile tile = panel_tile(sweep, job, panel);
  if (sweep.masked) {
    sweep_rows<Dot, true>(sweep, job, tile, space);
  } else {
    sweep_rows<Dot, false>(sweep, job, tile, space);
  }
  finish_rows(sweep, job, tile, space);
  if (job.b != nullptr) prepare_scaled_rows<Dot>(sweep, tile, space);
}

template <class Dot>
void panel_columns_task(const Sweep& sweep, const RowPanels& job, int64_t panel, int64_t column, void* memory) {
  PanelSpace space;
  lay_out_panel<Dot>(sweep, job, static_cast<char*>(memory), space);
  const int64_t depth = sweep.x.depth;
  Tile tile = panel_tile(sweep, job, panel);
  tile.column = column * sweep.tile;
  tile.columns = smaller(sweep.y.rows - tile.column, sweep.tile);
  float* out = job.b + tile.column * depth;
  if (panel == 0) std::memset(out, 0, sizeof(float) * tile.columns * depth);
  add_product<Dot, Layout::kColumnMajor>(space.column_lhs + column * space.column_lhs_size, kTilePitch,
                                         space.tile.x_slices_buffer, slice_size<Dot>(round_up(tile.rows, kStrip)),
                                         tile.rows, false, out, tile.columns, depth);
  for (int64_t e = 0; e < space.state->pair_count; ++e) {
    const PanelPair& pair = space.state->pairs[e];
    const int64_t at = pair.column - tile.column;
    if (at < 0 || at >= tile.columns) continue;
    widen_row(sweep.x, tile.row + pair.row, space.row);
    add_scaled(pair.weight, space.row, depth, out + at * depth);
  }
}

}  // namespace
}  // namespace fastcl::cpu
