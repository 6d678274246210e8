// Attention forward on Hopper GPUs (compute capability 9.0), as the op `attention_cuda_sm90`: checks and the choice of
// an instance. The device code is in forward_sm90_kernel.cuh; which kernel serves a call is decided in
// effkern/ops/_attention_cuda.py, which also folds masks and makes the tile lists of block-sparse layouts.
//
// Status: unverified on hardware. The op runs when it is asked for by name; automatic dispatch does not choose it.
#include <torch/csrc/stable/library.h>

#include "attention/cuda_sm90_arguments.h"
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

std::tuple<Tensor, Tensor> attention_cuda_sm90(const Tensor& q, const Tensor& k, const Tensor& v,
                                               std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                               std::optional<double> scale, bool top_left, int64_t left, int64_t right,
                                               int64_t sink, int64_t group, std::optional<Tensor> layout, int64_t block,
                                               std::optional<Tensor> entries, std::optional<Tensor> full,
                                               std::optional<Tensor> total) {
  CudaCall call(kOp, 256, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, false, top_left);
  const Geometry& g = call.geometry;
  check_sm90(kOp, call.device);
  call.make_results();
  trace_record("attention:cuda/sm90");
  if (call.empty()) return call.results();

  ForwardSm90Params p{};
  p.base = call.params;
  set_window(p, left, right, sink, group);
  const bool windowed = p.window.left != kUnbounded || p.window.right != kUnbounded || p.window.group != 0;
  const ForwardSm90Choice choice = choose_forward_sm90(p.base.head_dim, p.base.value_dim, windowed || layout);
  const LayoutOnDevice blocks(kOp, g, layout, block, entries, full, total);
  p.layout = blocks.layout;
  p.lists = blocks.lists;
  const ForwardSm90Views views{view_of(call.q, p.base.q_strides, g.packed), view_of(call.k, p.base.k_strides, g.packed),
                               view_of(call.v, p.base.v_strides, g.packed),
                               view_of(call.out, p.base.out_strides, g.packed)};
  const cudaStream_t stream = cuda::current_stream(call.device, kOp);
  if (call.bf16)
    launch_for<cuda::Bf16>(p, views, choice, stream);
  else
    launch_for<cuda::Fp16>(p, views, choice, stream);
  return call.results();
}

}  // namespace
}  // namespace effkern::attention

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, m) {
  m.impl("attention_cuda_sm90", TORCH_BOX(&effkern::attention::attention_cuda_sm90));
}
