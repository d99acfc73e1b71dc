// The instructions of sm_90a that the Hopper path is made of, beside those of primitives.h. The tests put an emulation
// in their place (tests/cpp/cuda_hopper_emulation.h).
#pragma once

#include "hopper_tile.h"
#include "primitives.h"

#if !defined(__CUDACC__)
#include "cuda_hopper_emulation.h"
#else

namespace fastcl::cuda::hopper {

// A matrix in memory as TMA knows it; hopper.cu fills one in.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// In shared memory. A phase is over when so many threads have arrived and all bytes announced are there.
struct Barrier {
  uint64_t opaque;
};

FASTCL_DEVICE unsigned char* swizzled_shared_memory() {
  extern __shared__ __align__(1024) unsigned char swizzled[];
  return swizzled;
}

FASTCL_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

FASTCL_DEVICE void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to TMA.
FASTCL_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
FASTCL_DEVICE void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
FASTCL_DEVICE void arrive_and_expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// Until the barrier's phase of this parity is over.
FASTCL_DEVICE void wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

FASTCL_DEVICE void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// A box of the map, from this element of this row on, into shared memory; zeros beyond the matrix.
FASTCL_DEVICE void load_box(void* shared, const TensorMap& map, int element, int row, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(element), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// Before the first product of some, and after registers that it uses have changed.
FASTCL_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTCL_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `kPending` of the committed groups are under way.
template <int kPending>
FASTCL_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from reading an accumulator before this place.
FASTCL_DEVICE void settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }

#define FASTCL_FOUR(c, k) "+f"(c[k]), "+f"(c[k + 1]), "+f"(c[k + 2]), "+f"(c[k + 3])
#define FASTCL_SIXTEEN(c, k) FASTCL_FOUR(c, k), FASTCL_FOUR(c, k + 4), FASTCL_FOUR(c, k + 8), FASTCL_FOUR(c, k + 12)
// c = a * b, or c += a * b, for 64 x 128 products over 32 bytes of depth, both operands by rows in shared memory.
#define FASTCL_MULTIPLY(name, shape, type)                                                                      \
  FASTCL_DEVICE void name(float (&c)[kProductNumbers], uint64_t a, uint64_t b, bool add) {                      \
    asm volatile(                                                                                               \
        "{\n"                                                                                                   \
        ".reg .pred add;\n"                                                                                     \
        "setp.ne.b32 add, %66, 0;\n"                                                                            \
        "wgmma.mma_async.sync.aligned." shape ".f32." type "." type                                             \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21," \
        " %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41,"  \
        " %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61,"  \
        " %62, %63}, %64, %65, add, 1, 1, 0, 0;\n"                                                              \
        "}\n"                                                                                                   \
        : FASTCL_SIXTEEN(c, 0), FASTCL_SIXTEEN(c, 16), FASTCL_SIXTEEN(c, 32), FASTCL_SIXTEEN(c, 48)             \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                          \
  }
FASTCL_MULTIPLY(multiply_bfloat16, "m64n128k16", "bf16")
FASTCL_MULTIPLY(multiply_float16, "m64n128k16", "f16")
#undef FASTCL_MULTIPLY
#undef FASTCL_SIXTEEN
#undef FASTCL_FOUR

// A warpgroup's registers, given back or taken.
template <int kRegisters>
FASTCL_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FASTCL_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barriers by number for some of the block's threads; number 0 is sync_threads'.
FASTCL_DEVICE void sync_some(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
FASTCL_DEVICE void arrive_at_some(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
FASTCL_DEVICE bool any_of_some(int number, int threads, bool predicate) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, any;\n"
      "setp.ne.b32 mine, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, mine;\n"
      "selp.b32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(number), "r"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  return any != 0;
}

}  // namespace fastcl::cuda::hopper

#endif
