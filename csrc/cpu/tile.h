// A tile of S: its logits strip by strip, with the exceptional pairs taken out.
//
// A pair is exceptional where it is a row's own or its target and a term's mask asks for that: at most a few in a row.
// The vector code sees every other pair, for which all dense terms agree, unless masks ask for more (masks.h).
// Exceptional pairs are set to a logit of -inf before, and added by scalar code to exactly the terms that admit them
// after.
#pragma once

#include <cfloat>
#include <cmath>

#include "level.h"
#include "microkernel.h"
#include "pack.h"

namespace fastcl::cpu {
namespace {

constexpr int64_t kTilePitch = kMaxTile + 16;
constexpr int64_t kMaxStrips = kMaxTile / kStrip;
// The summed dimension is cut so that the panels of one cut stay in the second-level cache, and for accuracy: a sum of
// partial sums errs less than one long one.
constexpr int64_t kDepthCut = 256;

static_assert(kTileUnit % kStrip == 0 && kTileUnit % kPanel == 0 && kMaxTile % kTileUnit == 0,
              "a tile is made of whole strips and panels");
static_assert(kStrip % 2 == 0, "rows are interleaved in pairs");

struct Tile {
  int64_t row;     // first row, counted in Sweep::x_index where there is one
  int64_t rows;    //
  int64_t column;  // first column
  int64_t columns;
  bool diagonal;  // of a symmetric plan: only pairs with row <= column count
};

struct Exceptional {
  int32_t row;  // within the tile
  int32_t column;
  float dot;
};

struct ExceptionalPairs {
  Exceptional pairs[3 * kMaxTile];
  int32_t strip_end[kMaxStrips + 1];  // pairs of strip s are strip_end[s] up to strip_end[s + 1]
};

// The outcomes of the tests for one pair, as terms along rows and along columns see it.
struct PairOutcome {
  bool self_pair;
  bool target;
  bool label;
  bool id;
  bool above;
};

struct PairOutcomes {
  PairOutcome row;
  PairOutcome column;
};

inline bool admits(const PairTerm& term, const PairOutcome& pair) {
  return fastcl::admits(term, pair.self_pair, pair.target, pair.label, pair.id, pair.above);
}

inline bool hits(const int64_t* target, int64_t from, int64_t to) { return target != nullptr && target[from] == to; }

inline PairOutcomes test_pair(const Sweep& sweep, int64_t x, int64_t y, float logit) {
  const PairTests& tests = sweep.tests;
  const Tags& of_x = sweep.x_tags;
  const Tags& of_y = sweep.y_tags;
  const bool x_hits = hits(tests.x_target, x, y + tests.y0);
  const bool y_hits = hits(tests.y_target, y, x + tests.x0);
  const bool self_pair = tests.uses_self && x + tests.x0 == y + tests.y0;
  const bool label = of_x.label != nullptr &&
                     static_cast<uint32_t>(of_y.label[y] - of_x.nearest[x]) <= static_cast<uint32_t>(of_x.reach[x]);
  const bool id = of_x.id != nullptr && of_x.id[x] == of_y.id[y];
  const bool x_above = of_x.threshold != nullptr && logit > of_x.threshold[x];
  const bool y_above = of_y.threshold != nullptr && logit > of_y.threshold[y];
  const bool any_hits = x_hits || y_hits;
  return {{self_pair, tests.mirrored ? x_hits : any_hits, label, id, x_above},
          {self_pair, tests.mirrored ? y_hits : any_hits, label, id, y_above}};
}

inline int64_t row_of(const Sweep& sweep, int64_t row) { return sweep.x_index != nullptr ? sweep.x_index[row] : row; }

// Where `global` lies among `count` consecutive numbers from `first`, or -1. Any int64 is allowed as a target.
inline int64_t position(int64_t global, int64_t first, int64_t count) {
  const uint64_t offset = static_cast<uint64_t>(global) - static_cast<uint64_t>(first);
  return offset < static_cast<uint64_t>(count) ? static_cast<int64_t>(offset) : -1;
}

// Where `wanted` lies in a rising list, or -1.
inline int64_t search(const int64_t* list, int64_t count, int64_t wanted) {
  int64_t low = 0;
  for (int64_t high = count; low < high;) {
    const int64_t middle = low + (high - low) / 2;
    if (list[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && list[low] == wanted ? low : -1;
}

inline void find_exceptional(const Sweep& sweep, const Tile& tile, ExceptionalPairs& found) {
  const PairTests& tests = sweep.tests;
  Exceptional unsorted[3 * kMaxTile];
  int32_t count = 0;
  int32_t strip_count[kMaxStrips] = {};
  const auto add = [&](int64_t row, int64_t column) {
    unsorted[count++] = {static_cast<int32_t>(row), static_cast<int32_t>(column), 0.0f};
    ++strip_count[row / kStrip];
  };
  const auto counts = [&](int64_t row, int64_t column) { return !tile.diagonal || row <= column; };
  const int64_t first_column = tests.y0 + tile.column;
  for (int64_t row = 0; row < tile.rows && (tests.uses_self || tests.x_target != nullptr); ++row) {
    const int64_t x = row_of(sweep, tile.row + row);
    const int64_t self = tests.uses_self ? position(x + tests.x0, first_column, tile.columns) : -1;
    const int64_t target = tests.x_target != nullptr ? position(tests.x_target[x], first_column, tile.columns) : -1;
    if (self >= 0) add(row, self);
    if (target >= 0 && target != self && counts(row, target)) add(row, target);
  }
  for (int64_t column = 0; column < tile.columns && tests.y_target != nullptr; ++column) {
    const int64_t y = tile.column + column;
    int64_t row;
    if (sweep.x_index == nullptr) {
      row = position(tests.y_target[y], tests.x0 + tile.row, tile.rows);
    } else {
      row = search(sweep.x_index + tile.row, tile.rows, position(tests.y_target[y], tests.x0, sweep.x.rows));
    }
    if (row < 0 || !counts(row, column)) continue;
    const int64_t x = row_of(sweep, tile.row + row);
    const bool is_self = tests.uses_self && x + tests.x0 == y + tests.y0;
    if (!is_self && !hits(tests.x_target, x, y + tests.y0)) add(row, column);
  }
  found.strip_end[0] = 0;
  int32_t next[kMaxStrips];
  for (int64_t s = 0; s < kMaxStrips; ++s) {
    next[s] = found.strip_end[s];
    found.strip_end[s + 1] = found.strip_end[s] + strip_count[s];
  }
  for (int32_t i = 0; i < count; ++i) found.pairs[next[unsorted[i].row / kStrip]++] = unsorted[i];
}

// Rows of a matrix as RIGHT of a product, `pitch` words from slice to slice.
struct Slices {
  const float* words;
  int64_t pitch;
};

// The buffers of one thread. W is kept twice for pairs of bfloat16, as each product pairs another dimension.
struct Workspace {
  float* x_buffer;
  float* y_buffer;  // one panel's rows
  float* x_slices_buffer;
  float* y_slices_buffer;
  float* y_panels_buffer;
  float* logits;     // [tile][kTilePitch]
  float* w_rows;     // LEFT of W @ Y
  float* w_columns;  // LEFT of W.T @ X
  float* column_sums;
  float* row_values;     // of each term of a masked sweep: [rows.count][kStrip] vectors
  float* column_values;  // [columns.count][kMaxTile]
  float* masked;         // a strip's dots as one of the terms sees them
  ExceptionalPairs* exceptional;
  // The tile's operands, in these buffers, in place or in copies that all threads share.
  Rows x;
  const float* y_panels;
  Slices x_slices{};
  Slices y_slices{};
};

// Lays the buffers out from `base`, or only counts their bytes where it is null.
template <class Dot>
inline size_t lay_out(const Sweep& sweep, char* base, Workspace& space) {
  const int64_t words = row_words<Dot>(sweep.y.depth);
  size_t used = 0;
  const auto take = [&](int64_t floats) {
    float* p = reinterpret_cast<float*>(base + used);
    used += static_cast<size_t>(round_up(floats * sizeof(float), 64));
    return p;
  };
  const bool paired = Dot::kPairs == 2;
  const int64_t x_tile = smaller(round_up(sweep.x_count, kStrip), sweep.tile);
  const int64_t y_tile = smaller(round_up(sweep.y.rows, kPanel), sweep.tile);
  space.x_buffer = take(x_tile * row_pitch(words));
  space.y_buffer = take(kPanel * row_pitch(words));
  space.x_slices_buffer = take(sweep.x_packed.slices != nullptr ? 0 : slices_size<Dot>(x_tile, sweep.x.depth));
  space.y_slices_buffer = take(sweep.y_packed.slices != nullptr ? 0 : slices_size<Dot>(y_tile, sweep.y.depth));
  space.y_panels_buffer = take(sweep.y_packed.panels != nullptr ? 0 : y_tile * words);
  space.logits = take(x_tile * kTilePitch);
  space.w_rows = paired ? take(x_tile * kTilePitch / 2) : space.logits;
  space.w_columns = paired ? take(x_tile * kTilePitch / 2) : space.logits;
  space.column_sums = take(kMaxTile);
  space.row_values = take(sweep.masked ? sweep.rows.count * kStrip * kLanes : 0);
  space.column_values = take(sweep.masked ? sweep.columns.count * kMaxTile : 0);
  space.masked = take(sweep.masked ? kStrip * kTilePitch : 0);
  space.exceptional = reinterpret_cast<ExceptionalPairs*>(take(sizeof(ExceptionalPairs) / sizeof(float) + 1));
  return used;
}

// The part of a whole matrix' slices from a row on.
template <class Dot>
inline Slices part_of(const Matrix& matrix, const Packed& packed, int64_t first) {
  return {packed.slices + slice_size<Dot>(first), slice_size<Dot>(round_up(matrix.rows, kTileUnit))};
}

template <class Dot>
inline void prepare_columns(const Sweep& sweep, const Tile& tile, bool slices, Workspace& space) {
  if (sweep.y_packed.panels != nullptr) {
    space.y_panels = sweep.y_packed.panels + tile.column * row_words<Dot>(sweep.y.depth);
    if (slices) space.y_slices = part_of<Dot>(sweep.y, sweep.y_packed, tile.column);
    return;
  }
  space.y_panels = space.y_panels_buffer;
  space.y_slices = {space.y_slices_buffer, slice_size<Dot>(round_up(tile.columns, kPanel))};
  pack_columns<Dot>(sweep.y, tile.column, tile.columns, space.y_buffer, space.y_panels_buffer,
                    slices ? space.y_slices_buffer : nullptr, space.y_slices.pitch);
}

template <class Dot>
inline void prepare_tile_rows(const Sweep& sweep, const Tile& tile, bool slices, Workspace& space) {
  space.x = prepare_rows<Dot>(sweep.x, sweep.x_index, tile.row, tile.rows, kStrip, space.x_buffer);
  if (!slices) return;
  if (sweep.x_packed.slices != nullptr) {
    space.x_slices = part_of<Dot>(sweep.x, sweep.x_packed, tile.row);
    return;
  }
  const int64_t padded = round_up(tile.rows, kStrip);
  space.x_slices = {space.x_slices_buffer, slice_size<Dot>(padded)};
  pack_slices<Dot>(space.x, padded, sweep.x.depth, space.x_slices.pitch, space.x_slices_buffer);
}

// What the exponential needs to know of the scale. An excluded pair's dot must become a logit of -inf, so a scale of
// zero is replaced by one that is too small to matter.
struct Scale {
  explicit Scale(float scale) : logit(scale == 0.0f ? FLT_MIN : scale), excluded(scale < 0.0f ? INFINITY : -INFINITY) {}
  float logit;
  float excluded;
};

// A strip of a tile: kStrip rows of dots <x, y>, kTilePitch apart, from the first column on that counts.
struct Strip {
  int64_t row;     // within the tile
  int64_t height;  // rows that are not padding
  int64_t column;  // first column: 0, or further right on the diagonal
  int64_t vectors;
  float* dots;
};

// Takes exceptional pairs, padding and what lies below the diagonal out of a strip.
inline void exclude(const Tile& tile, const Strip& strip, float excluded, ExceptionalPairs& exceptional) {
  const int64_t s = strip.row / kStrip;
  for (int32_t i = exceptional.strip_end[s]; i < exceptional.strip_end[s + 1]; ++i) {
    Exceptional& pair = exceptional.pairs[i];
    float& dot = strip.dots[(pair.row - strip.row) * kTilePitch + pair.column - strip.column];
    pair.dot = dot;
    dot = excluded;
  }
  const int64_t width = strip.vectors * kLanes;
  for (int64_t r = 0; r < kStrip; ++r) {
    float* dots = strip.dots + r * kTilePitch;
    const int64_t end = r < strip.height ? tile.columns - strip.column : 0;
    for (int64_t c = end; c < width; ++c) dots[c] = excluded;
    const int64_t below = tile.diagonal ? smaller(strip.row + r - strip.column, width) : 0;
    for (int64_t c = 0; c < below; ++c) dots[c] = excluded;
  }
}

// Calls visit(strip) for each strip of the tile, once its dots are complete and only pairs are left that all dense
// terms admit. Dots stay for the whole tile if `keep`.
template <class Dot, class Visit>
inline void for_each_strip(const Sweep& sweep, const Tile& tile, const Workspace& space, bool keep, Visit&& visit) {
  find_exceptional(sweep, tile, *space.exceptional);
  const float excluded = Scale(sweep.scale).excluded;
  const int64_t words = row_words<Dot>(sweep.x.depth);
  for (int64_t begin = 0; begin < words; begin += kDepthCut) {
    const int64_t cut = smaller(words - begin, kDepthCut);
    const bool last = begin + cut == words;
    const bool whole_tile = keep || cut < words;
    for (int64_t row = 0; row < tile.rows; row += kStrip) {
      Strip strip{row, smaller(tile.rows - row, kStrip), tile.diagonal ? row / kPanel * kPanel : 0, 0, nullptr};
      strip.vectors = (tile.columns - strip.column + kLanes - 1) / kLanes;
      strip.dots = space.logits + (whole_tile ? row * kTilePitch : 0) + strip.column;
      const float* left = space.x.words + row * space.x.pitch + begin;
      for (int64_t v = 0; v < strip.vectors; v += 2) {
        // The next strip is fetched meanwhile, a row with each panel.
        if (v / 2 < kStrip && row + kStrip < tile.rows) {
          const float* ahead = left + (kStrip + v / 2) * space.x.pitch;
          for (int64_t k = 0; k < cut; k += 16) __builtin_prefetch(ahead + k);
        }
        const float* right = space.y_panels + (strip.column + v * kLanes) * words + begin * kPanel;
        if (v + 1 < strip.vectors) {
          multiply_strip<Dot, Layout::kRowMajor, 2>(left, space.x.pitch, right, kPanel, cut, begin > 0,
                                                    strip.dots + v * kLanes, kTilePitch);
        } else {
          multiply_strip<Dot, Layout::kRowMajor, 1>(left, space.x.pitch, right, kPanel, cut, begin > 0,
                                                    strip.dots + v * kLanes, kTilePitch);
        }
      }
      if (!last) continue;
      exclude(tile, strip, excluded, *space.exceptional);
      visit(strip);
    }
  }
}

// Calls visit(tile) for each tile of the task; pack(tile) before the first of each column of tiles.
template <class Pack, class Visit>
inline void for_each_tile(const Sweep& sweep, const Task& task, Pack&& pack, Visit&& visit) {
  for (int64_t cb = task.columns.begin; cb < task.columns.end; cb += task.columns.step) {
    const int64_t column_end = smaller((cb + 1) * sweep.column_block, sweep.y.rows);
    for (int64_t column = cb * sweep.column_block; column < column_end; column += sweep.tile) {
      Tile tile{0, 0, column, smaller(column_end - column, sweep.tile), false};
      pack(tile);
      for (int64_t rb = task.rows.begin; rb < task.rows.end; rb += task.rows.step) {
        const int64_t row_end = smaller((rb + 1) * sweep.row_block, sweep.x_count);
        for (int64_t row = rb * sweep.row_block; row < row_end; row += sweep.tile) {
          if (sweep.symmetric && row > column) break;
          tile.row = row;
          tile.rows = smaller(row_end - row, sweep.tile);
          tile.diagonal = sweep.symmetric && row == column;
          visit(tile);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastcl::cpu
