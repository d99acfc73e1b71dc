// What the engine's drivers ask of the code that is compiled once for each instruction-set level.
//
// Only plain structs and function pointers: code of the standard library that is compiled for one level must not be
// linked into another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

namespace fastcl::cpu {

// Most rows and columns of a tile of S, and what their number is a multiple of: every level's strip (12 or 6 rows) and
// panel (32, 16 or 8 columns).
constexpr int64_t kMaxTile = 384;
constexpr int64_t kTileUnit = 96;
// What the rows of a panel (see RowPanels) are a multiple of: every level's strip.
constexpr int64_t kPanelUnit = 12;

// Which of the two special relations a pair (x, y) has, x and y being row numbers of the two operands.
struct PairTests {
  bool uses_self;
  bool mirrored;            // column terms test y's target instead of x's (symmetric plans)
  int64_t x0;               // global index of row 0 of x
  int64_t y0;               //
  const int64_t* x_target;  // null where no term tests it
  const int64_t* y_target;
};

// The terms along one axis, and what they need of the pairs that are not exceptional.
struct AxisTerms {
  const PairTerm* terms;
  int count;
  bool dense_sum;
  bool dense_max;
};

// The most dense log-sum-exp terms along one axis, and the most dense sums.
constexpr int kMaxDense = 4;
constexpr int kMaxSlopes = 2 * kMaxDense;

// Copies of a whole matrix that all tasks of a sweep share, in the layouts of pack.h; null where each task packs the
// tiles it works on.
struct Packed {
  const float* panels;
  const float* slices;
};

// Floats in the copies of a matrix, and in the scratch that making them takes.
struct PackedSizes {
  int64_t panels;
  int64_t slices;
  int64_t scratch;
};

// A sweep over the tiles of S = scale * X @ Y.T.
struct Sweep {
  Matrix x;
  Matrix y;
  const int64_t* x_index;  // sweep only these x_count rows of x; null for all
  int64_t x_count;
  Packed x_packed;
  Packed y_packed;
  bool symmetric;
  int64_t tile;       // rows and columns of a tile
  int64_t row_block;  // rows of a block of tiles, a multiple of tile
  int64_t column_block;
  float scale;
  float shift;
  PairTests tests;
  Tags x_tags;
  Tags y_tags;
  bool masked;  // the dense terms are apart from each other in more than exceptional pairs (see masks.h)
  AxisTerms rows;
  AxisTerms columns;
};

struct BlockRange {
  int64_t begin;
  int64_t end;
  int64_t step;
};

// Blocks of S that one thread computes, and the accumulators it alone may write meanwhile.
struct Task {
  BlockRange rows;
  BlockRange columns;
  int64_t row_lane;
  int64_t column_lane;
};

// Running values along one axis of length `size`, one set for each lane.
struct Accumulators {
  double* values;
  int64_t size;
  int slots;  // 2, or the terms of a masked sweep
  int terms;

  int64_t lane_size() const { return (slots + terms) * size; }
  // Over the pairs that are not exceptional: the sum of exp(S - shift) in slot 0 and the maximum of S in slot 1; each
  // term's own in a masked sweep.
  double* dense(int64_t lane, int slot) const { return values + lane * lane_size() + slot * size; }
  double* dense_sum(int64_t lane) const { return dense(lane, 0); }
  double* dense_max(int64_t lane) const { return dense(lane, 1); }
  // The value of a term over the exceptional pairs it admits.
  double* exceptional(int64_t lane, int term) const { return dense(lane, slots + term); }
};

// What a dense log-sum-exp term, or a sum, contributes to W along one axis.
struct DenseSlope {
  int term;
  const float* gradient;  // g
  const float* ratio;     // exp(shift - L), 0 for an empty row
  const float* value;     // L, +inf for an empty row
};

// A product that tasks accumulate into, and the same for lanes 1, 2, ...
struct LaneProduct {
  float* product;  // null where not wanted
  float* lanes;
  int64_t size;

  bool wanted() const { return product != nullptr; }
  float* of(int64_t lane) const { return lane == 0 ? product : lanes + (lane - 1) * size; }
};

// One axis of the gradient: W's factors along it, and the product that is accumulated along it.
struct AxisGradient {
  const DenseSlope* dense;
  int dense_count;
  const float* values;     // [terms, size] statistics
  const float* incoming;   // [terms, size] gradients with respect to them
  const uint8_t* flagged;  // [size]
  int64_t size;
  LaneProduct product;  // [size, depth]
};

// Value and gradient in one sweep, for losses that look along rows only: a panel of rows is complete, and its
// gradient's weights known, while exp(S - shift) of the whole panel is still there.
struct RowPanels {
  int64_t count;  // panels, as even as can be and of sweep.row_block rows at most
  CrossEntropy head;
  float* statistics;  // [terms, x.rows]
  double* losses;     // [x.rows]
  float* a;           // W @ Y [x.rows, depth], null where not wanted
  float* b;           // W.T @ X [y.rows, depth], null where not wanted
  float* positive;    // gradient with respect to head.positive, null where there is none
  float flag_below;
  bool trust_empty;  // a sum of 0 says that there was nothing to add, and not that it underflowed
};

// Every pair as a yes-or-no question, and what one sweep makes of it (see Questions). W is the slope of a pair's cost
// times incoming[row]. Sums have a set for each lane.
struct SigmoidPairs {
  const float* shifts;    // [y.rows]
  const float* factors;   // [x.rows]
  const float* incoming;  // [x.rows], null where no gradient is wanted
  double* costs;          // [lanes, x.rows], null where not wanted
  double* row_sums;       // [lanes, x.rows], of W
  double* column_sums;    // [lanes, y.rows], of W; null where not wanted
  LaneProduct a;
  LaneProduct b;
};

// A function of every pair, and what one sweep makes of it (see PairOperands and pairs.h). Values and sums have a set
// for each lane.
struct PairJob {
  PairOperands operands;
  PairShape shape;
  const Sweep* guide;   // over the same tiles, or null
  double* values;       // [lanes, outputs, x.rows]
  double* row_sums;     // [lanes, slopes, x.rows], of W; null where not wanted
  double* column_sums;  // [lanes, slopes, y.rows], of W; null where not wanted
  LaneProduct a;
  LaneProduct b;
};

// All triplets of each row as the anchor (see Triplets), from panels of sweep.row_block whole rows.
struct TripletJob {
  Triplets triplets;
  float* values;        // [2, x.rows], the hinges and how many are active
  float* row_sums;      // [x.rows], of W; null where no gradient is wanted
  double* column_sums;  // [y.rows], of W; null where no gradient is wanted
  float* a;             // W @ Y [x.rows, depth], null where not wanted
  float* b;             // W.T @ X [y.rows, depth], null where not wanted
};

struct Level {
  const char* name;
  PackedSizes (*packed_sizes)(const Matrix&);
  // kTileUnit rows of a matrix, from `first` on, to their places in its copies, null where not wanted.
  void (*pack)(const Matrix&, int64_t first, float* panels, float* slices, float* scratch);
  size_t (*workspace_bytes)(const Sweep&);
  void (*statistics)(const Sweep&, const Accumulators& rows, const Accumulators& columns, const Task&, void* workspace);
  // The log-sum-exp of the dense pairs of the rows in x_index, with a running maximum in place of the shift; in a
  // masked sweep, of those that a term admits.
  void (*running)(const Sweep&, const PairTerm&, const Task&, double* values, void* workspace);
  void (*gradient)(const Sweep&, const AxisGradient& rows, const AxisGradient& columns, const Task&, void* workspace);
  size_t (*panel_bytes)(const Sweep&, const RowPanels&);
  // Statistics, losses and W @ Y of a panel. Its workspace then says what the panel adds to W.T @ X.
  void (*panel)(const Sweep&, const RowPanels&, int64_t panel, void* workspace);
  // Adds that for one tile of columns.
  void (*panel_columns)(const Sweep&, const RowPanels&, int64_t panel, int64_t column, void* workspace);
  void (*sigmoid)(const Sweep&, const SigmoidPairs&, const Task&, void* workspace);
  void (*pairs)(const Sweep&, const PairJob&, const Task&, void* workspace);
  size_t (*triplet_bytes)(const Sweep&);
  // Values and W @ Y of a panel. Its workspace then holds the panel's W.
  void (*triplets)(const Sweep&, const TripletJob&, int64_t panel, void* workspace);
  // What that adds to the sums and the product along one tile of columns.
  void (*triplet_columns)(const Sweep&, const TripletJob&, int64_t panel, int64_t column, void* workspace);
  void (*normalize)(const Matrix&, int64_t begin, int64_t end, void* unit, int64_t pitch, float* inverse,
                    float* scratch);
  void (*finish)(const Matrix&, const float* inverse, float factor, int64_t begin, int64_t end, float* product,
                 double* inner, float* scratch);
  // `rounds` rounds of nothing but multiply-adds; returns their floating-point operations.
  int64_t (*multiply_adds)(Dtype, int64_t rounds);
};

const Level& selected();

}  // namespace fastcl::cpu
