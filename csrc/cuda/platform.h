// What functions are declared with. The headers of this directory compile with nvcc and, for the tests, with a host
// compiler alone.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTCL_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTCL_DEVICE __device__ __forceinline__
#define FASTCL_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
// A parameter that stays in constant memory, also where it is indexed.
#define FASTCL_PARAMETER(type) const __grid_constant__ type
#else
#define FASTCL_HOST_DEVICE inline
#define FASTCL_DEVICE inline
#define FASTCL_KERNEL(threads, blocks_per_sm) inline void
#define FASTCL_PARAMETER(type) const type
#endif

namespace fastcl::cuda {

FASTCL_HOST_DEVICE constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
FASTCL_HOST_DEVICE constexpr int smaller(int x, int y) { return x < y ? x : y; }
FASTCL_HOST_DEVICE constexpr int larger(int x, int y) { return x > y ? x : y; }

}  // namespace fastcl::cuda
