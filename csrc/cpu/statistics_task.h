// The forward sweep of one task: sums of exponentials and maxima along rows and columns, tile by tile.
#pragma once

#include <cmath>

#include "exp2.h"
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
                               bool self_pair, bool target, double logit) {
  for (int t = 0; t < axis.count; ++t) {
    if (!admits(axis.terms[t], self_pair, target)) continue;
    double& value = into.exceptional(lane, t)[index];
    value = absorb(axis.terms[t].reduce, value, logit);
  }
}

template <class Dot>
void statistics_task(const Sweep& sweep, const Accumulators& rows, const Accumulators& columns, const Task& task,
                     void* memory) {
  Workspace space;
  lay_out<Dot>(sweep, static_cast<char*>(memory), space);
  const Scale scale(sweep.scale);
  const float factor = scale.logit * kLog2E;
  const float shift = sweep.shift * kLog2E;
  const auto pack = [&](const Tile& tile) { prepare_columns<Dot>(sweep, tile, false, space); };
  for_each_tile(sweep, task, pack, [&](const Tile& tile) {
    prepare_tile_rows<Dot>(sweep, tile, false, space);
    double* row_sum = rows.dense_sum(task.row_lane) + tile.row;
    double* row_max = sweep.rows.dense_max ? rows.dense_max(task.row_lane) + tile.row : nullptr;
    double* column_max = sweep.columns.dense_max ? columns.dense_max(task.column_lane) + tile.column : nullptr;
    if (sweep.columns.dense_sum) std::memset(space.column_sums, 0, sizeof(float) * kMaxTile);
    for_each_strip<Dot>(sweep, tile, space, false, [&](const Strip& strip) {
      float sums[kStrip];
      if (sweep.columns.dense_sum) {
        sum_exponentials<true>(strip, factor, shift, sums, space.column_sums + strip.column);
      } else if (sweep.rows.dense_sum) {
        sum_exponentials<false>(strip, factor, shift, sums, nullptr);
      }
      for (int64_t r = 0; sweep.rows.dense_sum && r < strip.height; ++r) row_sum[strip.row + r] += sums[r];
      if (row_max != nullptr || column_max != nullptr) {
        merge_maxima(strip, scale.logit, tile.columns, row_max, column_max);
      }
    });
    for (int64_t c = 0; sweep.columns.dense_sum && c < tile.columns; ++c) {
      columns.dense_sum(task.column_lane)[tile.column + c] += space.column_sums[c];
    }
    for (int32_t i = 0; i < space.exceptional->strip_end[kMaxStrips]; ++i) {
      const Exceptional& pair = space.exceptional->pairs[i];
      const int64_t x = tile.row + pair.row;
      const int64_t y = tile.column + pair.column;
      const PairOutcome outcome = test_pair(sweep.tests, x, y);
      const float logit = pair.dot * sweep.scale;
      absorb_exceptional(sweep.rows, rows, task.row_lane, x, outcome.self_pair, outcome.row_target, logit);
      if (tile.diagonal && x == y) continue;
      absorb_exceptional(sweep.columns, columns, task.column_lane, y, outcome.self_pair, outcome.column_target, logit);
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

// values[tile.rows] from all columns.
template <class Dot>
inline void running_rows(const Sweep& sweep, Tile tile, double* values, Workspace& space) {
  const Scale scale(sweep.scale);
  Running running[kMaxTile];
  prepare_tile_rows<Dot>(sweep, tile, false, space);
  for (; tile.column < sweep.y.rows; tile.column += sweep.tile) {
    tile.columns = smaller(sweep.y.rows - tile.column, sweep.tile);
    prepare_columns<Dot>(sweep, tile, false, space);
    for_each_strip<Dot>(sweep, tile, space, false, [&](const Strip& strip) {
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
void running_task(const Sweep& sweep, const Task& task, double* values, void* memory) {
  Workspace space;
  lay_out<Dot>(sweep, static_cast<char*>(memory), space);
  for (int64_t rb = task.rows.begin; rb < task.rows.end; rb += task.rows.step) {
    const int64_t row_end = smaller((rb + 1) * sweep.row_block, sweep.x_count);
    for (int64_t row = rb * sweep.row_block; row < row_end; row += sweep.tile) {
      running_rows<Dot>(sweep, {row, smaller(row_end - row, sweep.tile), 0, 0, false}, values + row, space);
    }
  }
}

}  // namespace
}  // namespace fastcl::cpu
