// The types of operands and how their products are formed: 16 x 8 products over 32 bytes of depth, summed in float32.
#pragma once

#include "primitives.h"

namespace fastcl::cuda {

// kBytes of an element; Fragment, an operand's registers as `prepare` leaves them; store() of one number of W and of
// two side by side; kBlocksPerSm, for which registers must suffice.
struct HalfPrecision {
  static constexpr int kBytes = 2;
  static constexpr int kBlocksPerSm = 2;

  template <int kRegisters>
  struct Fragment {
    uint32_t bits[kRegisters];
    FASTCL_DEVICE void prepare() {}
  };
};

struct BFloat16 : HalfPrecision {
  FASTCL_DEVICE static void multiply(float (&c)[4], const Fragment<4>& a, const Fragment<2>& b) {
    multiply_bfloat16(c, a.bits, b.bits);
  }
  FASTCL_DEVICE static void store(void* at, float x) {
    *static_cast<uint16_t*>(at) = static_cast<uint16_t>(pack_bfloat16(x, 0.0f));
  }
  FASTCL_DEVICE static void store(void* at, float x, float y) { *static_cast<uint32_t*>(at) = pack_bfloat16(x, y); }
};

struct Float16 : HalfPrecision {
  FASTCL_DEVICE static void multiply(float (&c)[4], const Fragment<4>& a, const Fragment<2>& b) {
    multiply_float16(c, a.bits, b.bits);
  }
  FASTCL_DEVICE static void store(void* at, float x) {
    *static_cast<uint16_t*>(at) = static_cast<uint16_t>(pack_float16(x, 0.0f));
  }
  FASTCL_DEVICE static void store(void* at, float x, float y) { *static_cast<uint32_t*>(at) = pack_float16(x, y); }
};

struct SinglePrecision {
  static constexpr int kBytes = 4;
  FASTCL_DEVICE static void store(void* at, float x) { *static_cast<float*>(at) = x; }
  FASTCL_DEVICE static void store(void* at, float x, float y) {
    store(at, x);
    store(static_cast<float*>(at) + 1, y);
  }
};

// float32 rounded to tf32, 11 bits of significand.
struct Tf32 : SinglePrecision {
  static constexpr int kBlocksPerSm = 2;

  template <int kRegisters>
  struct Fragment {
    uint32_t bits[kRegisters];
    FASTCL_DEVICE void prepare() {
#pragma unroll
      for (uint32_t& x : bits) x = round_to_tf32(x);
    }
  };

  FASTCL_DEVICE static void multiply(float (&c)[4], const Fragment<4>& a, const Fragment<2>& b) {
    multiply_tf32(c, a.bits, b.bits);
  }
};

// float32 as the sum of two tf32 numbers: three products, the small ones first, for nearly the accuracy of float32.
struct Tf32x3 : SinglePrecision {
  static constexpr int kBlocksPerSm = 1;

  template <int kRegisters>
  struct Fragment {
    uint32_t bits[kRegisters];
    uint32_t rest[kRegisters];
    FASTCL_DEVICE void prepare() {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        const float x = float_from_bits(bits[r]);
        bits[r] = round_to_tf32(bits[r]);
        rest[r] = round_to_tf32(bits_of_float(x - float_from_bits(bits[r])));
      }
    }
  };

  FASTCL_DEVICE static void multiply(float (&c)[4], const Fragment<4>& a, const Fragment<2>& b) {
    multiply_tf32(c, a.rest, b.bits);
    multiply_tf32(c, a.bits, b.rest);
    multiply_tf32(c, a.bits, b.bits);
  }
};

}  // namespace fastcl::cuda
