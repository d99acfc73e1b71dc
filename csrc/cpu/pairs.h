// The functions of every pair that the engine knows, and what each of them is given and makes.
#pragma once

#include <cmath>
#include <cstdint>

#include "../pair_terms.h"

namespace fastcl::cpu {

// In the order of fastcl/backends/cpu/panel_functions.py.
enum class PairFunction : int8_t {
  kContrastive,
  kNegatives,
  kNegativesSlope,
  kLifted,
  kHardest,
  kSimilarities,
  kNearest,
  kImportance,
  kEnergy,
  kPowerImportance,
  kPowerEnergy,
  kCandidates,
  kSoftTargets,
  kSquares,
};
constexpr int kPairFunctions = 14;

// What becomes of an output along a row. The largest one's column, the first where several are, is the next output.
enum class Along : int8_t { kSum, kMax, kLogSumExp, kFirstMax, kColumn };

constexpr int kMostOutputs = 4;
constexpr int kMostGiven = 2;

struct PairShape {
  int row_given;     // parameters of rows and of columns, beyond squared norms
  int column_given;  //
  int incoming;      // outputs that have a gradient are among the first so many
  int slopes;        // 1 for S, 2 with the first parameter of rows and columns
  int outputs;
  Along along[kMostOutputs];
};

static constexpr PairShape shape_of(PairFunction function) {
  constexpr Along sum = Along::kSum;
  constexpr Along max = Along::kMax;
  switch (function) {
    case PairFunction::kContrastive:
      return {0, 0, 3, 1, 4, {sum, sum, sum, sum}};
    case PairFunction::kNegativesSlope:
      return {1, 0, 1, 1, 0, {}};
    case PairFunction::kLifted:
      return {1, 1, 1, 2, 2, {sum, sum}};
    case PairFunction::kHardest:
      return {0, 0, 0, 0, 4, {Along::kFirstMax, Along::kColumn, Along::kFirstMax, Along::kColumn}};
    case PairFunction::kSimilarities:
      return {0, 0, 0, 0, 4, {max, max, sum, sum}};
    case PairFunction::kNearest:
      return {0, 0, 0, 0, 2, {sum, max}};
    case PairFunction::kEnergy:
    case PairFunction::kPowerEnergy:
    case PairFunction::kSoftTargets:
      return {2, 0, 1, 1, 1, {sum}};
    case PairFunction::kSquares:
      return {0, 0, 1, 1, 1, {sum}};
    case PairFunction::kNegatives:
    case PairFunction::kImportance:
    case PairFunction::kPowerImportance:
    case PairFunction::kCandidates:
      break;
  }
  return {0, 0, 0, 0, 1, {Along::kLogSumExp}};
}

// Merges the values of other pairs of a row into those that it has, `stride` and `other_stride` between outputs.
static inline void absorb(const PairShape& shape, double* values, int64_t stride, const double* others,
                          int64_t other_stride) {
  for (int k = 0; k < shape.outputs; ++k, values += stride, others += other_stride) {
    switch (shape.along[k]) {
      case Along::kSum:
        *values = absorb(Reduce::kSum, *values, *others);
        break;
      case Along::kMax:
        *values = absorb(Reduce::kMax, *values, *others);
        break;
      case Along::kLogSumExp:
        *values = absorb(Reduce::kLogSumExp, *values, *others);
        break;
      case Along::kFirstMax:
        if (*others > *values || (*others == *values && others[other_stride] < values[stride])) {
          *values = *others;
          values[stride] = others[other_stride];
        }
        break;
      case Along::kColumn:
        break;
    }
  }
}

// Of an output that no pair has been added to.
static inline double empty_value(Along along) {
  return along == Along::kSum ? 0.0 : along == Along::kColumn ? -1.0 : -INFINITY;
}

}  // namespace fastcl::cpu
