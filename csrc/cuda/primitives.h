// The instructions that the kernels are made of, sm_80 and later. The tests put an emulation in their place
// (tests/cpp/cuda_emulation.h), which is why no kernel names a thread or an instruction in any other way.
#pragma once

#include "platform.h"

#if !defined(__CUDACC__)
#include "cuda_emulation.h"
#else

namespace fastcl::cuda {

FASTCL_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same, which the compiler has to read anew instead of keeping what follows from it.
FASTCL_DEVICE int thread_index_anew() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
FASTCL_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }

FASTCL_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

FASTCL_DEVICE void sync_threads() { __syncthreads(); }
FASTCL_DEVICE bool any_thread(bool predicate) { return __syncthreads_or(predicate) != 0; }
FASTCL_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

FASTCL_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes, of which those beyond `bytes` are zeroed and not read.
FASTCL_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
FASTCL_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kPending` of the committed groups are under way.
template <int kPending>
FASTCL_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lane l points at row l % 8 of matrix l / 8, and gets 4 bytes of row l / 4 of
// each.
FASTCL_DEVICE void load_matrices(uint32_t (&x)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The same of the matrices transposed, in elements of 2 bytes.
FASTCL_DEVICE void load_matrices_transposed(uint32_t (&x)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(shared))
               : "memory");
}

// c += a * b for 16 x 8 products, b by columns.
#define FASTCL_MULTIPLY(name, shape, type)                                                 \
  FASTCL_DEVICE void name(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                   \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));      \
  }
FASTCL_MULTIPLY(multiply_bfloat16, "m16n8k16", "bf16")
FASTCL_MULTIPLY(multiply_float16, "m16n8k16", "f16")
FASTCL_MULTIPLY(multiply_tf32, "m16n8k8", "tf32")
#undef FASTCL_MULTIPLY

FASTCL_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
FASTCL_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
FASTCL_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

FASTCL_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
FASTCL_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }

// A product on its own, never part of a fused multiply-add.
FASTCL_DEVICE float multiply_rounded(float x, float y) { return __fmul_rn(x, y); }

// 2^x, with results below the normal numbers flushed to 0.
FASTCL_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / sqrt(x), to 2 ulp.
FASTCL_DEVICE float inverse_square_root(float x) { return rsqrtf(x); }

struct alignas(16) Chunk {
  uint32_t words[4];
};

}  // namespace fastcl::cuda

#endif
