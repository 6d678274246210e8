// Argument checks of the decode op, shared by the CPU and the CUDA implementation.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "attention/checks.h"

namespace effkern::attention_decode {

using attention::ScalarType;
using attention::Tensor;

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_device(const char* name, const Tensor& t, const Tensor& q) {
  EFFKERN_CHECK(same_device(t, q), "attention_decode: ", name, " is on another device than q");
}

struct Sizes {
  int64_t batch, heads_q, heads_kv, queries, head_dim, value_dim, capacity, page, pages;
  bool paged;
};

inline Sizes check_arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                             const std::optional<Tensor>& page_table) {
  const std::pair<const char*, const Tensor*> tensors[3] = {{"q", &q}, {"k_cache", &k}, {"v_cache", &v}};
  const ScalarType dtype = q.scalar_type();
  for (const auto& [name, t] : tensors) {
    EFFKERN_CHECK(t->dim() == 4, "attention_decode: ", name, " must have 4 dimensions, got shape ", shape_string(*t));
    EFFKERN_CHECK(t->scalar_type() == dtype, "attention_decode: ", name, " is ", dtype_name(t->scalar_type()),
                  " but q is ", dtype_name(dtype));
    check_device(name, *t, q);
  }
  EFFKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                "attention_decode: q and the caches must be float32, bfloat16 or float16, got ", dtype_name(dtype));
  Sizes s{};
  s.paged = page_table.has_value();
  s.batch = q.size(0);
  s.heads_q = q.size(1);
  s.heads_kv = k.size(1);
  s.queries = q.size(2);
  s.head_dim = q.size(3);
  s.value_dim = v.size(3);
  s.page = k.size(2);
  s.pages = k.size(0);
  s.capacity = s.page;
  EFFKERN_CHECK(k.size(3) == s.head_dim, "attention_decode: k_cache has head dim ", k.size(3), ", q has ", s.head_dim);
  for (const auto& [name, dim] : {std::pair{"q", s.head_dim}, std::pair{"v_cache", s.value_dim}})
    EFFKERN_CHECK(dim >= 1 && dim <= attention::kMaxHeadDim, "attention_decode: ", name, " has head dim ", dim,
                  ", expected 1 to ", attention::kMaxHeadDim);
  for (int64_t axis = 0; axis < 3; ++axis)
    EFFKERN_CHECK(v.size(axis) == k.size(axis), "attention_decode: v_cache has shape ", shape_string(v),
                  ", which does not match k_cache's ", shape_string(k));
  EFFKERN_CHECK(s.heads_kv > 0 ? s.heads_q % s.heads_kv == 0 : s.heads_q == 0, "attention_decode: k_cache has ",
                s.heads_kv, " heads, which does not divide q's ", s.heads_q);
  EFFKERN_CHECK(lengths.scalar_type() == ScalarType::Int && lengths.dim() == 1 && lengths.size(0) == s.batch,
                "attention_decode: cache_seqlens must be int32 of shape (", s.batch, ",), got ",
                dtype_name(lengths.scalar_type()), " of shape ", shape_string(lengths));
  check_device("cache_seqlens", lengths, q);
  if (!s.paged) {
    EFFKERN_CHECK(k.size(0) == s.batch, "attention_decode: k_cache has batch ", k.size(0), ", q has ", s.batch);
    return s;
  }
  EFFKERN_CHECK(page_table->scalar_type() == ScalarType::Int && page_table->dim() == 2 &&
                    page_table->size(0) == s.batch && same_device(*page_table, q),
                "attention_decode: page_table must be int32 of shape (", s.batch,
                ", pages of a sequence) on q's device, "
                "got ",
                dtype_name(page_table->scalar_type()), " of shape ", shape_string(*page_table));
  s.capacity = page_table->size(1) * s.page;
  return s;
}

// Checks what is beside the tensors and returns the factor of the scores.
inline float check_options(const Sizes& s, const Tensor& q, const std::optional<double>& scale,
                           const std::vector<int64_t>& bands, double softcap,
                           const std::optional<Tensor>& sink_logits) {
  EFFKERN_CHECK(bands.size() % 3 == 0, "attention_decode: bands must hold triples (left, right, sink)");
  EFFKERN_CHECK(softcap >= 0.0 && std::isfinite(static_cast<float>(softcap)),
                "attention_decode: softcap must be finite and at least 0, got ", softcap);
  const float factor = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(s.head_dim))));
  EFFKERN_CHECK(std::isfinite(factor), "attention_decode: scale must be finite in float32, got ", *scale);
  if (sink_logits) {
    EFFKERN_CHECK(sink_logits->dim() == 1 && sink_logits->size(0) == s.heads_q,
                  "attention: sink_logits must have shape (", s.heads_q, ",), one number a query head, got ",
                  shape_string(*sink_logits));
    EFFKERN_CHECK(sink_logits->scalar_type() == ScalarType::Float || sink_logits->scalar_type() == q.scalar_type(),
                  "attention: sink_logits must be float32 or q's ", dtype_name(q.scalar_type()), ", got ",
                  dtype_name(sink_logits->scalar_type()));
    EFFKERN_CHECK(same_device(*sink_logits, q), "attention: sink_logits is on another device than q");
  }
  return factor;
}

}  // namespace effkern::attention_decode
