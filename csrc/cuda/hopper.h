// The interface of hopper.cu: a sweep and a panel of weights by the kernels for compute capability 9.0, which take
// bfloat16 and float16. Each returns the first CUDA error, 0 for none.
#pragma once

#include "engine.h"
#include "sweep.h"

namespace fastcl::cuda::hopper {

int sweep(Dtype dtype, const SweepArguments& x, void* stream);
int weights(Dtype dtype, const WeightsArguments& x, void* stream);

}  // namespace fastcl::cuda::hopper
