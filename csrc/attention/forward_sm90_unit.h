// The launch of one instance of the sm_90a forward kernel. Each sm90_forward_*.cu instantiates it once, so that units
// compile side by side; only those files are compiled for sm_90a alone.
#pragma once

#include <limits>

#include "attention/forward_sm90.h"
#include "attention/forward_sm90_kernel.cuh"
#include "core/cuda/check.h"
#include "core/cuda/tensor_map.h"

namespace effkern::attention {

template <class Element, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ ForwardSm90Params p) {
  extern __shared__ __align__(1024) char shared[];
  attention_forward_sm90<Element, Shape>(p, cuda::shared_address(shared));
}

template <class Element, class Shape>
void launch_forward_sm90(ForwardSm90Params& p, const ForwardSm90Views& views, const char* op, cudaStream_t stream) {
  using Memory = ForwardSm90Memory<Shape>;
  constexpr int kColumns = Memory::KeyTile::kPanelColumns, kBytes = Memory::kBytes + Memory::kAlignment;
  int device = 0;
  cuda::check(cudaGetDevice(&device), op, "cudaGetDevice");
  p.q_map = cuda::tensor_map(views.q, 64, kColumns, op);
  p.k_map = cuda::tensor_map(views.k, Shape::kKeys, kColumns, op);
  p.v_map = cuda::tensor_map(views.v, Shape::kKeys, kColumns, op);
  p.out_map = cuda::tensor_map(views.out, 64, kColumns, op);
  plan_forward_sm90(p, Shape::kQueries, cuda::device_attribute(cudaDevAttrMultiProcessorCount, device, op),
                    cuda::device_attribute(cudaDevAttrL2CacheSize, device, op));
  EFFKERN_CHECK(p.tasks <= std::numeric_limits<int>::max(), op, ": too many query tiles for one launch (", p.tasks,
                ")");
  const auto kernel = attention_forward_sm90_kernel<Element, Shape>;
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), op,
              "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(p.blocks), Shape::kThreads, kBytes, stream>>>(p);
  cuda::check(cudaGetLastError(), op, "the kernel launch");
}

}  // namespace effkern::attention

#define EFFKERN_FORWARD_SM90(ELEMENT, HEAD_DIM, KEYS)                                                          \
  template void effkern::attention::launch_forward_sm90<effkern::cuda::ELEMENT,                                \
                                                        effkern::attention::ForwardSm90Shape<HEAD_DIM, KEYS>>( \
      effkern::attention::ForwardSm90Params&, const effkern::attention::ForwardSm90Views&, const char*, cudaStream_t)
