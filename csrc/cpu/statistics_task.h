// The forward sweep of one task: sums of exponentials and maxima along rows and columns, tile by tile.
#pragma once

#include <cmath>

#include "exp2.h"
#include "masks.h"
#include "tile.h"

namespace fastcl::cpu {
namespace {

// Sums of exp2(dot * scale - shift) over a strip: row_sums[kStrip], and added to column_sums where kColumns.
template <bool kColumns>
inline void sum_exponentials(const Strip& strip, float scale, float shift, float* row_sums, float* column_sums) {
  Vector rows[kStrip];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) rows[r] = Vector{};
  for (int64_t v = 0; v < strip.vectors; ++v) {
    Vector column = kColumns ? load(column_sums + v * kLanes) : Vector{};
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      const Vector e = exp2(load(strip.dots + r * kTilePitch + v * kLanes) * scale - shift);
      rows[r] += e;
      if (kColumns) column += e;
    }
    if (kColumns) store(column_sums + v * kLanes, column);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) row_sums[r] = sum(rows[r]);
}

// Maxima of a strip's logits, merged into those of the tile's rows and columns, null where not wanted.
inline void merge_maxima(const Strip& strip, float scale, int64_t columns, double* row_max, double* column_max) {
  Vector row[kStrip];
  for (int r = 0; r < kStrip; ++r) row[r] = broadcast(-INFINITY);
  for (int64_t v = 0; v < strip.vectors; ++v) {
    Vector column = broadcast(-INFINITY);
    for (int r = 0; r < kStrip; ++r) {
      const Vector logits = load(strip.dots + r * kTilePitch + v * kLanes) * scale;
      row[r] = larger(logits, row[r]);
      column = larger(logits, column);
    }
    const int64_t first = strip.column + v * kLanes;
    for (int lane = 0; column_max != nullptr && lane < smaller(columns - first, kLanes); ++lane) {
      column_max[first + lane] = absorb(Reduce::kMax, column_max[first + lane], column[lane]);
    }
  }
  for (int64_t r = 0; row_max != nullptr && r < strip.height; ++r) {
    row_max[strip.row + r] = absorb(Reduce::kMax, row_max[strip.row + r], largest(row[r]));
  }
}

inline void absorb_exceptional(const AxisTerms& axis, const Accumulators& into, int64_t lane, int64_t index,
                               const PairOutcome& pair, double logit) {
  for (int t = 0; t < axis.count; ++t) {
    if (!admits(axis.terms[t], pair)) continue;
    double& value = into.exceptional(lane, t)[index];
    value = absorb(axis.terms[t].reduce, value, logit);
  }
}

// What a sweep accumulates where all dense terms agree on the pairs that are not exceptional.
struct SharedSums {
  const Sweep& sweep;
  const Accumulators& rows;
  const Accumulators& columns;
  const Task& task;
  const Workspace& space;
  const Scale scale{sweep.scale};
  const float factor = scale.logit * kLog2E;
  const float shift = sweep.shift * kLog2E;

  void begin_columns(const Tile&) {}

  void begin(const Tile&) {
    if (sweep.columns.dense_sum) std::memset(space.column_sums, 0, sizeof(float) * kMaxTile);
  }

  void add(const Tile& tile, const Strip& strip) {
    float sums[kStrip];
    if (sweep.columns.dense_sum) {
      sum_exponentials<true>(strip, factor, shift, sums, space.column_sums + strip.column);
    } else if (sweep.rows.dense_sum) {
      sum_exponentials<false>(strip, factor, shift, sums, nullptr);
    }
    double* row_sum = rows.dense_sum(task.row_lane) + tile.row + strip.row;
    for (int64_t r = 0; sweep.rows.dense_sum && r < strip.height; ++r) row_sum[r] += sums[r];
    if (!sweep.rows.dense_max && !sweep.columns.dense_max) return;
    merge_maxima(strip, scale.logit, tile.columns,
                 sweep.rows.dense_max ? rows.dense_max(task.row_lane) + tile.row : nullptr,
                 sweep.columns.dense_max ? columns.dense_max(task.column_lane) + tile.column : nullptr);
  }

  void finish(const Tile& tile) {
    for (int64_t c = 0; sweep.columns.dense_sum && c < tile.columns; ++c) {
      columns.dense_sum(task.column_lane)[tile.column + c] += space.column_sums[c];
    }
  }
};

// What is admitted of a block's values, `pitch` between rows, merged into those of its rows and its columns.
template <bool kRows, bool kColumns>
inline void sum_admitted(const Lanes* pairs, const float* values, int64_t pitch, float* row_values,
                         float* column_values) {
  Vector column = kColumns ? load(column_values) : Vector{};
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
    const Vector value = only(pairs[r], load(values + r * pitch));
    if (kRows) store(row_values + r * kLanes, load(row_values + r * kLanes) + value);
    if (kColumns) column += value;
  }
  if (kColumns) store(column_values, column);
}

template <bool kRows, bool kColumns>
inline void merge_admitted(const Lanes* pairs, const float* dots, float scale, float* row_values,
                           float* column_values) {
  const Vector none = broadcast(-INFINITY);
  Vector column = kColumns ? load(column_values) : none;
  for (int r = 0; r < kStrip; ++r) {
    const Vector value = select(pairs[r], load(dots + r * kTilePitch) * scale, none);
    if (kRows) store(row_values + r * kLanes, larger(value, load(row_values + r * kLanes)));
    if (kColumns) column = larger(value, column);
  }
  if (kColumns) store(column_values, column);
}

// What a masked sweep accumulates: each dense term apart, of exponentials that all of them share.
struct MaskedSums {
  const Sweep& sweep;
  const Accumulators& rows;
  const Accumulators& columns;
  const Task& task;
  const Workspace& space;
  const float factor = sweep.scale * kLog2E;
  const float shift = sweep.shift * kLog2E;
  const bool exponentials = sweep.rows.dense_sum || sweep.columns.dense_sum;
  TileTags tags;

  static void clear(const AxisTerms& axis, int64_t size, float* values) {
    for (int t = 0; t < axis.count; ++t) {
      const float empty = axis.terms[t].reduce == Reduce::kMax ? -INFINITY : 0.0f;
      for (int64_t i = 0; i < size; ++i) values[t * size + i] = empty;
    }
  }

  // Sums are of dots, which are scaled here.
  void merge(Reduce reduce, double& into, double value) const {
    if (reduce == Reduce::kSum) value *= sweep.scale;
    into = reduce == Reduce::kMax ? absorb(reduce, into, value) : into + value;
  }

  template <bool kRows, bool kColumns>
  void merge_block(const PairTerm& term, int t, const Lanes* pairs, const float* dots, const float* e,
                   int64_t column) const {
    float* row_values = space.row_values + t * kStrip * kLanes;
    float* column_values = space.column_values + t * kMaxTile + column;
    if (term.reduce == Reduce::kMax) {
      merge_admitted<kRows, kColumns>(pairs, dots, sweep.scale, row_values, column_values);
    } else if (term.reduce == Reduce::kSum) {
      sum_admitted<kRows, kColumns>(pairs, dots, kTilePitch, row_values, column_values);
    } else if (exponentials) {
      sum_admitted<kRows, kColumns>(pairs, e, kLanes, row_values, column_values);
    }
  }

  void begin_columns(const Tile& tile) { tags.gather_columns(sweep, tile); }

  void begin(const Tile&) { clear(sweep.columns, kMaxTile, space.column_values); }

  [[gnu::noinline]] void add(const Tile& tile, const Strip& strip) {
    tags.gather_rows(sweep, tile, strip);
    clear(sweep.rows, kStrip * kLanes, space.row_values);
    Block block;
    alignas(64) float e[kStrip * kLanes] = {};
    for (int64_t v = 0; v < strip.vectors; ++v) {
      const float* dots = strip.dots + v * kLanes;
      const int64_t column = strip.column + v * kLanes;
      test_block(sweep, tags, strip, v, block);
      if (exponentials) {
#pragma GCC unroll 16
        for (int r = 0; r < kStrip; ++r) store(e + r * kLanes, exp2(load(dots + r * kTilePitch) * factor - shift));
      }
      BlockMask mask(block);
      // The terms of a symmetric plan are those of both axes, and all but a threshold is the same for both.
      const auto serves_both = [&](const PairTerm& term) { return sweep.symmetric && term.above == Test::kAbsent; };
      for (int t = 0; t < sweep.rows.count; ++t) {
        const PairTerm& term = sweep.rows.terms[t];
        if (!is_dense(term)) continue;
        const Lanes* pairs = mask.of(term, block.row_above);
        if (serves_both(term)) {
          merge_block<true, true>(term, t, pairs, dots, e, column);
        } else {
          merge_block<true, false>(term, t, pairs, dots, e, column);
        }
      }
      for (int t = 0; t < sweep.columns.count; ++t) {
        const PairTerm& term = sweep.columns.terms[t];
        if (!is_dense(term) || serves_both(term)) continue;
        merge_block<false, true>(term, t, mask.of(term, block.column_above), dots, e, column);
      }
    }
    for (int t = 0; t < sweep.rows.count; ++t) {
      const PairTerm& term = sweep.rows.terms[t];
      double* into = rows.dense(task.row_lane, t) + tile.row + strip.row;
      for (int64_t r = 0; is_dense(term) && r < strip.height; ++r) {
        const Vector values = load(space.row_values + (t * kStrip + r) * kLanes);
        merge(term.reduce, into[r], term.reduce == Reduce::kMax ? largest(values) : sum(values));
      }
    }
  }

  void finish(const Tile& tile) {
    for (int t = 0; t < sweep.columns.count; ++t) {
      const PairTerm& term = sweep.columns.terms[t];
      double* into = columns.dense(task.column_lane, t) + tile.column;
      for (int64_t c = 0; is_dense(term) && c < tile.columns; ++c) {
        merge(term.reduce, into[c], space.column_values[t * kMaxTile + c]);
      }
    }
  }
};

template <class Dot, class Sums>
void statistics_task(const Sweep& sweep, const Accumulators& rows, const Accumulators& columns, const Task& task,
                     void* memory) {
  Workspace space;
  lay_out<Dot>(sweep, static_cast<char*>(memory), space);
  Sums sums{sweep, rows, columns, task, space};
  const auto pack = [&](const Tile& tile) {
    prepare_columns<Dot>(sweep, tile, false, space);
    sums.begin_columns(tile);
  };
  for_each_tile(sweep, task, pack, [&](const Tile& tile) {
    prepare_tile_rows<Dot>(sweep, tile, false, space);
    sums.begin(tile);
    for_each_strip<Dot>(sweep, tile, space, false, [&](const Strip& strip) { sums.add(tile, strip); });
    sums.finish(tile);
    for (int32_t i = 0; i < space.exceptional->strip_end[kMaxStrips]; ++i) {
      const Exceptional& pair = space.exceptional->pairs[i];
      const int64_t x = tile.row + pair.row;
      const int64_t y = tile.column + pair.column;
      const float logit = pair.dot * sweep.scale;
      const PairOutcomes outcomes = test_pair(sweep, x, y, logit);
      absorb_exceptional(sweep.rows, rows, task.row_lane, x, outcomes.row, logit);
      if (tile.diagonal && x == y) continue;
      absorb_exceptional(sweep.columns, columns, task.column_lane, y, outcomes.column, logit);
    }
  });
}

// One row's log-sum-exp so far: log(sum) + max.
struct Running {
  float max = -INFINITY;
  double sum = 0.0;
};

inline void add_row(Running& running, const float* dots, int64_t vectors, float scale) {
  Vector highest = broadcast(running.max);
  for (int64_t v = 0; v < vectors; ++v) highest = larger(load(dots + v * kLanes) * scale, highest);
  const float max = largest(highest);
  if (max == -INFINITY) return;
  Vector sums{};
  for (int64_t v = 0; v < vectors; ++v) sums += exp2((load(dots + v * kLanes) * scale - max) * kLog2E);
  const double kept = running.max == -INFINITY ? 0.0 : running.sum * std::exp(static_cast<double>(running.max) - max);
  running = {max, kept + sum(sums)};
}

// values[tile.rows] from all columns: of the pairs that are not exceptional, or those of them that `term` admits.
template <class Dot>
inline void running_rows(const Sweep& sweep, Tile tile, const PairTerm& term, double* values, Workspace& space) {
  const Scale scale(sweep.scale);
  Running running[kMaxTile];
  TileTags tags;
  prepare_tile_rows<Dot>(sweep, tile, false, space);
  for (; tile.column < sweep.y.rows; tile.column += sweep.tile) {
    tile.columns = smaller(sweep.y.rows - tile.column, sweep.tile);
    prepare_columns<Dot>(sweep, tile, false, space);
    if (sweep.masked) tags.gather_columns(sweep, tile);
    for_each_strip<Dot>(sweep, tile, space, false, [&](const Strip& strip) {
      if (sweep.masked) {
        tags.gather_rows(sweep, tile, strip);
        mask_strip(sweep, tags, strip, term, strip.dots);
      }
      for (int64_t r = 0; r < strip.height; ++r) {
        add_row(running[strip.row + r], strip.dots + r * kTilePitch, strip.vectors, scale.logit);
      }
    });
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const double max = running[r].max;
    values[r] = std::isinf(max) ? max : max + std::log(running[r].sum);
  }
}

template <class Dot>
void running_task(const Sweep& sweep, const PairTerm& term, const Task& task, double* values, void* memory) {
  Workspace space;
  lay_out<Dot>(sweep, static_cast<char*>(memory), space);
  for (int64_t rb = task.rows.begin; rb < task.rows.end; rb += task.rows.step) {
    const int64_t row_end = smaller((rb + 1) * sweep.row_block, sweep.x_count);
    for (int64_t row = rb * sweep.row_block; row < row_end; row += sweep.tile) {
      running_rows<Dot>(sweep, {row, smaller(row_end - row, sweep.tile), 0, 0, false}, term, values + row, space);
    }
  }
}

}  // namespace
}  // namespace fastcl::cpu
