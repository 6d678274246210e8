// Runs the sm_90a attention forward on the software model of a thread block. Called through ctypes.
#include "attention/forward_sm90_kernel.cuh"
#include "attention_masks.h"

namespace {

using namespace effkern;
using attention::ForwardSm90Params;

template <class Element, int kHeadDim, int kKeys>
void run(const Call& call, ForwardSm90Params& p, int multiprocessors) {
  using Shape = attention::ForwardSm90Shape<kHeadDim, kKeys>;
  using Memory = attention::ForwardSm90Memory<Shape>;
  const int batch = p.base.packed() ? 1 : call.sequences, columns = Memory::KeyTile::kPanelColumns;
  const int key_heads = call.heads / call.group;
  p.q_map = map_of(call.q, batch, call.heads, call.queries, call.head_dim, 64, columns);
  p.k_map = map_of(call.k, batch, key_heads, call.keys, call.head_dim, kKeys, columns);
  p.v_map = map_of(call.v, batch, key_heads, call.keys, call.value_dim, kKeys, columns);
  p.out_map = map_of(call.out, batch, call.heads, call.queries, call.value_dim, 64, columns);
  plan_forward_sm90(p, Shape::kQueries, multiprocessors, call.l2_bytes);
  model::Block& block = model::block();
  for (int i = 0; i < p.blocks && block.error.empty(); ++i) {
    block.index = i;
    model::hopper().reset(Shape::kThreads / 32);
    block.run(Shape::kThreads, Memory::kBytes + Memory::kAlignment, call.seed + i,
              [&] { attention::attention_forward_sm90<Element, Shape>(p, 0); });
  }
}

template <class Element>
void run_for(const Call& call, const Masks& masks, ForwardSm90Params& p) {
  const auto is = [&](int head_dim, int keys) { return masks.head_dim == head_dim && masks.keys == keys; };
  if (is(64, 128)) return run<Element, 64, 128>(call, p, masks.multiprocessors);
  if (is(96, 128)) return run<Element, 96, 128>(call, p, masks.multiprocessors);
  if (is(128, 128)) return run<Element, 128, 128>(call, p, masks.multiprocessors);
  if (is(128, 176)) return run<Element, 128, 176>(call, p, masks.multiprocessors);
  if (is(256, 80)) return run<Element, 256, 80>(call, p, masks.multiprocessors);
  model::block().error = "there is no such instance";
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* model_attention_forward_sm90(const Call* call, const Masks* masks) {
  ForwardSm90Params p{};
  p.base = params_of(*call);
  set_masks(p, *masks);
  if (call->bf16)
    run_for<cuda::Bf16>(*call, *masks, p);
  else
    run_for<cuda::Fp16>(*call, *masks, p);
  const std::string& error = model::block().error;
  return error.empty() ? nullptr : error.c_str();
}
