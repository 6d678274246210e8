// Attention on NVIDIA GPUs, as the op `attention_cuda`: checks, allocation, launch. The device code is in
// forward_sm80_kernel.cuh.
//
// Status: unverified on hardware. The op runs when it is asked for by name; automatic dispatch does not choose it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "attention/checks.h"
#include "attention/forward_sm80_kernel.cuh"
#include "core/cuda/check.h"
#include "core/cuda/stream.h"
#include "core/trace.h"

namespace effkern::attention {

template <class Element, int kHeadDim, int kValueDim>
__global__ void __launch_bounds__(ForwardShape<kHeadDim, kValueDim>::kThreads)
    attention_forward_sm80_kernel(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(128) char shared[];
  attention_forward_sm80<Element, kHeadDim, kValueDim>(p, cuda::shared_address(shared));
}

namespace {

constexpr const char* kOp = "attention_cuda";

// Strides of a (batch, heads, tokens, dim) or packed (heads, tokens, dim) tensor. An axis of one element gets stride 0.
Strides strides_of(const Tensor& t, bool packed) {
  const int64_t head = packed ? 0 : 1;
  const auto stride = [&](int64_t axis) { return t.size(axis) > 1 ? t.stride(axis) : 0; };
  return {packed ? 0 : stride(0), stride(head), stride(head + 1)};
}

const uint16_t* input(const Tensor& t, const char* name, const Strides& strides) {
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  EFFKERN_CHECK(address % 16 == 0 && strides.batch % 8 == 0 && strides.head % 8 == 0 && strides.token % 8 == 0, kOp,
                ": ", name, " must have rows that start on multiples of 16 bytes; pass ", name, ".contiguous()");
  return reinterpret_cast<const uint16_t*>(address);
}

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

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                          std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                          std::optional<double> scale, bool causal, bool top_left) {
  const Geometry g = check_arguments(q_in, k_in, v_in, cu_seqlens_q, cu_seqlens_k, scale);
  const ScalarType dtype = q_in.scalar_type();
  EFFKERN_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp,
                ": kernels exist for bfloat16 and float16, q is ", dtype_name(dtype));
  for (const auto& [name, dim] : {std::pair{"q", g.head_dim}, std::pair{"v", g.value_dim}})
    EFFKERN_CHECK(dim % 8 == 0 && dim <= 128, kOp, ": kernels take head dims that are multiples of 8 up to 128, ", name,
                  " has ", dim);
  EFFKERN_CHECK(g.queries + g.keys < std::numeric_limits<int>::max() && g.batch * g.heads_q < (int64_t{1} << 30), kOp,
                ": sequences and batch x heads must fit 32-bit integers");
  const int device = q_in.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  // Our own copy of the CUDA runtime keeps a current device of its own.
  cuda::check(cudaSetDevice(device), kOp, "cudaSetDevice");
  const int major = cuda::device_attribute(cudaDevAttrComputeCapabilityMajor, device, kOp);
  EFFKERN_CHECK(major >= 8, kOp, ": needs a GPU of compute capability 8.0 or newer, this one has ", major, ".x");

  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const std::vector<int64_t> out_shape = g.output_shape(), lse_shape = g.lse_shape();
  Tensor out = torch::stable::new_empty(q, {out_shape.data(), out_shape.size()});
  Tensor lse = torch::stable::new_empty(q, {lse_shape.data(), lse_shape.size()}, ScalarType::Float);
  trace_record("attention:cuda/sm80");
  if (lse.numel() == 0) return {out, lse};

  ForwardParams p{};
  p.q_strides = strides_of(q, g.packed);
  p.k_strides = strides_of(k, g.packed);
  p.v_strides = strides_of(v, g.packed);
  p.out_strides = {g.heads_q * g.queries * g.value_dim, g.queries * g.value_dim, g.value_dim};
  p.lse_strides = {g.heads_q * g.queries, g.queries, 1};
  p.q = input(q, "q", p.q_strides);
  p.k = input(k, "k", p.k_strides);
  p.v = input(v, "v", p.v_strides);
  p.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.sequences = static_cast<int>(g.batch);
  p.heads = static_cast<int>(g.heads_q);
  p.group = static_cast<int>(g.group());
  p.queries = static_cast<int>(g.queries);
  p.keys = static_cast<int>(g.keys);
  p.head_dim = static_cast<int>(g.head_dim);
  p.value_dim = static_cast<int>(g.value_dim);
  p.causal = causal;
  p.top_left = top_left;
  set_scale(p, g.scale);
  Tensor q_offsets, k_offsets;  // alive until the launch
  if (g.packed) {
    // Offsets stay on the device and are not read here; the kernel keeps to the tensors whatever they hold.
    q_offsets = torch::stable::contiguous(*cu_seqlens_q);
    k_offsets = torch::stable::contiguous(*cu_seqlens_k);
    p.cu_seqlens_q = q_offsets.const_data_ptr<int32_t>();
    p.cu_seqlens_k = k_offsets.const_data_ptr<int32_t>();
    p.sequences = static_cast<int>(q_offsets.numel() - 1);
    EFFKERN_CHECK(p.sequences > 0, kOp, ": cu_seqlens_q must end at the number of tokens ", g.queries,
                  ", got no sequence");
  }
  const cudaStream_t stream = cuda::current_stream(device, kOp);
  if (dtype == ScalarType::BFloat16)
    launch_for<cuda::Bf16>(p, device, stream);
  else
    launch_for<cuda::Fp16>(p, device, stream);
  return {out, lse};
}

}  // namespace
}  // namespace effkern::attention

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, m) {
  m.impl("attention_cuda", TORCH_BOX(&effkern::attention::attention_cuda));
}
