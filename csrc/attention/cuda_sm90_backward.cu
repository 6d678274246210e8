// Attention backward on Hopper GPUs (compute capability 9.0), as the op `attention_cuda_sm90_backward`: checks, memory
// and the choice of an instance. The device code is in backward_sm90_*_kernel.cuh.
//
// Status: unverified on hardware. The op runs when it is asked for by name; automatic dispatch does not choose it.
#include <torch/csrc/stable/library.h>

#include "attention/backward_sm90.h"
#include "attention/cuda_sm90_arguments.h"
#include "core/trace.h"

namespace effkern::attention {
namespace {

constexpr const char* kOp = "attention_cuda_sm90_backward";

template <class Element>
void launch_for(BackwardSm90Params& p, const BackwardSm90Launch& launch, int head_dim) {
  if (head_dim == 64) return launch_backward_sm90<Element, 64>(p, launch);
  if (head_dim == 96) return launch_backward_sm90<Element, 96>(p, launch);
  if (head_dim == 128) return launch_backward_sm90<Element, 128>(p, launch);
  launch_backward_sm90<Element, 256>(p, launch);
}

void check_result(const Tensor& t, const char* name, const std::vector<int64_t>& shape, ScalarType dtype) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size()) && t.scalar_type() == dtype && !t.is_cpu();
  for (size_t axis = 0; fits && axis < shape.size(); ++axis) fits = t.size(static_cast<int64_t>(axis)) == shape[axis];
  EFFKERN_CHECK(fits, kOp, ": ", name, " does not fit q, k and v; it has shape ", shape_string(t), " and dtype ",
                dtype_name(t.scalar_type()));
}

Tensor same_shape(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_cuda_sm90_backward(
    const Tensor& grad_out_in, std::optional<Tensor> grad_lse_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
    std::optional<double> scale, bool top_left, int64_t left, int64_t right, int64_t sink, int64_t group,
    std::optional<Tensor> layout, int64_t block, std::optional<Tensor> entries, std::optional<Tensor> full,
    std::optional<Tensor> total, std::optional<Tensor> key_entries, std::optional<Tensor> key_full,
    std::optional<Tensor> key_total, bool deterministic) {
  CudaCall call(kOp, 256, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, false, top_left);
  const Geometry& g = call.geometry;
  check_sm90(kOp, call.device);
  check_result(out, "out", g.output_shape(), q.scalar_type());
  check_result(grad_out_in, "grad_out", g.output_shape(), q.scalar_type());
  check_result(lse, "lse", g.lse_shape(), ScalarType::Float);
  if (grad_lse_in) check_result(*grad_lse_in, "grad_lse", g.lse_shape(), ScalarType::Float);
  call.set_results(torch::stable::contiguous(out), torch::stable::contiguous(lse));
  aligned_rows(kOp, call.out, "out", call.params.out_strides);
  const Tensor grad_out = unit_last_stride(grad_out_in);
  Tensor grad_lse;  // alive until the launch
  Tensor grad_q = same_shape(q), grad_k = same_shape(k), grad_v = same_shape(v), delta = same_shape(call.lse);
  trace_record("attention_backward:cuda/sm90");
  if (call.empty() || g.keys == 0) {  // nothing is seen: every gradient is zero
    for (Tensor* t : {&grad_q, &grad_k, &grad_v, &delta}) torch::stable::zero_(*t);
    return {grad_q, grad_k, grad_v, delta};
  }

  BackwardSm90Params p{};
  p.call.base = call.params;
  set_scale(p, g.scale);
  set_window(p.call, left, right, sink, group);
  BackwardSm90Launch launch{};
  launch.op = kOp;
  launch.stream = cuda::current_stream(call.device, kOp);
  const LayoutOnDevice blocks(kOp, g, layout, block, entries, full, total);
  p.call.layout = blocks.layout;
  p.call.lists = blocks.lists;
  launch.by_key = stored_lists(key_entries, key_full, key_total);

  const Strides grad_out_strides = strides_of(grad_out, g.packed);
  p.grad_out = aligned_rows(kOp, grad_out, "grad_out", grad_out_strides);
  p.grad_out_strides = grad_out_strides;
  if (grad_lse_in) {
    grad_lse = torch::stable::contiguous(*grad_lse_in);
    p.grad_lse = grad_lse.const_data_ptr<float>();
  }
  p.grad_lse_strides = p.delta_strides = call.params.lse_strides;
  p.delta = static_cast<float*>(delta.mutable_data_ptr());
  p.grad_q = static_cast<uint16_t*>(grad_q.mutable_data_ptr());
  p.grad_k = static_cast<uint16_t*>(grad_k.mutable_data_ptr());
  p.grad_v = static_cast<uint16_t*>(grad_v.mutable_data_ptr());
  p.grad_q_strides = strides_of(grad_q, g.packed);
  p.grad_k_strides = strides_of(grad_k, g.packed);
  p.grad_v_strides = strides_of(grad_v, g.packed);
  launch.views = {view_of(call.q, call.params.q_strides, g.packed), view_of(call.k, call.params.k_strides, g.packed),
                  view_of(call.v, call.params.v_strides, g.packed), view_of(grad_out, grad_out_strides, g.packed)};

  const BackwardSm90Choice choice = choose_backward_sm90(call.params.head_dim, call.params.value_dim);
  const int adding = deterministic ? 0 : adding_queries_sm90(choice.head_dim);
  const int64_t row_tiles = plan_rows_sm90(p, adding ? adding : choice.queries);
  const auto floats = [&](int64_t count) { return torch::stable::new_empty(q, {&count, 1}, ScalarType::Float); };
  Tensor rows = floats(rows_floats(p)), sums = floats(adding ? row_tiles * query_tile_floats(choice.head_dim) : 0);
  launch.rows = static_cast<float*>(rows.mutable_data_ptr());
  launch.query_sums = adding ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr;
  if (call.bf16)
    launch_for<cuda::Bf16>(p, launch, choice.head_dim);
  else
    launch_for<cuda::Fp16>(p, launch, choice.head_dim);
  return {grad_q, grad_k, grad_v, delta};
}

}  // namespace
}  // namespace effkern::attention

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, m) {
  m.impl("attention_cuda_sm90_backward", TORCH_BOX(&effkern::attention::attention_cuda_sm90_backward));
}
