// The one inner loop of the engine: OUT[kStrip x columns] (+)= LEFT @ RIGHT, used for S, for W @ B and for W.T @ A.
//
// LEFT is broadcast element by element, RIGHT is read in vectors. Both are arrays of 32-bit words: a float each, or a
// pair of bfloat16 that are neighbours along the summed dimension (`kPairs` numbers in a word).
#pragma once

#include <cstring>

#include "vector.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace fastcl::cpu {
namespace {

struct FloatDot {
  static constexpr int kPairs = 1;
  using Word = Vector;
  static Word broadcast_word(const float* p) { return broadcast(*p); }
  static Word load_words(const float* p) { return load(p); }
  static Vector multiply_add(Word x, Word y, Vector sum) { return x * y + sum; }
};

#ifdef __AVX512BF16__
struct BFloat16Dot {
  static constexpr int kPairs = 2;
  using Word = __m512bh;
  static Word broadcast_word(const float* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return (__m512bh)_mm512_set1_epi32(word);
  }
  static Word load_words(const float* p) { return (__m512bh)_mm512_loadu_ps(p); }
  static Vector multiply_add(Word x, Word y, Vector sum) { return (Vector)_mm512_dpbf16_ps((__m512)sum, x, y); }
};
#endif

// Where LEFT[row, k] lies: row-major has its `pitch` between rows, column-major between values of k.
enum class Layout { kRowMajor, kColumnMajor };

}  // namespace

#ifdef FASTCL_COUNT_MULTIPLY_ADDS
void count_multiply_adds(int64_t count);
#endif

namespace {

// Not inlined: the loop gets all registers to itself. OUT, which the end needs, is fetched meanwhile, and so is a
// column-major LEFT some steps ahead, as no hardware follows it from page to page.
template <class Dot, Layout kLayout, int kVectors>
[[gnu::noinline]] void multiply_strip(const float* left, ptrdiff_t left_pitch, const float* right,
                                      ptrdiff_t right_pitch, int64_t depth, bool accumulate, float* out,
                                      ptrdiff_t out_pitch) {
#ifdef FASTCL_COUNT_MULTIPLY_ADDS
  count_multiply_adds(depth * Dot::kPairs * kStrip * kVectors * kLanes);
#endif
  for (int r = 0; r < kStrip; ++r) {
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + r * out_pitch + v * kLanes, 1);
  }
  constexpr int64_t kAhead = 16;
  Vector sums[kStrip][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    if (kLayout == Layout::kColumnMajor) {
      __builtin_prefetch(left + kAhead * left_pitch);
      __builtin_prefetch(left + kAhead * left_pitch + kStrip - 1);
    }
    typename Dot::Word columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) columns[v] = Dot::load_words(right + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      const typename Dot::Word row =
          Dot::broadcast_word(kLayout == Layout::kRowMajor ? left + r * left_pitch : left + r);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Dot::multiply_add(row, columns[v], sums[r][v]);
    }
    right += right_pitch;
    left += kLayout == Layout::kRowMajor ? 1 : left_pitch;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* p = out + r * out_pitch + v * kLanes;
      store(p, accumulate ? load(p) + sums[r][v] : sums[r][v]);
    }
  }
}

// A strip of LEFT meets so many columns of OUT before the next one does.
constexpr int64_t kProductBlock = 256;

// OUT[height, width] += LEFT @ RIGHT for one strip and one panel. OUT, the caller's memory, is not padded, so that its
// ragged edges go through a scratch.
template <class Dot, Layout kLayout>
inline void add_panel(const float* left, ptrdiff_t left_pitch, const float* right, int64_t words, float* out,
                      int64_t out_pitch, int64_t height, int64_t width) {
  alignas(64) float scratch[kStrip * kPanel];
  const bool whole = height == kStrip && (width == kPanel || width == kLanes);
  float* target = whole ? out : scratch;
  const int64_t pitch = whole ? out_pitch : kPanel;
  if (width > kLanes) {
    multiply_strip<Dot, kLayout, 2>(left, left_pitch, right, kPanel, words, whole, target, pitch);
  } else {
    multiply_strip<Dot, kLayout, 1>(left, left_pitch, right, kPanel, words, whole, target, pitch);
  }
  if (whole) return;
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t c = 0; c < width; ++c) out[i * out_pitch + c] += scratch[i * kPanel + c];
  }
}

// OUT[rows, columns] += LEFT[rows, k] @ RIGHT[k, columns] for `count` numbers k. LEFT is padded to whole strips, and
// RIGHT lies in slices of kPanel columns, `right_pitch` words from one to the next. A triangular LEFT is zero below the
// diagonal where it is row-major, and above it where column-major (its transpose).
template <class Dot, Layout kLayout>
inline void add_product(const float* left, ptrdiff_t left_pitch, const float* right, int64_t right_pitch, int64_t count,
                        bool triangular, float* out, int64_t rows, int64_t columns) {
  const int64_t words = (count + Dot::kPairs - 1) / Dot::kPairs;
  // A strip of LEFT stays in the first-level cache, or nearly, while a block of RIGHT streams past from the second.
  for (int64_t block = 0; block < columns; block += kProductBlock) {
    const int64_t block_end = smaller(columns, block + kProductBlock);
    for (int64_t row = 0; row < rows; row += kStrip) {
      const int64_t begin = triangular && kLayout == Layout::kRowMajor ? row / Dot::kPairs : 0;
      const int64_t end =
          triangular && kLayout == Layout::kColumnMajor ? smaller(words, (row + kStrip) / Dot::kPairs) : words;
      const float* strip = kLayout == Layout::kRowMajor ? left + row * left_pitch + begin : left + row;
      for (int64_t column = block; column < block_end; column += kPanel) {
        add_panel<Dot, kLayout>(strip, left_pitch, right + column / kPanel * right_pitch + begin * kPanel, end - begin,
                                out + row * columns + column, columns, smaller(rows - row, kStrip),
                                smaller(columns - column, kPanel));
      }
    }
  }
}

}  // namespace
}  // namespace fastcl::cpu
