// Makes the descriptions by which the copy engine finds tensors (TensorMap in ptx_sm90.cuh). Host side.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <bit>

#include "core/cuda/check.h"
#include "core/cuda/ptx_sm90.cuh"

namespace effkern::cuda {

// A tensor of 16-bit elements. Axes: column, row, head, batch; strides in elements, that of the columns being 1.
struct TensorView {
  const void* data;
  int64_t sizes[4], strides[4];
};

// The driver's function, found through the runtime: the library does not link the driver, which GPU-less machines lack.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder(const char* op) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found), op,
        "cudaGetDriverEntryPointByVersion");
  EFFKERN_CHECK(found == cudaDriverEntryPointSuccess && function != nullptr, op,
                ": the NVIDIA driver has no cuTensorMapEncodeTiled; sm_90a kernels need a driver of CUDA 12 or newer");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Copies of boxes of `rows` x `columns`, `columns` being the width of a panel (tile/bulk_copy.cuh); elements outside
// the tensor read as zero and are not written.
inline TensorMap tensor_map(const TensorView& view, int rows, int columns, const char* op) {
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  cuuint64_t sizes[4], strides[3];
  for (int axis = 0; axis < 4; ++axis) {
    sizes[axis] = static_cast<cuuint64_t>(view.sizes[axis] > 0 ? view.sizes[axis] : 1);
    // The stride of an axis of one element is never used, but still has to be a valid one.
    if (axis > 0) strides[axis - 1] = sizes[axis] > 1 ? static_cast<cuuint64_t>(view.strides[axis]) * 2 : 16;
  }
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  // An empty tensor is never read, but its map must have an address.
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  void* data = reinterpret_cast<void*>(address ? address : uintptr_t{16});
  CUtensorMap map;
  const CUresult result = tensor_map_encoder(op)(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, data, sizes, strides, box,
                                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                                 columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  EFFKERN_CHECK(result == CUDA_SUCCESS, op, ": cuTensorMapEncodeTiled failed with code ", static_cast<int>(result),
                "; rows must start on multiples of 16 bytes");
  return std::bit_cast<TensorMap>(map);
}

}  // namespace effkern::cuda
