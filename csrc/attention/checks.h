// Argument checks and geometry of the attention ops, shared by the CPU and the CUDA implementation.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "core/check.h"

namespace effkern::attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxHeadDim = 256;

// Shapes of one call. Dense: q (batch, heads_q, queries, head_dim). Packed: q (heads_q, queries, head_dim)
// with `queries` and `keys` the totals over all sequences, and batch 1.
struct Geometry {
  bool packed;
  int64_t batch, heads_q, heads_kv, queries, keys, head_dim, value_dim;
  double scale;

  int64_t group() const { return heads_q / heads_kv; }
  std::vector<int64_t> output_shape() const {
    return packed ? std::vector<int64_t>{heads_q, queries, value_dim}
                  : std::vector<int64_t>{batch, heads_q, queries, value_dim};
  }
  std::vector<int64_t> lse_shape() const {
    return packed ? std::vector<int64_t>{heads_q, queries} : std::vector<int64_t>{batch, heads_q, queries};
  }
};

// One sequence of a packed batch, or one batch entry of a dense one.
struct Sequence {
  int64_t query_begin, queries, key_begin, keys;
};

inline Geometry check_arguments(const Tensor& q, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                                std::optional<double> scale) {
  EFFKERN_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                "attention: cu_seqlens_q and cu_seqlens_k go together; only ",
                cu_seqlens_q.has_value() ? "cu_seqlens_q" : "cu_seqlens_k", " was given");
  Geometry g{};
  g.packed = cu_seqlens_q.has_value();
  const int64_t rank = g.packed ? 3 : 4;
  const Tensor* tensors[3] = {&q, &k, &v};
  const char* names[3] = {"q", "k", "v"};
  for (int i = 0; i < 3; ++i) {
    EFFKERN_CHECK(tensors[i]->dim() == rank, "attention: ", names[i], " must have ", rank, " dimensions ",
                  g.packed ? "(heads, tokens, dim) with cu_seqlens" : "(batch, heads, sequence, dim)", ", got shape ",
                  shape_string(*tensors[i]));
    EFFKERN_CHECK(tensors[i]->scalar_type() == q.scalar_type(), "attention: ", names[i], " is ",
                  dtype_name(tensors[i]->scalar_type()), " but q is ", dtype_name(q.scalar_type()));
    EFFKERN_CHECK(tensors[i]->is_cpu() == q.is_cpu() && tensors[i]->get_device_index() == q.get_device_index(),
                  "attention: ", names[i], " is on another device than q");
  }
  const ScalarType dtype = q.scalar_type();
  EFFKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                "attention: q, k and v must be float32, bfloat16 or float16, got ", dtype_name(dtype));

  const int64_t head_axis = g.packed ? 0 : 1;
  g.batch = g.packed ? 1 : q.size(0);
  g.heads_q = q.size(head_axis);
  g.heads_kv = k.size(head_axis);
  g.queries = q.size(head_axis + 1);
  g.keys = k.size(head_axis + 1);
  g.head_dim = q.size(head_axis + 2);
  g.value_dim = v.size(head_axis + 2);
  if (!g.packed) {
    EFFKERN_CHECK(k.size(0) == g.batch, "attention: k has batch ", k.size(0), ", q has ", g.batch);
    EFFKERN_CHECK(v.size(0) == g.batch, "attention: v has batch ", v.size(0), ", q has ", g.batch);
  }
  EFFKERN_CHECK(v.size(head_axis) == g.heads_kv, "attention: v has ", v.size(head_axis), " heads, k has ", g.heads_kv);
  EFFKERN_CHECK(v.size(head_axis + 1) == g.keys, "attention: v has ", v.size(head_axis + 1), " keys, k has ", g.keys);
  EFFKERN_CHECK(k.size(head_axis + 2) == g.head_dim, "attention: k has head dim ", k.size(head_axis + 2), ", q has ",
                g.head_dim);
  EFFKERN_CHECK(g.heads_kv > 0 ? g.heads_q % g.heads_kv == 0 : g.heads_q == 0, "attention: k has ", g.heads_kv,
                " heads, which does not divide q's ", g.heads_q);
  EFFKERN_CHECK(g.head_dim >= 1 && g.head_dim <= kMaxHeadDim, "attention: q has head dim ", g.head_dim,
                ", expected 1 to ", kMaxHeadDim);
  EFFKERN_CHECK(g.value_dim >= 1 && g.value_dim <= kMaxHeadDim, "attention: v has head dim ", g.value_dim,
                ", expected 1 to ", kMaxHeadDim);
  g.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(g.head_dim)));
  EFFKERN_CHECK(std::isfinite(static_cast<float>(g.scale)), "attention: scale must be finite in float32, got ",
                g.scale);

  if (g.packed) {
    const std::pair<const char*, const Tensor*> offsets[2] = {{"cu_seqlens_q", &*cu_seqlens_q},
                                                              {"cu_seqlens_k", &*cu_seqlens_k}};
    for (const auto& [name, tensor] : offsets) {
      EFFKERN_CHECK(tensor->scalar_type() == ScalarType::Int, "attention: ", name, " must be int32, got ",
                    dtype_name(tensor->scalar_type()));
      EFFKERN_CHECK(tensor->dim() == 1 && tensor->numel() >= 1, "attention: ", name,
                    " must have shape (sequences + 1,), got ", shape_string(*tensor));
      EFFKERN_CHECK(tensor->is_cpu() == q.is_cpu(), "attention: ", name, " is on another device than q");
    }
    EFFKERN_CHECK(cu_seqlens_q->numel() == cu_seqlens_k->numel(), "attention: cu_seqlens_q has ",
                  cu_seqlens_q->numel() - 1, " sequences, cu_seqlens_k has ", cu_seqlens_k->numel() - 1);
  }
  return g;
}

// The sequences of a call whose offsets, if any, live on the CPU. Raises where offsets do not rise from 0 to the
// number of tokens.
inline std::vector<Sequence> read_sequences(const Geometry& g, const std::optional<Tensor>& cu_seqlens_q,
                                            const std::optional<Tensor>& cu_seqlens_k) {
  std::vector<Sequence> sequences;
  if (!g.packed) {
    for (int64_t b = 0; b < g.batch; ++b) sequences.push_back({0, g.queries, 0, g.keys});
    return sequences;
  }
  const int64_t count = cu_seqlens_q->numel() - 1;
  const Tensor q_offsets = torch::stable::contiguous(*cu_seqlens_q);
  const Tensor k_offsets = torch::stable::contiguous(*cu_seqlens_k);
  const auto check_offsets = [&](const char* name, const int32_t* offsets, int64_t tokens) {
    EFFKERN_CHECK(offsets[0] == 0, "attention: ", name, " must start at 0, got ", offsets[0]);
    for (int64_t i = 0; i < count; ++i) {
      EFFKERN_CHECK(offsets[i + 1] >= offsets[i], "attention: ", name, " must not decrease, got ", offsets[i], " then ",
                    offsets[i + 1], " at position ", i + 1);
    }
    EFFKERN_CHECK(offsets[count] == tokens, "attention: ", name, " must end at the number of tokens ", tokens, ", got ",
                  offsets[count]);
  };
  const int32_t* q_begin = q_offsets.const_data_ptr<int32_t>();
  const int32_t* k_begin = k_offsets.const_data_ptr<int32_t>();
  check_offsets("cu_seqlens_q", q_begin, g.queries);
  check_offsets("cu_seqlens_k", k_begin, g.keys);
  for (int64_t i = 0; i < count; ++i)
    sequences.push_back({q_begin[i], q_begin[i + 1] - q_begin[i], k_begin[i], k_begin[i + 1] - k_begin[i]});
  return sequences;
}

// The op itself wants a unit stride along the head dimension; any other layout is copied once.
inline Tensor unit_last_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace effkern::attention
