// The arithmetic that the engine is measured against: multiply-adds on registers alone, as many independent ones as the
// micro-kernel holds accumulators, so that none waits for another or for memory.
#pragma once

#include "microkernel.h"

namespace fastcl::cpu {
namespace {

// Makes the compiler believe that a register's content changed.
template <class Register>
inline void touch(Register& value) {
#ifdef __aarch64__
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+v"(value));
#endif
}

// Returns the floating-point operations it took, two for each multiply-add.
template <class Dot>
inline int64_t multiply_adds(int64_t rounds) {
  constexpr int kSums = 2 * kStrip;
  const float one = 1.0f;
  const typename Dot::Word x = Dot::broadcast_word(&one);
  typename Dot::Word y = x;
  Vector sums[kSums] = {};
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int s = 0; s < kSums; ++s) {
      // One product for all sums would do otherwise, where the level has no fused multiply-add.
      touch(y);
      sums[s] = Dot::multiply_add(x, y, sums[s]);
    }
  }
#pragma GCC unroll 24
  for (int s = 0; s < kSums; ++s) touch(sums[s]);
  return rounds * kSums * kLanes * Dot::kPairs * 2;
}

}  // namespace
}  // namespace fastcl::cpu
