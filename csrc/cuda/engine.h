// The CUDA engine's interface: statistics of S = scale * A @ B.T and panels of its gradient matrix, on raw pointers to
// device memory and a stream. Nothing waits for the device. Nothing here knows Torch; the meaning of a plan is in
// fastcl/terms.py, that of a term in pair_terms.h.
#pragma once

#include "problem.h"

namespace fastcl::cuda {

enum class Dtype : int8_t { kBFloat16, kFloat16, kTf32, kTf32x3 };

// Which kernels: those for any compute capability from 8.0 up, or those for 9.0, which take bfloat16 and float16 and
// are there where they were compiled (hopper.h).
enum class Path : int8_t { kPortable, kHopper };

struct Workspace {
  int64_t row_partials;     // float32 numbers
  int64_t column_partials;  // of a symmetric plan 0
};

FASTCL_HOST_DEVICE Workspace workspace(const Plan& plan, int64_t rows, int64_t columns, int64_t most) {
  const SuperAxis down = super_axis(rows, most);
  const SuperAxis across = super_axis(columns, most);
  return {partial_index(plan.rows.count, 0, 0, across.slots, rows),
          plan.symmetric ? 0 : partial_index(plan.columns.count, 0, 0, down.slots, columns)};
}

struct StatisticsCall {
  Similarity s;
  Plan plan;
  float flag_below;
  float* row_partials;  // as workspace() says
  float* column_partials;
  float* rows;     // [row terms, rows of S]
  float* columns;  // [column terms, columns of S]
};

// Each returns the first launch's CUDA error, 0 for none.
int statistics(Dtype dtype, Path path, const StatisticsCall& call, void* stream);
int weights(Dtype dtype, Path path, const WeightsArguments& call, void* stream);
int pairs(Dtype dtype, const PairsArguments& call, void* stream);  // portable only

// For bfloat16 and float16, rows of at most kMostOwnDepth numbers and plans without tags.
constexpr int kMostOwnDepth = 256;
int gradient(Dtype dtype, const GradientArguments& call, void* stream);

}  // namespace fastcl::cuda
