// What a call of the engine is about, on raw pointers to device memory.
#pragma once

#include <utility>

#include "order.h"
#include "terms.h"

namespace fastcl::cuda {

// Rows in memory; their pitch and the address of the first are multiples of 16 bytes.
struct Vectors {
  const unsigned char* data;
  int64_t pitch;  // bytes from row to row
  int count;
};

struct Operands {
  Vectors a;
  Vectors b;
  int depth_bytes;
};

// The address of a row; an index over the edge repeats the last one instead of needing a mask.
FASTCL_HOST_DEVICE const unsigned char* row_address(const Vectors& x, int row) {
  return x.data + static_cast<int64_t>(smaller(row, x.count - 1)) * x.pitch;
}

// What masks test about the rows of an operand, one number for each; null where none looks at it. Labels and ids in
// two's complement.
struct Tags {
  const uint64_t* labels;
  const uint64_t* ids;
  const float* threshold;  // of logits, for terms along this side
};

// S = scale * A @ B.T, and what exponentials and masks need to know of it.
struct Similarity {
  Operands operands;
  Shape shape;
  const float* scale;     // on the device, as is
  const float* shift;     // c in exp(S - c)
  const int32_t* target;  // the column of each row's target, -1 outside of S; null where no mask looks at it
  Tags row_tags;
  Tags column_tags;  // of a symmetric plan the same
  uint64_t label_width;
};

// What the terms along one axis came to, and the loss's gradients with respect to that, both [terms, count].
struct Statistics {
  const float* values;
  const float* incoming;
};

struct WeightsArguments {
  static constexpr bool exchanged = false;

  Similarity s;
  Plan plan;
  Statistics rows;
  Statistics columns;
  float flag_below;
  const float* multiplier;  // of W, on the device; null for 1
  Panel panel;
  unsigned char* out;  // whole tiles, so that no store needs a mask
  int64_t out_pitch;   // bytes from row to row, a multiple of 16
};

// W @ B; with operands, terms and statistics exchanged, W.T @ A. The shape, the self pairs and the targets are those of
// S in either case.
struct GradientArguments {
  Similarity s;
  Plan plan;
  Statistics rows;
  Statistics columns;
  float flag_below;
  const float* multiplier;  // of W where it is rounded, on the device; null for 1
  float* out;               // [a.count, depth], contiguous
  bool exchanged = false;
};

inline GradientArguments exchanged(GradientArguments x) {
  std::swap(x.s.operands.a, x.s.operands.b);
  std::swap(x.s.row_tags, x.s.column_tags);
  std::swap(x.plan.rows, x.plan.columns);
  std::swap(x.rows, x.columns);
  x.exchanged = !x.exchanged;
  return x;
}

// Functions of every single pair (pair_functions.h), in the order of fastcl/backends/cuda/panel_functions.py.
enum class PairFunction : int8_t {
  kQuestions,
  kContrastive,
  kPositivePairs,
  kNegatives,
  kNegativesWeights,
  kEnergySoftmax,
  kEnergyUniform,
  kEnergyPower,
  kEnergySoftmaxWeights,
  kEnergyUniformWeights,
  kEnergyPowerWeights,
  kSoftTargets,
  kSoftTargetsWeights,
  kSimilarities,
  kNearest,
  kHardest,
  kSquares,
};
constexpr int kPairFunctions = 17;
constexpr int kMostParams = 2;

// Numbers of rows or columns, one [count] after another; data may be null where there are none.
struct Numbers {
  const float* data;
  int number;
  int count;

  FASTCL_HOST_DEVICE float at(int k, int index, float without = 0.0f) const {
    return k < number ? data[static_cast<int64_t>(k) * count + index] : without;
  }
};

struct PairsArguments {
  PairFunction function;
  float constants[2];
  Operands operands;
  const float* scale;  // S = scale * A @ B.T + bias, both on the device
  const float* bias;
  const int64_t* row0;  // the own key of row i is the column row0 + i; on the device, null for 0
  Numbers row_params;
  Numbers column_params;
  Numbers incoming;  // the gradients of the rows' outputs; none where W isn't wanted
  Numbers found;     // numbers of whole rows, from an earlier sweep
  Tags row_tags;
  Tags column_tags;
  const float* guide;       // the panel's part of a second S, [rows, columns]; may be null
  const float* multiplier;  // of the W that is written, on the device; null for 1
  Panel panel;
  // Null where not wanted. A tile's numbers have the slots of its column or row of tiles in the panel.
  float* sums;  // [numbers, tiles across, rows of the panel]
  int number_of_sums;
  float* row_weights;       // [tiles across, rows], sums of W
  float* column_weights;    // [tiles down, columns of the panel]
  float* column_gradients;  // the same: gradients of the column's parameter, where they are no sums of W
  unsigned char* out;       // W, whole tiles
  int64_t out_pitch;
};

}  // namespace fastcl::cuda
