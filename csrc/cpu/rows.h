// Rows scaled to unit length, and gradients carried back through that scaling.
//
// As torch.nn.functional.normalize: a norm below kSmallestNorm counts as that number, whatever the row.
#pragma once

#include <cmath>

#include "level.h"
#include "pack.h"

namespace fastcl::cpu {
namespace {

constexpr float kSmallestNorm = 1e-12f;

// A row of any type and stride as floats.
inline void widen_row(const Matrix& matrix, int64_t row, float* words) {
  const int64_t offset = row * matrix.row_stride;
  if (matrix.dtype == Dtype::kFloat32) {
    copy_row<float, float>(matrix.data, offset, matrix.depth_stride, matrix.depth, words, [](float x) { return x; });
  } else if (matrix.dtype == Dtype::kBFloat16) {
    copy_row<float, uint16_t>(matrix.data, offset, matrix.depth_stride, matrix.depth, words, widen_bfloat16);
  } else {
    copy_row<float, uint16_t>(matrix.data, offset, matrix.depth_stride, matrix.depth, words, widen_float16);
  }
}

inline float inner_product(const float* x, const float* y, int64_t depth) {
  Vector sums{};
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) sums += load(x + d) * load(y + d);
  float total = sum(sums);
  for (; d < depth; ++d) total += x[d] * y[d];
  return total;
}

// y += factor * x.
inline void add_scaled(float factor, const float* x, int64_t depth, float* y) {
  for (int64_t d = 0; d < depth; ++d) y[d] += factor * x[d];
}

// 1 / norm of a row; negative where the norm was too small for the row to have a say in it.
inline float inverse_norm(const float* row, int64_t depth) {
  const float norm = std::sqrt(inner_product(row, row, depth));
  return norm < kSmallestNorm ? -1.0f / kSmallestNorm : 1.0f / norm;
}

// Rows [begin, end) scaled to unit length, `pitch` numbers of the matrix' type apart, and what inverse_norm says of
// each.
inline void normalize_rows(const Matrix& matrix, int64_t begin, int64_t end, void* unit, int64_t pitch, float* inverse,
                           float* scratch) {
  const int64_t depth = matrix.depth;
  for (int64_t i = begin; i < end; ++i) {
    widen_row(matrix, i, scratch);
    inverse[i] = inverse_norm(scratch, depth);
    const float factor = std::fabs(inverse[i]);
    if (matrix.dtype == Dtype::kFloat32) {
      float* out = static_cast<float*>(unit) + i * pitch;
      for (int64_t d = 0; d < depth; ++d) out[d] = scratch[d] * factor;
    } else {
      uint16_t* out = static_cast<uint16_t*>(unit) + i * pitch;
      const bool brain = matrix.dtype == Dtype::kBFloat16;
      for (int64_t d = 0; d < depth; ++d) {
        out[d] = brain ? narrow_bfloat16(scratch[d] * factor) : narrow_float16(scratch[d] * factor);
      }
    }
  }
}

// Turns rows [begin, end) of a product P = W @ Y into the gradient with respect to the matrix, in place: factor * P,
// carried back through the scaling to unit length where `inverse` tells of one. `inner` gets <P, row>, the row's share
// in the gradient of the scale.
inline void finish_gradient(const Matrix& matrix, const float* inverse, float factor, int64_t begin, int64_t end,
                            float* product, double* inner, float* scratch) {
  const int64_t depth = matrix.depth;
  for (int64_t i = begin; i < end; ++i) {
    float* p = product + i * depth;
    widen_row(matrix, i, scratch);
    const float dot = inner_product(p, scratch, depth);
    if (inverse == nullptr) {
      inner[i] = dot;
      for (int64_t d = 0; d < depth; ++d) p[d] *= factor;
      continue;
    }
    const float length = std::fabs(inverse[i]);
    inner[i] = static_cast<double>(dot) * length;
    const float radial = inverse[i] > 0.0f ? dot * length * length : 0.0f;
    for (int64_t d = 0; d < depth; ++d) p[d] = (p[d] - radial * scratch[d]) * (factor * length);
  }
}

}  // namespace
}  // namespace fastcl::cpu
