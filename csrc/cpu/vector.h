// Vectors of one instruction-set level, by the compiler's vector extensions. FASTCL_LANES floats each.
//
// This header and the others of the tile engine have internal linkage throughout: each is compiled once for a level.
#pragma once

#include <cstddef>
#include <cstdint>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace fastcl::cpu {
namespace {

constexpr int kLanes = FASTCL_LANES;
// The micro-kernel holds kStrip x 2 accumulators: 24 of 32 registers, or 12 of 16.
constexpr int kStrip = FASTCL_STRIP;
constexpr int kPanel = 2 * kLanes;

typedef float Vector __attribute__((vector_size(4 * FASTCL_LANES)));
typedef int32_t IntVector __attribute__((vector_size(4 * FASTCL_LANES)));
typedef uint32_t UnsignedVector __attribute__((vector_size(4 * FASTCL_LANES)));
typedef float UnalignedVector __attribute__((vector_size(4 * FASTCL_LANES), aligned(4), may_alias));
typedef int32_t UnalignedIntVector __attribute__((vector_size(4 * FASTCL_LANES), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
inline IntVector load(const int32_t* p) { return *reinterpret_cast<const UnalignedIntVector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<UnalignedVector*>(p) = v; }
inline Vector broadcast(float x) { return x - Vector{}; }

// Which lanes something holds for: a bit for each, or all bits of each.
#ifdef __AVX512F__
typedef uint16_t Lanes;
inline Lanes differ(Vector x, Vector y) { return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NEQ_UQ); }
inline Lanes exceeds(Vector x, Vector y) { return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ); }
inline Lanes equal(IntVector x, IntVector y) { return _mm512_cmpeq_epi32_mask((__m512i)x, (__m512i)y); }
inline Lanes at_most(UnsignedVector x, UnsignedVector y) { return _mm512_cmple_epu32_mask((__m512i)x, (__m512i)y); }
inline Vector select(Lanes lanes, Vector x, Vector y) {
  return (Vector)_mm512_mask_blend_ps(lanes, (__m512)y, (__m512)x);
}
inline Vector only(Lanes lanes, Vector x) { return (Vector)_mm512_maskz_mov_ps(lanes, (__m512)x); }
inline constexpr Lanes kNoLanes = 0;
#else
typedef IntVector Lanes;
inline Lanes differ(Vector x, Vector y) { return x != y; }
inline Lanes exceeds(Vector x, Vector y) { return x > y; }
inline Lanes equal(IntVector x, IntVector y) { return x == y; }
inline Lanes at_most(UnsignedVector x, UnsignedVector y) { return x <= y; }
inline Vector select(Lanes lanes, Vector x, Vector y) { return lanes ? x : y; }
inline Vector only(Lanes lanes, Vector x) { return (Vector)(lanes & (IntVector)x); }
inline constexpr Lanes kNoLanes = {};
#endif

inline Lanes both(Lanes x, Lanes y) { return static_cast<Lanes>(x & y); }
inline Lanes without(Lanes x, Lanes y) { return static_cast<Lanes>(x & ~y); }

// first, first + 1, ...
inline IntVector counting(int32_t first) {
  IntVector result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = first + lane;
  return result;
}

inline Vector square_root(Vector x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}

inline float sum(Vector v) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// The larger of each pair, NaN where either is.
inline Vector larger(Vector x, Vector y) { return ((x > y) | (x != x)) ? x : y; }

inline float largest(Vector v) {
  float result = v[0];
  for (int lane = 1; lane < kLanes; ++lane) result = v[lane] > result || v[lane] != v[lane] ? v[lane] : result;
  return result;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace fastcl::cpu
