// Attention forward on Hopper GPUs (compute capability 9.0), as the op `attention_cuda_sm90`: checks and the choice of
// an instance. The device code is in forward_sm90_kernel.cuh; which kernel serves a call is decided in
// effkern/ops/_attention_cuda.py, which also folds masks and makes the tile lists of block-sparse layouts.
//
// Status: unverified on hardware. The op runs when it is asked for by name; automatic dispatch does not choose it.
#include <torch/csrc/stable/library.h>

#include "attention/cuda_arguments.h"
#include "attention/forward_sm90.h"
#include "core/trace.h"

namespace effkern::attention {
namespace {

constexpr const char* kOp = "attention_cuda_sm90";

template <class Element>
void launch_for(ForwardSm90Params& p, const ForwardSm90Views& views, const ForwardSm90Choice& choice,
                cudaStream_t stream) {
  const auto is = [&](int head_dim, int keys) { return choice.head_dim == head_dim && choice.keys == keys; };
  if (is(64, 128)) return launch_forward_sm90<Element, ForwardSm90Shape<64, 128>>(p, views, kOp, stream);
  if (is(96, 128)) return launch_forward_sm90<Element, ForwardSm90Shape<96, 128>>(p, views, kOp, stream);
  if (is(128, 128)) return launch_forward_sm90<Element, ForwardSm90Shape<128, 128>>(p, views, kOp, stream);
  if (is(128, 176)) return launch_forward_sm90<Element, ForwardSm90Shape<128, 176>>(p, views, kOp, stream);
  launch_forward_sm90<Element, ForwardSm90Shape<256, 80>>(p, views, kOp, stream);
}

cuda::TensorView view_of(const Tensor& t, const void* otherwise, const Strides& strides, bool packed) {
  const int64_t head = packed ? 0 : 1;
  const void* data = t.numel() > 0 ? t.const_data_ptr() : otherwise;
  return {data,
          {t.size(head + 2), t.size(head + 1), t.size(head), packed ? 1 : t.size(0)},
          {1, strides.token, strides.head, strides.batch}};
}

std::tuple<Tensor, Tensor> attention_cuda_sm90(const Tensor& q, const Tensor& k, const Tensor& v,
                                               std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                               std::optional<double> scale, bool top_left, int64_t left, int64_t right,
                                               int64_t sink, int64_t group, std::optional<Tensor> layout, int64_t block,
                                               std::optional<Tensor> entries, std::optional<Tensor> full,
                                               std::optional<Tensor> total) {
  ForwardCall call(kOp, 256, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, false, top_left);
  const Geometry& g = call.geometry;
  const int major = cuda::device_attribute(cudaDevAttrComputeCapabilityMajor, call.device, kOp);
  EFFKERN_CHECK(major == 9, kOp, ": needs a GPU of compute capability 9.0, this one has ", major, ".x");
  EFFKERN_CHECK(layout.has_value() == (entries.has_value() && full.has_value() && total.has_value()), kOp,
                ": layout comes with its tile lists");
  trace_record("attention:cuda/sm90");
  if (call.empty()) return call.result();

  ForwardSm90Params p{};
  p.base = call.params;
  set_window(p, left, right, sink, group);
  const bool windowed = p.window.left != kUnbounded || p.window.right != kUnbounded || p.window.group != 0;
  const ForwardSm90Choice choice = choose_forward_sm90(p.base.head_dim, p.base.value_dim, windowed || layout);
  Tensor layout_bytes;  // alive until the launch
  if (layout) {
    EFFKERN_CHECK(
        !g.packed && layout->scalar_type() == ScalarType::Bool && layout->dim() == 4 && block >= 16 && block % 16 == 0,
        kOp, ": layout must be bool (B or 1, Hq or 1, ., .) of blocks of a multiple of 16, without cu_seqlens");
    layout_bytes = torch::stable::contiguous(*layout);
    const auto stride = [](const Tensor& t, int64_t axis) { return t.size(axis) > 1 ? t.stride(axis) : 0; };
    p.layout = {static_cast<const uint8_t*>(layout_bytes.const_data_ptr()), stride(layout_bytes, 0),
                stride(layout_bytes, 1), layout_bytes.size(3), static_cast<int>(block)};
    const int64_t heads = entries->size(1);
    p.lists = {entries->const_data_ptr<int32_t>(),
               full->const_data_ptr<int32_t>(),
               total->const_data_ptr<int32_t>(),
               entries->size(0) > 1 ? static_cast<int>(heads) : 0,
               heads > 1 ? 1 : 0,
               static_cast<int>(entries->size(3))};
  }
  const void* some = call.q.const_data_ptr();
  const ForwardSm90Views views{
      view_of(call.q, some, p.base.q_strides, g.packed), view_of(call.k, some, p.base.k_strides, g.packed),
      view_of(call.v, some, p.base.v_strides, g.packed), view_of(call.out, some, p.base.out_strides, g.packed)};
  const cudaStream_t stream = cuda::current_stream(call.device, kOp);
  if (call.bf16)
    launch_for<cuda::Bf16>(p, views, choice, stream);
  else
    launch_for<cuda::Fp16>(p, views, choice, stream);
  return call.result();
}

}  // namespace
}  // namespace effkern::attention

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, m) {
  m.impl("attention_cuda_sm90", TORCH_BOX(&effkern::attention::attention_cuda_sm90));
}
