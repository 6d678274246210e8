// Runs the CUDA attention forward on the software model of a thread block, block after block. Called through ctypes.
#include "attention/forward_sm80_kernel.cuh"

namespace {

using namespace effkern;
using attention::ForwardParams;

template <class Element, int kHeadDim, int kValueDim>
void run(ForwardParams p, int64_t l2_bytes, unsigned seed) {
  using Shape = attention::ForwardShape<kHeadDim, kValueDim>;
  model::Block& block = model::block();
  const int64_t blocks = attention::plan_grid(p, Shape::kQueries, l2_bytes);
  for (int64_t i = 0; i < blocks && block.error.empty(); ++i) {
    block.index = static_cast<int>(i);
    block.run(Shape::kThreads, Shape::kSharedBytes, seed + static_cast<unsigned>(i),
              [&] { attention::attention_forward_sm80<Element, kHeadDim, kValueDim>(p, 0); });
  }
}

template <class Element>
void run_for(const ForwardParams& p, int64_t l2_bytes, unsigned seed) {
  const bool wide = p.head_dim > 64, wide_value = p.value_dim > 64;
  if (wide && wide_value) return run<Element, 128, 128>(p, l2_bytes, seed);
  if (wide) return run<Element, 128, 64>(p, l2_bytes, seed);
  if (wide_value) return run<Element, 64, 128>(p, l2_bytes, seed);
  run<Element, 64, 64>(p, l2_bytes, seed);
}

}  // namespace

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

// Null, or what went wrong.
extern "C" const char* model_attention_forward(const Call* call) {
  ForwardParams p{};
  const auto strides = [](const Tensor& t) { return attention::Strides{t.batch, t.head, t.token}; };
  model::Block& block = model::block();
  block.error.clear();
  block.global.clear();
  for (const Tensor* t : {&call->q, &call->k, &call->v, &call->out})
    block.global.push_back({static_cast<char*>(t->data), static_cast<char*>(t->data) + t->bytes});
  p.q = static_cast<const uint16_t*>(call->q.data);
  p.k = static_cast<const uint16_t*>(call->k.data);
  p.v = static_cast<const uint16_t*>(call->v.data);
  p.out = static_cast<uint16_t*>(call->out.data);
  p.lse = static_cast<float*>(call->lse.data);
  p.q_strides = strides(call->q);
  p.k_strides = strides(call->k);
  p.v_strides = strides(call->v);
  p.out_strides = strides(call->out);
  p.lse_strides = strides(call->lse);
  p.cu_seqlens_q = call->cu_seqlens_q;
  p.cu_seqlens_k = call->cu_seqlens_k;
  p.sequences = call->sequences;
  p.heads = call->heads;
  p.group = call->group;
  p.queries = call->queries;
  p.keys = call->keys;
  p.head_dim = call->head_dim;
  p.value_dim = call->value_dim;
  p.causal = call->causal;
  p.top_left = call->top_left;
  attention::set_scale(p, call->scale);
  if (call->bf16)
    run_for<cuda::Bf16>(p, call->l2_bytes, call->seed);
  else
    run_for<cuda::Fp16>(p, call->l2_bytes, call->seed);
  return block.error.empty() ? nullptr : block.error.c_str();
}
