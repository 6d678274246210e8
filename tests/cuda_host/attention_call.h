// One call of attention as the tests pass it through ctypes.
#pragma once

#include "attention/forward_launch.h"
#include "model.h"

struct Tensor {
  void* data;
  int64_t bytes, batch, head, token;  // the extent of its memory, and strides in elements
};

struct Call {
  Tensor q, k, v, out, lse;
  const int *cu_seqlens_q, *cu_seqlens_k;
  int sequences, heads, group, queries, keys, head_dim, value_dim;
  int bf16, causal, top_left;
  double scale;
  int64_t l2_bytes;
  unsigned seed;
};

// Parameters of the launch; registers the tensors as the memory that a block may touch.
inline effkern::attention::ForwardParams params_of(const Call& call) {
  using namespace effkern;
  attention::ForwardParams p{};
  const auto strides = [](const Tensor& t) { return attention::Strides{t.batch, t.head, t.token}; };
  model::Block& block = model::block();
  block.error.clear();
  block.global.clear();
  for (const Tensor* t : {&call.q, &call.k, &call.v, &call.out})
    block.global.push_back({static_cast<char*>(t->data), static_cast<char*>(t->data) + t->bytes});
  p.q = static_cast<const uint16_t*>(call.q.data);
  p.k = static_cast<const uint16_t*>(call.k.data);
  p.v = static_cast<const uint16_t*>(call.v.data);
  p.out = static_cast<uint16_t*>(call.out.data);
  p.lse = static_cast<float*>(call.lse.data);
  p.q_strides = strides(call.q);
  p.k_strides = strides(call.k);
  p.v_strides = strides(call.v);
  p.out_strides = strides(call.out);
  p.lse_strides = strides(call.lse);
  p.cu_seqlens_q = call.cu_seqlens_q;
  p.cu_seqlens_k = call.cu_seqlens_k;
  p.sequences = call.sequences;
  p.heads = call.heads;
  p.group = call.group;
  p.queries = call.queries;
  p.keys = call.keys;
  p.head_dim = call.head_dim;
  p.value_dim = call.value_dim;
  p.causal = call.causal;
  p.top_left = call.top_left;
  attention::set_scale(p, call.scale);
  return p;
}
