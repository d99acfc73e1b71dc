// exp2 and logarithms in registers.
#pragma once

#include "vector.h"

namespace fastcl::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

// 2^t to 2 ulp for t in [-126, 127.5); exactly 0 below -126.5 and for -inf; +inf from 127.5 up, or NaN where t is so
// large (2^22) that its fraction is lost; NaN for NaN.
//
// 2^t = 2^n * 2^f with n = round(t). Adding 1.5 * 2^23 + 127 rounds t to an integer and leaves n + 127, the exponent
// field of 2^n, in the low bits. Fields from 255 up become 255, infinity. n = -127 makes the field 0, a factor of zero,
// so that nothing is ever subnormal; below, the last comparison sets the zero, which costs less than a bound on t
// first. The polynomial is the minimax one of degree 5 with 2^0 = 1 (0.77 ulp before rounding).
inline Vector exp2(Vector t) {
  constexpr float kRound = 12582912.0f + 127.0f;
  constexpr int32_t kInfiniteField = 0x4B400000 + 255;  // the bits of 1.5 * 2^23, and the field
  const Vector rounded = t + kRound;
  const Vector f = t - (rounded - kRound);
  Vector p = f * 1.326472725e-3f + 9.671512688e-3f;
  p = p * f + 5.550733744e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  const IntVector bits = (IntVector)rounded;
  const IntVector infinite = IntVector{} + kInfiniteField;
  const IntVector field = bits > infinite ? infinite : bits;
  p *= (Vector)(field << 23);
  return t < -126.5f ? Vector{} : p;
}

// log(1 + e) for e in [0, 1], to 3 ulp; NaN for NaN. The polynomial log(1 + e) / e is the minimax one of degree 8 for
// the relative error (0.5 ulp before its coefficients are rounded).
inline Vector log1p(Vector e) {
  Vector p = e * 5.232694093e-3f - 2.950523980e-2f;
  p = p * e + 7.822595537e-2f;
  p = p * e - 1.366324574e-1f;
  p = p * e + 1.910600662e-1f;
  p = p * e - 2.484298199e-1f;
  p = p * e + 3.331909776e-1f;
  p = p * e - 4.999949336e-1f;
  p = p * e + 9.999999404e-1f;
  return p * e;
}

// log2(x) for x >= 0, with an absolute error of 3e-7 beside 1 ulp; some -127 for 0 and NaN for NaN.
inline Vector log2(Vector x) {
  const IntVector bits = (IntVector)x;
  const Vector exponent = __builtin_convertvector((bits >> 23) - 127, Vector);
  const Vector mantissa = (Vector)((bits & 0x7fffff) | 0x3f800000);
  return x != x ? x : exponent + log1p(mantissa - 1.0f) * kLog2E;
}

}  // namespace
}  // namespace fastcl::cpu
