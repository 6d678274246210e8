// Attention forward on NVIDIA GPUs from compute capability 8.0 on, as the op `attention_cuda_sm80`. The device code is
// in forward_sm80_kernel.cuh; which kernel serves a call is decided in effkern/ops/_attention_cuda.py.
//
// Status: unverified on hardware. The op runs when it is asked for by name; automatic dispatch does not choose it.
#include <torch/csrc/stable/library.h>

#include "attention/cuda_arguments.h"
#include "attention/forward_sm80_kernel.cuh"
#include "core/trace.h"

namespace effkern::attention {

template <class Element, int kHeadDim, int kValueDim>
__global__ void __launch_bounds__(ForwardShape<kHeadDim, kValueDim>::kThreads)
    attention_forward_sm80_kernel(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(128) char shared[];
  attention_forward_sm80<Element, kHeadDim, kValueDim>(p, cuda::shared_address(shared));
}

namespace {

constexpr const char* kOp = "attention_cuda_sm80";

template <class Element, int kHeadDim, int kValueDim>
void launch(ForwardParams& p, int device, cudaStream_t stream) {
  using Shape = ForwardShape<kHeadDim, kValueDim>;
  const int64_t blocks = plan_grid(p, Shape::kQueries, cuda::device_attribute(cudaDevAttrL2CacheSize, device, kOp));
  EFFKERN_CHECK(blocks <= std::numeric_limits<int>::max(), kOp, ": too many query tiles for one launch (", blocks, ")");
  const auto kernel = attention_forward_sm80_kernel<Element, kHeadDim, kValueDim>;
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes), kOp,
              "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, stream>>>(p);
  cuda::check(cudaGetLastError(), kOp, "the kernel launch");
}

// Head dimensions up to 64 and up to 128 have a kernel each; what is missing is read as zeros.
template <class Element>
void launch_for(ForwardParams& p, int device, cudaStream_t stream) {
  const bool wide = p.head_dim > 64, wide_value = p.value_dim > 64;
  if (wide && wide_value) return launch<Element, 128, 128>(p, device, stream);
  if (wide) return launch<Element, 128, 64>(p, device, stream);
  if (wide_value) return launch<Element, 64, 128>(p, device, stream);
  launch<Element, 64, 64>(p, device, stream);
}

std::tuple<Tensor, Tensor> attention_cuda_sm80(const Tensor& q, const Tensor& k, const Tensor& v,
                                               std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                               std::optional<double> scale, bool causal, bool top_left) {
  CudaCall call(kOp, 128, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left);
  const int major = cuda::device_attribute(cudaDevAttrComputeCapabilityMajor, call.device, kOp);
  EFFKERN_CHECK(major >= 8, kOp, ": needs a GPU of compute capability 8.0 or newer, this one has ", major, ".x");
  call.make_results();
  trace_record("attention:cuda/sm80");
  if (call.empty()) return call.results();
  const cudaStream_t stream = cuda::current_stream(call.device, kOp);
  if (call.bf16)
    launch_for<cuda::Bf16>(call.params, call.device, stream);
  else
    launch_for<cuda::Fp16>(call.params, call.device, stream);
  return call.results();
}

}  // namespace
}  // namespace effkern::attention

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, m) {
  m.impl("attention_cuda_sm80", TORCH_BOX(&effkern::attention::attention_cuda_sm80));
}
