// What passes between the decode op on a GPU (torch side) and the instantiation units of its kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "attention_decode/split_launch.h"
#include "core/cuda/ptx.cuh"

namespace effkern::attention_decode {

// The kernels of one dtype and head dim.
struct SplitKernels {
  const void* split;  // __global__ functions of one argument, SplitParams
  const void* merge;
  int64_t (*plan_grid)(SplitParams& p, int64_t units, int64_t multiprocessors, int64_t multiprocessor_bytes);
  unsigned threads, shared_bytes;
};

// Instantiated in sm80_<dtype>.cu. `dim` is one of Features::kDims, `row_blocks` what the function of that name says.
template <class Element>
SplitKernels split_kernels_sm80(int dim, int row_blocks);

extern template SplitKernels split_kernels_sm80<cuda::Bf16>(int dim, int row_blocks);
extern template SplitKernels split_kernels_sm80<cuda::Fp16>(int dim, int row_blocks);

}  // namespace effkern::attention_decode
