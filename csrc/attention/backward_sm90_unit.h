// The launches of the sm_90a backward kernels for one head dimension. Each sm90_backward_*.cu instantiates them once,
// so that units compile side by side; only those files are compiled for sm_90a alone.
#pragma once

#include <limits>

#include "attention/backward_sm90.h"
#include "attention/backward_sm90_keys_kernel.cuh"
#include "attention/backward_sm90_queries_kernel.cuh"
#include "attention/backward_sm90_rows_kernel.cuh"
#include "attention/backward_sm90_sums_kernel.cuh"
#include "core/cuda/check.h"

namespace effkern::attention {

template <class Element>
__global__ void __launch_bounds__(kRowThreads)
    attention_backward_rows_sm90_kernel(const __grid_constant__ BackwardSm90Params p) {
  attention_backward_rows_sm90<Element>(p);
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads)
    attention_backward_sums_sm90_kernel(const __grid_constant__ BackwardSm90Params p) {
  attention_backward_sums_sm90<Element, kHeadDim>(p);
}

template <class Element, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_backward_keys_sm90_kernel(const __grid_constant__ BackwardSm90Params p) {
  extern __shared__ __align__(1024) char shared[];
  attention_backward_keys_sm90<Element, Shape>(p, cuda::shared_address(shared));
}

template <class Element, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_backward_queries_sm90_kernel(const __grid_constant__ BackwardSm90Params p) {
  extern __shared__ __align__(1024) char shared[];
  attention_backward_queries_sm90<Element, Shape>(p, cuda::shared_address(shared));
}

inline void launch_kernel(void (*kernel)(BackwardSm90Params), const BackwardSm90Params& p, int64_t blocks, int threads,
                          int shared_bytes, const BackwardSm90Launch& launch) {
  if (blocks == 0) return;
  EFFKERN_CHECK(blocks <= std::numeric_limits<int>::max(), launch.op, ": too many tiles for one launch (", blocks, ")");
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), launch.op,
              "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, launch.stream>>>(p);
  cuda::check(cudaGetLastError(), launch.op, "the kernel launch");
}

template <class Shape>
void set_maps(BackwardSm90Params& p, const BackwardSm90Launch& launch, int query_rows, int key_rows) {
  constexpr int kColumns = cuda::PanelTile<64, Shape::kHeadDim>::kPanelColumns;
  p.call.q_map = cuda::tensor_map(launch.views.q, query_rows, kColumns, launch.op);
  p.grad_out_map = cuda::tensor_map(launch.views.grad_out, query_rows, kColumns, launch.op);
  p.call.k_map = cuda::tensor_map(launch.views.k, key_rows, kColumns, launch.op);
  p.call.v_map = cuda::tensor_map(launch.views.v, key_rows, kColumns, launch.op);
}

template <class Element, int kHeadDim, class KeyShape>
void launch_with(BackwardSm90Params& p, const BackwardSm90Launch& launch) {
  constexpr int kKeys = choose_backward_sm90(kHeadDim, kHeadDim).keys;
  using QueryShape = BackwardSm90QueryShape<kHeadDim, kKeys>;
  using KeyMemory = BackwardSm90KeyMemory<KeyShape>;
  using QueryMemory = BackwardSm90QueryMemory<QueryShape>;
  int device = 0;
  cuda::check(cudaGetDevice(&device), launch.op, "cudaGetDevice");
  const int multiprocessors = cuda::device_attribute(cudaDevAttrMultiProcessorCount, device, launch.op);
  const int l2_bytes = cuda::device_attribute(cudaDevAttrL2CacheSize, device, launch.op);
  const StoredLists by_query = p.call.lists;

  const int64_t row_tiles = plan_rows_sm90(p, KeyShape::kQueries);
  p.rows = launch.rows;
  p.query_sums = KeyShape::kAddsQueries ? launch.query_sums : nullptr;
  p.query_sums_tile = KeyShape::kAddsQueries ? query_tile_floats(kHeadDim) : 0;
  launch_kernel(attention_backward_rows_sm90_kernel<Element>, p, row_tiles, kRowThreads, 0, launch);

  set_maps<KeyShape>(p, launch, KeyShape::kQueries, 64);
  p.call.lists = launch.by_key;
  launch_kernel(attention_backward_keys_sm90_kernel<Element, KeyShape>, p, plan_keys_sm90(p, KeyShape::kKeys, l2_bytes),
                KeyShape::kThreads, KeyMemory::kBytes + KeyMemory::kAlignment, launch);

  if constexpr (KeyShape::kAddsQueries) {
    launch_kernel(attention_backward_sums_sm90_kernel<Element, kHeadDim>, p, row_tiles, kRowThreads, 0, launch);
  } else {
    set_maps<QueryShape>(p, launch, 64, kKeys);
    p.call.lists = by_query;
    plan_queries_sm90(p, QueryShape::kQueries, multiprocessors, l2_bytes);
    launch_kernel(attention_backward_queries_sm90_kernel<Element, QueryShape>, p, p.call.blocks, QueryShape::kThreads,
                  QueryMemory::kBytes + QueryMemory::kAlignment, launch);
  }
}

template <class Element, int kHeadDim>
void launch_backward_sm90(BackwardSm90Params& p, const BackwardSm90Launch& launch) {
  constexpr int kQueries = choose_backward_sm90(kHeadDim, kHeadDim).queries, kAdding = adding_queries_sm90(kHeadDim);
  if constexpr (kAdding > 0)
    if (launch.query_sums)
      return launch_with<Element, kHeadDim, BackwardSm90KeyShape<kHeadDim, kAdding, true>>(p, launch);
  launch_with<Element, kHeadDim, BackwardSm90KeyShape<kHeadDim, kQueries>>(p, launch);
}

}  // namespace effkern::attention

#define EFFKERN_BACKWARD_SM90(ELEMENT, HEAD_DIM)                                            \
  template void effkern::attention::launch_backward_sm90<effkern::cuda::ELEMENT, HEAD_DIM>( \
      effkern::attention::BackwardSm90Params&, const effkern::attention::BackwardSm90Launch&)
