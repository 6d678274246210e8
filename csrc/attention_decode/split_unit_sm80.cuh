// The kernels as a unit instantiates them.
#pragma once

#include "attention_decode/merge_kernel.cuh"
#include "attention_decode/split_kernels.h"
#include "attention_decode/split_sm80_kernel.cuh"

namespace effkern::attention_decode {

template <class Element, int kDim, int kRowBlocks>
__global__ void __launch_bounds__(SplitShape<kDim, kRowBlocks>::kThreads)
    attention_decode_split_sm80_kernel(const __grid_constant__ SplitParams p) {
  extern __shared__ __align__(128) char shared[];
  attention_decode_split_sm80<Element, kDim, kRowBlocks>(p, cuda::shared_address(shared));
}

template <class Element>
__global__ void __launch_bounds__(MergeShape::kThreads)
    attention_decode_merge_kernel(const __grid_constant__ SplitParams p) {
  extern __shared__ __align__(128) char shared[];
  attention_decode_merge<Element>(p, cuda::shared_address(shared));
}

template <class Element, int kDim, int kRowBlocks>
SplitKernels split_kernels_of() {
  using Shape = SplitShape<kDim, kRowBlocks>;
  return {reinterpret_cast<const void*>(attention_decode_split_sm80_kernel<Element, kDim, kRowBlocks>),
          reinterpret_cast<const void*>(attention_decode_merge_kernel<Element>), plan_grid<Shape>, Shape::kThreads,
          Shape::kSharedBytes};
}

template <class Element>
SplitKernels split_kernels_sm80(int dim, int row_blocks) {
  if (dim == 256) return split_kernels_of<Element, 256, 1>();
  if (dim == 128) return row_blocks == 1 ? split_kernels_of<Element, 128, 1>() : split_kernels_of<Element, 128, 2>();
  if (dim == 96) return row_blocks == 1 ? split_kernels_of<Element, 96, 1>() : split_kernels_of<Element, 96, 2>();
  return row_blocks == 1 ? split_kernels_of<Element, 64, 1>() : split_kernels_of<Element, 64, 2>();
}

}  // namespace effkern::attention_decode
