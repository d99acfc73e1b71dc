// Copies of a tile's rows in the layouts that the micro-kernel reads, converted and zero-padded on the way.
//
//   rows    [row][word]                   one row after another: LEFT of S = X @ Y.T
//   panels  [panel][word][column]         transposed, kPanel columns abreast: RIGHT of S
//   slices  [slice][row / kPairs][depth]  kPanel of the depth abreast, neighbouring rows in a word: RIGHT of W @ Y
//
// Rows can often be read where they are. Panels and slices are contiguous where the micro-kernel walks along them.
#pragma once

#include <cstring>

#include "level.h"
#include "microkernel.h"
#include "vector.h"

#if defined(__clang__)
#define FASTCL_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define FASTCL_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, FourIndices{__VA_ARGS__})
#endif

namespace fastcl::cpu {
namespace {

inline float widen_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float widen_float16(uint16_t x) {
  // The exponent is rebased by a multiplication, which also normalises subnormal numbers.
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  bits |= static_cast<uint32_t>(x & 0x8000) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest bfloat16, ties to even.
inline uint16_t narrow_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To the nearest float16, ties to even, for |x| <= 1.
inline uint16_t narrow_float16(float x) {
  const float rebased = x * 0x1p-112f;
  uint32_t bits;
  std::memcpy(&bits, &rebased, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (x != x) return 0x7e00;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

template <class To, class From, class Convert>
inline void copy_row(const void* data, int64_t offset, int64_t stride, int64_t depth, float* words, Convert convert) {
  const From* from = static_cast<const From*>(data) + offset;
  To* to = reinterpret_cast<To*>(words);
  if (stride == 1) {
    for (int64_t d = 0; d < depth; ++d) to[d] = convert(from[d]);
  } else {
    for (int64_t d = 0; d < depth; ++d) to[d] = convert(from[d * stride]);
  }
}

// Words in a row of `depth` numbers.
template <class Dot>
inline int64_t row_words(int64_t depth) {
  return (depth + Dot::kPairs - 1) / Dot::kPairs;
}

// Distance between rows: whole cache lines, an odd number of them, so that a strip's rows fall into different sets.
inline int64_t row_pitch(int64_t words) { return ((words + 15) / 16 | 1) * 16; }

// Rows as the micro-kernel reads them: in a packed copy, or where they are.
struct Rows {
  const float* words;
  int64_t pitch;
};

// Whether whole strips and panels of a matrix can be read in place. A strip of rows that lie a multiple of 4 KB apart
// would share one set of the first-level cache.
template <class Dot>
inline bool readable_in_place(const Matrix& matrix) {
  const bool same_type = matrix.dtype == (Dot::kPairs == 2 ? Dtype::kBFloat16 : Dtype::kFloat32);
  return same_type && matrix.depth_stride == 1 && matrix.depth % Dot::kPairs == 0 &&
         matrix.row_stride % Dot::kPairs == 0 && matrix.row_stride / Dot::kPairs % 1024 != 0;
}

template <class Dot>
inline Rows rows_in_place(const Matrix& matrix, int64_t begin) {
  const int64_t pitch = matrix.row_stride / Dot::kPairs;
  return {static_cast<const float*>(matrix.data) + begin * pitch, pitch};
}

template <class Dot>
inline void pack_rows(const Matrix& matrix, const int64_t* index, int64_t begin, int64_t count, int64_t padded_count,
                      float* words, int64_t pitch) {
  for (int64_t r = 0; r < padded_count; ++r, words += pitch) {
    int64_t filled = 0;
    if (r < count) {
      const int64_t offset = (index != nullptr ? index[begin + r] : begin + r) * matrix.row_stride;
      const int64_t depth = matrix.depth;
      if (Dot::kPairs == 2) {
        copy_row<uint16_t, uint16_t>(matrix.data, offset, matrix.depth_stride, depth, words,
                                     [](uint16_t x) { return x; });
        if (depth % 2 != 0) reinterpret_cast<uint16_t*>(words)[depth] = 0;
      } else if (matrix.dtype == Dtype::kFloat32) {
        copy_row<float, float>(matrix.data, offset, matrix.depth_stride, depth, words, [](float x) { return x; });
      } else if (matrix.dtype == Dtype::kBFloat16) {
        copy_row<float, uint16_t>(matrix.data, offset, matrix.depth_stride, depth, words, widen_bfloat16);
      } else {
        copy_row<float, uint16_t>(matrix.data, offset, matrix.depth_stride, depth, words, widen_float16);
      }
      filled = row_words<Dot>(depth);
    }
    std::memset(words + filled, 0, sizeof(float) * (pitch - filled));
  }
}

// Rows [begin, begin + count) padded to a multiple of `unit`, in place where that is possible.
template <class Dot>
inline Rows prepare_rows(const Matrix& matrix, const int64_t* index, int64_t begin, int64_t count, int64_t unit,
                         float* buffer) {
  if (index == nullptr && count % unit == 0 && readable_in_place<Dot>(matrix)) {
    return rows_in_place<Dot>(matrix, begin);
  }
  const Rows rows{buffer, row_pitch(row_words<Dot>(matrix.depth))};
  pack_rows<Dot>(matrix, index, begin, count, round_up(count, unit), buffer, rows.pitch);
  return rows;
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourIndices __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));

// Four words of each of four rows, transposed to four columns of a panel.
inline void transpose_four(const float* source, int64_t pitch, float* panel) {
  const Four r0 = *reinterpret_cast<const UnalignedFour*>(source);
  const Four r1 = *reinterpret_cast<const UnalignedFour*>(source + pitch);
  const Four r2 = *reinterpret_cast<const UnalignedFour*>(source + 2 * pitch);
  const Four r3 = *reinterpret_cast<const UnalignedFour*>(source + 3 * pitch);
  const Four low01 = FASTCL_SHUFFLE(r0, r1, 0, 4, 1, 5);
  const Four low23 = FASTCL_SHUFFLE(r2, r3, 0, 4, 1, 5);
  const Four high01 = FASTCL_SHUFFLE(r0, r1, 2, 6, 3, 7);
  const Four high23 = FASTCL_SHUFFLE(r2, r3, 2, 6, 3, 7);
  *reinterpret_cast<UnalignedFour*>(panel) = FASTCL_SHUFFLE(low01, low23, 0, 1, 4, 5);
  *reinterpret_cast<UnalignedFour*>(panel + kPanel) = FASTCL_SHUFFLE(low01, low23, 2, 3, 6, 7);
  *reinterpret_cast<UnalignedFour*>(panel + 2 * kPanel) = FASTCL_SHUFFLE(high01, high23, 0, 1, 4, 5);
  *reinterpret_cast<UnalignedFour*>(panel + 3 * kPanel) = FASTCL_SHUFFLE(high01, high23, 2, 3, 6, 7);
}

// `panels` from `rows`. Four rows at a time, in runs of whole cache lines that are fetched two fours ahead: what the
// hardware's prefetching would make of so many rows at once is little, and they often come from beyond the second-level
// cache.
inline void pack_panels(Rows rows, int64_t padded_count, int64_t words, float* panels) {
  constexpr int64_t kRun = 64;
  const int64_t transposed = words / 4 * 4;
  for (int64_t panel = 0; panel < padded_count; panel += kPanel, panels += kPanel * words) {
    const float* source = rows.words + panel * rows.pitch;
    for (int64_t run = 0; run < transposed; run += kRun) {
      const int64_t end = smaller(run + kRun, transposed);
      for (int64_t c = 0; c < kPanel; c += 4) {
        const float* four = source + c * rows.pitch;
        for (int64_t r = 8; r < 12; ++r) {
          for (int64_t k = run; k < end; k += 16) __builtin_prefetch(four + r * rows.pitch + k);
        }
        for (int64_t k = run; k < end; k += 4) transpose_four(four + k, rows.pitch, panels + k * kPanel + c);
      }
    }
    for (int64_t k = transposed; k < words; ++k) {
      for (int64_t c = 0; c < kPanel; ++c) panels[k * kPanel + c] = source[c * rows.pitch + k];
    }
  }
}

// Floats in the slices of so many rows.
template <class Dot>
inline int64_t slices_size(int64_t padded_count, int64_t depth) {
  return padded_count / Dot::kPairs * round_up(depth, kPanel);
}

// Words in a slice of so many rows.
template <class Dot>
inline int64_t slice_size(int64_t padded_count) {
  return padded_count / Dot::kPairs * kPanel;
}

// `slices` from `padded_count` rows, a slice being `slice_words` long.
template <class Dot>
inline void pack_slices(Rows rows, int64_t padded_count, int64_t depth, int64_t slice_words, float* slices) {
  for (int64_t r = 0; r < padded_count; r += Dot::kPairs, slices += kPanel) {
    const float* row = rows.words + r * rows.pitch;
    for (int64_t d = 0; d < depth; d += kPanel) {
      float* out = slices + d / kPanel * slice_words;
      const int64_t width = smaller(depth - d, kPanel);
      if (Dot::kPairs == 1) {
        for (int64_t i = 0; i < width; ++i) out[i] = row[d + i];
      } else {
        const uint16_t* even = reinterpret_cast<const uint16_t*>(row) + d;
        const uint16_t* odd = reinterpret_cast<const uint16_t*>(row + rows.pitch) + d;
        uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
        for (int64_t i = 0; i < width; ++i) pairs[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
      }
      for (int64_t i = width; i < kPanel; ++i) out[i] = 0.0f;
    }
  }
}

// Rows [begin, begin + count) as panels, and as slices where these are wanted. A panel after the other, so that its
// rows are read from afar once; `buffer` is for one panel's rows.
template <class Dot>
inline void pack_columns(const Matrix& matrix, int64_t begin, int64_t count, float* buffer, float* panels,
                         float* slices, int64_t slice_words) {
  const int64_t words = row_words<Dot>(matrix.depth);
  for (int64_t c = 0; c < count; c += kPanel) {
    const Rows rows = prepare_rows<Dot>(matrix, nullptr, begin + c, smaller(count - c, kPanel), kPanel, buffer);
    if (panels != nullptr) pack_panels(rows, kPanel, words, panels + c * words);
    if (slices != nullptr) {
      pack_slices<Dot>(rows, kPanel, matrix.depth, slice_words, slices + slice_size<Dot>(c));
    }
  }
}

}  // namespace
}  // namespace fastcl::cpu
