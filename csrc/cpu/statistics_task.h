// The forward sweep of one task: sums of exponentials and maxima along rows and columns, tile by tile.
#pragma once

#include <cmath>

#include "exp2.h"
#include "tile.h"

namespace fastcl::cpu {
namespace {

// Sums of exp2(dot * scale - shift) over a strip: added to row_sums[kStrip], and to column_sums where kColumns.
template <bool kColumns>
inline void sum_exponentials(const float* dots, int64_t vectors, float scale, float shift, float* row_sums,
                             float* column_sums) {
  Vector rows[kStrip];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) rows[r] = Vector{};
  for (int64_t v = 0; v < vectors; ++v, dots += kLanes) {
    Vector column = kColumns ? load(column_sums + v * kLanes) : Vector{};
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      const Vector e = exp2(load(dots + r * kTilePitch) * scale - shift);
      rows[r] += e;
      if (kColumns) column += e;
    }
    if (kColumns) store(column_sums + v * kLanes, column);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) row_sums[r] = sum(rows[r]);
}

// Maxima of a strip's logits, merged into the accumulators of its rows and of the tile's columns, null where not
// wanted.
inline void merge_maxima(const float* dots, int64_t vectors, float scale, int64_t rows, int64_t columns,
                         double* row_max, double* column_max) {
  Vector row[kStrip];
  for (int r = 0; r < kStrip; ++r) row[r] = broadcast(-INFINITY);
  for (int64_t v = 0; v < vectors; ++v, dots += kLanes) {
    Vector column = broadcast(-INFINITY);
    for (int r = 0; r < kStrip; ++r) {
      const Vector logits = load(dots + r * kTilePitch) * scale;
      row[r] = larger(logits, row[r]);
      column = larger(logits, column);
    }
    for (int lane = 0; column_max != nullptr && lane < kLanes && v * kLanes + lane < columns; ++lane) {
      double& value = column_max[v * kLanes + lane];
      value = absorb(Reduce::kMax, value, column[lane]);
    }
  }
  for (int64_t r = 0; row_max != nullptr && r < smaller(rows, kStrip); ++r) {
    row_max[r] = absorb(Reduce::kMax, row_max[r], largest(row[r]));
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
  const auto pack = [&](const Tile& tile) { pack_columns<Dot>(sweep, tile, false, space); };
  for_each_tile(sweep, task, pack, [&](const Tile& tile) {
    pack_tile_rows<Dot>(sweep, tile, false, space);
    const bool column_sums = sweep.columns.dense_sum && !tile.diagonal;
    const bool column_max = sweep.columns.dense_max && !tile.diagonal;
    if (column_sums) std::memset(space.column_sums, 0, sizeof(float) * kTile);
    for_each_strip<Dot>(sweep, tile, space, false, [&](int64_t row, const float* dots, int64_t vectors) {
      float sums[kStrip];
      if (column_sums) {
        sum_exponentials<true>(dots, vectors, factor, shift, sums, space.column_sums);
      } else if (sweep.rows.dense_sum) {
        sum_exponentials<false>(dots, vectors, factor, shift, sums, nullptr);
      }
      const int64_t height = smaller(tile.rows - row, kStrip);
      for (int64_t r = 0; sweep.rows.dense_sum && r < height; ++r) {
        rows.dense_sum(task.row_lane)[tile.row + row + r] += sums[r];
      }
      if (sweep.rows.dense_max || column_max) {
        merge_maxima(dots, vectors, scale.logit, height, tile.columns,
                     sweep.rows.dense_max ? rows.dense_max(task.row_lane) + tile.row + row : nullptr,
                     column_max ? columns.dense_max(task.column_lane) + tile.column : nullptr);
      }
    });
    for (int64_t c = 0; column_sums && c < tile.columns; ++c) {
      columns.dense_sum(task.column_lane)[tile.column + c] += space.column_sums[c];
    }
    for (int32_t i = 0; i < space.exceptional->strip_end[kStrips]; ++i) {
      const Exceptional& pair = space.exceptional->pairs[i];
      const int64_t x = tile.row + pair.row;
      const int64_t y = tile.column + pair.column;
      const PairOutcome outcome = test_pair(sweep.tests, x, y);
      const float logit = pair.dot * sweep.scale;
      absorb_exceptional(sweep.rows, rows, task.row_lane, x, outcome.self_pair, outcome.row_target, logit);
      if (tile.diagonal) continue;
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

template <class Dot>
void running_task(const Sweep& sweep, const Task& task, double* values, void* memory) {
  Workspace space;
  lay_out<Dot>(sweep, static_cast<char*>(memory), space);
  const Scale scale(sweep.scale);
  Running running[kTile];
  for (int64_t rb = task.rows.begin; rb < task.rows.end; rb += task.rows.step) {
    const int64_t row_end = smaller((rb + 1) * sweep.row_block, sweep.x_count);
    for (int64_t row = rb * sweep.row_block; row < row_end; row += kTile) {
      Tile tile{row, smaller(row_end - row, kTile), 0, 0, false};
      pack_tile_rows<Dot>(sweep, tile, false, space);
      for (int64_t r = 0; r < tile.rows; ++r) running[r] = Running{};
      for (; tile.column < sweep.y.rows; tile.column += kTile) {
        tile.columns = smaller(sweep.y.rows - tile.column, kTile);
        pack_columns<Dot>(sweep, tile, false, space);
        for_each_strip<Dot>(sweep, tile, space, false, [&](int64_t first, const float* dots, int64_t vectors) {
          for (int64_t r = 0; r < smaller(tile.rows - first, kStrip); ++r) {
            add_row(running[first + r], dots + r * kTilePitch, vectors, scale.logit);
          }
        });
      }
      for (int64_t r = 0; r < tile.rows; ++r) {
        const double max = running[r].max;
        values[row + r] = std::isinf(max) ? max : max + std::log(running[r].sum);
      }
    }
  }
}

}  // namespace
}  // namespace fastcl::cpu
