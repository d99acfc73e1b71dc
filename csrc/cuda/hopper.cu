// All instantiations of the Hopper path's kernels and their launches. Compiled for sm_90a alone, whose instructions no
// other architecture has.
#include <cuda.h>
#include <cudaTypedefs.h>

#include "hopper.h"
#include "hopper_launch.h"
#include "launcher.h"

namespace fastcl::cuda::hopper {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));

constexpr CUtensorMapDataType type_of(BFloat16) { return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; }
constexpr CUtensorMapDataType type_of(Float16) { return CU_TENSOR_MAP_DATA_TYPE_FLOAT16; }

// Through the runtime, so that nothing here links to the driver's library.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return there ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
}

// Swizzled as hopper_tile.h has it. Keeps an error.
struct Map {
  cudaError_t* error;

  template <class Precision>
  TensorMap operator()(const Boxes& x, Precision precision) const {
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encoder();
    TensorMap map{};
    if (encode == nullptr) {
      *error = cudaErrorNotSupported;
      return map;
    }
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(x.elements), static_cast<cuuint64_t>(x.rows)};
    const cuuint64_t pitch[] = {static_cast<cuuint64_t>(x.pitch)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(x.box_elements), static_cast<cuuint32_t>(x.box_rows)};
    const cuuint32_t steps[] = {1, 1};
    const CUresult result =
        encode(reinterpret_cast<CUtensorMap*>(&map), type_of(precision), 2, const_cast<unsigned char*>(x.data), sizes,
               pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) *error = cudaErrorInvalidValue;
    return map;
  }
};

// As many blocks as the device holds at a time: one on each multiprocessor.
int most_blocks(cudaError_t* error) {
  int device = 0, count = 1;
  *error = cudaGetDevice(&device);
  // Makes the device's context current, which this thread may not have had yet: tensor maps are encoded within one.
  if (*error == cudaSuccess) *error = cudaSetDevice(device);
  if (*error == cudaSuccess) *error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace

int sweep(Dtype dtype, const SweepArguments& x, void* stream) {
  Launcher launch(stream);
  const int blocks = most_blocks(&launch.error);
  for_precision(dtype, [&](auto precision) {
    launch_sweep<decltype(precision)>(x, blocks, Map{&launch.error}, [&](auto... arguments) { launch(arguments...); });
  });
  return launch.error;
}

int weights(Dtype dtype, const WeightsArguments& x, void* stream) {
  Launcher launch(stream);
  const int blocks = most_blocks(&launch.error);
  for_precision(dtype, [&](auto precision) {
    launch_weights<decltype(precision)>(x, blocks, Map{&launch.error},
                                        [&](auto... arguments) { launch(arguments...); });
  });
  return launch.error;
}

}  // namespace fastcl::cuda::hopper
