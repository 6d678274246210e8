// From the tensors of an attention call to the parameters of a forward kernel. Torch side of the CUDA ops.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <tuple>
#include <utility>

#include "attention/checks.h"
#include "attention/forward_launch.h"
#include "core/cuda/check.h"
#include "core/cuda/stream.h"

namespace effkern::attention {

// Strides of a (batch, heads, tokens, dim) or packed (heads, tokens, dim) tensor. An axis of one element gets stride 0.
inline Strides strides_of(const Tensor& t, bool packed) {
  const int64_t head = packed ? 0 : 1;
  const auto stride = [&](int64_t axis) { return t.size(axis) > 1 ? t.stride(axis) : 0; };
  return {packed ? 0 : stride(0), stride(head), stride(head + 1)};
}

inline const uint16_t* aligned_rows(const char* op, const Tensor& t, const char* name, const Strides& strides) {
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  EFFKERN_CHECK(address % 16 == 0 && strides.batch % 8 == 0 && strides.head % 8 == 0 && strides.token % 8 == 0, op,
                ": ", name, " must have rows that start on multiples of 16 bytes; pass ", name, ".contiguous()");
  return reinterpret_cast<const uint16_t*>(address);
}

// A call of a kernel: what of its parameters comes from the arguments. Keeps alive what the launch reads.
struct CudaCall {
  Geometry geometry;
  int device;
  torch::stable::accelerator::DeviceGuard guard;
  Tensor q, k, v, out, lse, q_offsets, k_offsets;
  ForwardParams params{};
  bool bf16;

  CudaCall(const char* op, int max_dim, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
           const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
           std::optional<double> scale, bool causal, bool top_left)
      : geometry(check_arguments(q_in, k_in, v_in, cu_seqlens_q, cu_seqlens_k, scale)),
        device(q_in.get_device_index()),
        guard(device),
        bf16(q_in.scalar_type() == ScalarType::BFloat16) {
    const Geometry& g = geometry;
    EFFKERN_CHECK(bf16 || q_in.scalar_type() == ScalarType::Half, op, ": kernels exist for bfloat16 and float16, q is ",
                  dtype_name(q_in.scalar_type()));
    for (const auto& [name, dim] : {std::pair{"q", g.head_dim}, std::pair{"v", g.value_dim}})
      EFFKERN_CHECK(dim % 8 == 0 && dim <= max_dim, op, ": kernels take head dims that are multiples of 8 up to ",
                    max_dim, ", ", name, " has ", dim);
    EFFKERN_CHECK(g.queries + g.keys < (int64_t{1} << 30) && g.batch * g.heads_q < (int64_t{1} << 30), op,
                  ": sequences and batch x heads must stay below 2^30");
    // Our own copy of the CUDA runtime keeps a current device of its own.
    cuda::check(cudaSetDevice(device), op, "cudaSetDevice");

    q = unit_last_stride(q_in);
    k = unit_last_stride(k_in);
    v = unit_last_stride(v_in);
    ForwardParams& p = params;
    p.q_strides = strides_of(q, g.packed);
    p.k_strides = strides_of(k, g.packed);
    p.v_strides = strides_of(v, g.packed);
    p.out_strides = {g.heads_q * g.queries * g.value_dim, g.queries * g.value_dim, g.value_dim};
    p.lse_strides = {g.heads_q * g.queries, g.queries, 1};
    p.q = aligned_rows(op, q, "q", p.q_strides);
    p.k = aligned_rows(op, k, "k", p.k_strides);
    p.v = aligned_rows(op, v, "v", p.v_strides);
    p.sequences = static_cast<int>(g.batch);
    p.heads = static_cast<int>(g.heads_q);
    p.group = static_cast<int>(g.heads_kv > 0 ? g.group() : 1);
    p.queries = static_cast<int>(g.queries);
    p.keys = static_cast<int>(g.keys);
    p.head_dim = static_cast<int>(g.head_dim);
    p.value_dim = static_cast<int>(g.value_dim);
    p.causal = causal;
    p.top_left = top_left;
    set_scale(p, g.scale);
    if (!g.packed || empty()) return;
    // Offsets stay on the device and are not read here; the kernel keeps to the tensors whatever they hold.
    q_offsets = torch::stable::contiguous(*cu_seqlens_q);
    k_offsets = torch::stable::contiguous(*cu_seqlens_k);
    p.cu_seqlens_q = q_offsets.const_data_ptr<int32_t>();
    p.cu_seqlens_k = k_offsets.const_data_ptr<int32_t>();
    p.sequences = static_cast<int>(q_offsets.numel() - 1);
    EFFKERN_CHECK(p.sequences > 0, op, ": cu_seqlens_q must end at the number of tokens ", g.queries,
                  ", got no sequence");
  }

  // No query at all.
  bool empty() const { return geometry.batch * geometry.heads_q * geometry.queries == 0; }

  // The results: new ones of a forward, contiguous ones that a backward was given.
  void set_results(const Tensor& given_out, const Tensor& given_lse) {
    out = given_out;
    lse = given_lse;
    params.out = static_cast<uint16_t*>(out.mutable_data_ptr());
    params.lse = static_cast<float*>(lse.mutable_data_ptr());
  }
  void make_results() {
    const std::vector<int64_t> out_shape = geometry.output_shape(), lse_shape = geometry.lse_shape();
    set_results(torch::stable::new_empty(q, {out_shape.data(), out_shape.size()}),
                torch::stable::new_empty(q, {lse_shape.data(), lse_shape.size()}, ScalarType::Float));
  }
  std::tuple<Tensor, Tensor> results() const { return {out, lse}; }
};

}  // namespace effkern::attention
