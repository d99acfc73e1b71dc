// W of a tile as the LEFT of both products, and what they add to the gradient.
#pragma once

#include "tile.h"

namespace fastcl::cpu {
namespace {

#ifdef __AVX512BF16__
// Stores W of the tile's rows `row` and `row + 1`, from `column` on, as the LEFT of both products.
inline void store_pair(Vector even, Vector odd, int64_t row, int64_t column, const Workspace& space) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  // The numbers c and 16 + c for each c.
  const __m512i neighbours =
      _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  uint16_t* rows = reinterpret_cast<uint16_t*>(space.w_rows + row * (kTilePitch / 2)) + column;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + kTilePitch), _mm512_extracti64x4_epi64(both, 1));
  _mm512_storeu_si512(space.w_columns + row / 2 * kTilePitch + column, _mm512_permutexvar_epi16(neighbours, both));
}
#endif

// Stores a strip of W as the LEFT of both products. For floats both are the strip itself.
template <class Dot>
inline void store_weights([[maybe_unused]] const Strip& strip, [[maybe_unused]] const Workspace& space) {
#ifdef __AVX512BF16__
  if constexpr (Dot::kPairs == 2) {
    for (int64_t r = 0; r < kStrip; r += 2) {
      for (int64_t c = 0; c < strip.vectors * kLanes; c += kLanes) {
        const float* weights = strip.dots + r * kTilePitch + c;
        store_pair(load(weights), load(weights + kTilePitch), strip.row + r, strip.column + c, space);
      }
    }
  }
#endif
}

// Adds W @ Y and W.T @ X of a tile whose W is stored, each where it is wanted.
template <class Dot>
inline void add_products(const Tile& tile, const Task& task, int64_t depth, const Workspace& space,
                         const LaneProduct& rows, const LaneProduct& columns) {
  if (rows.wanted()) {
    add_product<Dot, Layout::kRowMajor>(space.w_rows, kTilePitch / Dot::kPairs, space.y_slices.words,
                                        space.y_slices.pitch, tile.columns, tile.diagonal,
                                        rows.of(task.row_lane) + tile.row * depth, tile.rows, depth);
  }
  if (columns.wanted()) {
    add_product<Dot, Layout::kColumnMajor>(space.w_columns, kTilePitch, space.x_slices.words, space.x_slices.pitch,
                                           tile.rows, tile.diagonal, columns.of(task.column_lane) + tile.column * depth,
                                           tile.columns, depth);
  }
}

}  // namespace
}  // namespace fastcl::cpu
