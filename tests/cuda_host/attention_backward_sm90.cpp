// Runs the sm_90a attention backward on the software model of a thread block. Called through ctypes.
#include "attention/backward_sm90_keys_kernel.cuh"
#include "attention/backward_sm90_queries_kernel.cuh"
#include "attention/backward_sm90_rows_kernel.cuh"
#include "attention/backward_sm90_sums_kernel.cuh"
#include "attention_call.h"
#include "attention_masks.h"

namespace {

using namespace effkern;
using attention::BackwardSm90Params;

// What a backward has beside a forward (attention_call.h).
struct Gradients {
  Tensor out, lse, delta;  // of out (given), of lse (given, null: none), and the row sums
  Tensor q, k, v;
};

// What the launches need beside: stored lists by query and by key, the instances.
struct Kernels {
  attention::StoredLists by_key;
  int head_dim, queries, keys;
  int adds;  // dQ is added up by the first of the two
};

attention::Strides strides(const Tensor& t) { return {t.batch, t.head, t.token}; }

void allow(const void* data, int64_t bytes) {
  const char* begin = static_cast<const char*>(data);
  model::block().global.push_back({begin, begin + bytes});
}

void run_blocks(int64_t blocks, int threads, uint32_t shared_bytes, unsigned seed, const std::function<void()>& body) {
  model::Block& block = model::block();
  for (int i = 0; i < blocks && block.error.empty(); ++i) {
    block.index = i;
    model::hopper().reset(threads / 32);
    block.run(threads, shared_bytes, seed + i, body);
  }
}

// Memory of 16-byte alignment that a block may touch.
struct Workspace {
  std::vector<float> memory;
  float* begin;

  explicit Workspace(int64_t floats) : memory(floats + 4, NAN) {
    begin = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / 4;
    allow(begin, floats * 4);
  }
};

template <class Element, int kHeadDim, int kQueries, int kKeys, bool kAdds = false>
void run(const Call& call, const Gradients& grads, const Masks& masks, const Kernels& kernels, BackwardSm90Params p) {
  using KeyShape = attention::BackwardSm90KeyShape<kHeadDim, kQueries, kAdds>;
  using KeyMemory = attention::BackwardSm90KeyMemory<KeyShape>;
  using QueryShape = attention::BackwardSm90QueryShape<kHeadDim, kKeys>;
  using QueryMemory = attention::BackwardSm90QueryMemory<QueryShape>;
  const int batch = p.call.base.packed() ? 1 : call.sequences, columns = KeyMemory::KeyTile::kPanelColumns;
  const int key_heads = call.heads / call.group;
  const auto set_maps = [&](int query_rows, int key_rows) {
    p.call.q_map = map_of(call.q, batch, call.heads, call.queries, call.head_dim, query_rows, columns);
    p.grad_out_map = map_of(grads.out, batch, call.heads, call.queries, call.value_dim, query_rows, columns);
    p.call.k_map = map_of(call.k, batch, key_heads, call.keys, call.head_dim, key_rows, columns);
    p.call.v_map = map_of(call.v, batch, key_heads, call.keys, call.value_dim, key_rows, columns);
  };

  const int64_t tiles = plan_rows_sm90(p, kQueries);
  Workspace rows(rows_floats(p)), sums(kAdds ? tiles * attention::query_tile_floats(kHeadDim) : 0);
  p.rows = rows.begin;
  if (kAdds) p.query_sums = sums.begin, p.query_sums_tile = attention::query_tile_floats(kHeadDim);
  run_blocks(tiles, attention::kRowThreads, 16, call.seed, [&] { attention_backward_rows_sm90<Element>(p); });

  set_maps(kQueries, 64);
  p.call.lists = kernels.by_key;
  int64_t blocks = plan_keys_sm90(p, KeyShape::kKeys, call.l2_bytes);
  run_blocks(blocks, KeyShape::kThreads, KeyMemory::kBytes + KeyMemory::kAlignment, call.seed + 1000,
             [&] { attention::attention_backward_keys_sm90<Element, KeyShape>(p, 0); });

  if constexpr (kAdds) {
    run_blocks(tiles, attention::kRowThreads, 16, call.seed,
               [&] { attention::attention_backward_sums_sm90<Element, kHeadDim>(p); });
    return;
  }
  set_maps(64, kKeys);
  p.call.lists = masks.lists;
  plan_queries_sm90(p, QueryShape::kQueries, masks.multiprocessors, call.l2_bytes);
  run_blocks(p.call.blocks, QueryShape::kThreads, QueryMemory::kBytes + QueryMemory::kAlignment, call.seed + 2000,
             [&] { attention::attention_backward_queries_sm90<Element, QueryShape>(p, 0); });
}

template <class Element>
void run_for(const Call& call, const Gradients& grads, const Masks& masks, const Kernels& kernels,
             const BackwardSm90Params& p) {
  attention::BackwardSm90Choice choice = attention::choose_backward_sm90(call.head_dim, call.value_dim);
  if (kernels.adds) choice.queries = attention::adding_queries_sm90(choice.head_dim);
  if (choice.head_dim != kernels.head_dim || choice.queries != kernels.queries || choice.keys != kernels.keys) {
    model::block().error = "the test expects another instance";
    return;
  }
  if (kernels.adds && choice.head_dim == 64) return run<Element, 64, 64, 128, true>(call, grads, masks, kernels, p);
  if (kernels.adds) return run<Element, 128, 64, 128, true>(call, grads, masks, kernels, p);
  if (choice.head_dim == 64) return run<Element, 64, 96, 128>(call, grads, masks, kernels, p);
  if (choice.head_dim == 96) return run<Element, 96, 80, 128>(call, grads, masks, kernels, p);
  if (choice.head_dim == 128) return run<Element, 128, 64, 128>(call, grads, masks, kernels, p);
  run<Element, 256, 64, 64>(call, grads, masks, kernels, p);
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* model_attention_backward_sm90(const Call* call, const Gradients* grads, const Masks* masks,
                                                     const Kernels* kernels) {
  BackwardSm90Params p{};
  p.call.base = params_of(*call);
  for (const Tensor* t : {&grads->out, &grads->q, &grads->k, &grads->v}) allow(t->data, t->bytes);
  set_masks(p.call, *masks);
  set_scale(p, call->scale);
  p.grad_out = static_cast<const uint16_t*>(grads->out.data);
  p.grad_lse = static_cast<const float*>(grads->lse.data);
  p.delta = static_cast<float*>(grads->delta.data);
  p.grad_q = static_cast<uint16_t*>(grads->q.data);
  p.grad_k = static_cast<uint16_t*>(grads->k.data);
  p.grad_v = static_cast<uint16_t*>(grads->v.data);
  p.grad_out_strides = strides(grads->out);
  p.grad_lse_strides = strides(grads->lse);
  p.delta_strides = strides(grads->delta);
  p.grad_q_strides = strides(grads->q);
  p.grad_k_strides = strides(grads->k);
  p.grad_v_strides = strides(grads->v);
  if (call->bf16)
    run_for<cuda::Bf16>(*call, *grads, *masks, *kernels, p);
  else
    run_for<cuda::Fp16>(*call, *grads, *masks, *kernels, p);
  const std::string& error = model::block().error;
  return error.empty() ? nullptr : error.c_str();
}

// The walk over query tiles against the definition, over all masks and tiles of sequences up to `most` long: null, or
// what is wrong.
extern "C" const char* check_query_steps(int most) {
  using namespace effkern::attention;
  const Window windows[] = {{},
                            {kUnbounded, 0},
                            {3, 2},
                            {0, kUnbounded},
                            {2, 0, 3},
                            {5, 1, 9},
                            {kUnbounded, kUnbounded, 0, 4, 0},
                            {kUnbounded, 0, 0, 6, 3},
                            {2, 2, 0, 5, 2},
                            {4, -1},
                            {-2, 6},
                            {6, -2, 4}};
  constexpr int kQueryTile = 4, kKeyTile = 3;
  for (const Window& w : windows)
    for (int queries = 1; queries <= most; ++queries)
      for (int keys = 1; keys <= most; ++keys)
        for (int shift : {0, keys - queries})
          for (int first = 0; first < keys; first += kKeyTile) {
            const int last = std::min(first + kKeyTile, keys) - 1;
            const QuerySteps steps = query_steps(w, first, last, shift, queries, kQueryTile);
            if (steps.whole > steps.whole_end || steps.whole_end > steps.count) return "unmasked steps out of order";
            for (int step = 0; step < steps.count; ++step)
              if (steps.tile(step) < 0 || steps.tile(step) * kQueryTile >= std::max(queries, 1) + kQueryTile)
                return "a tile beyond the queries";
            for (int tile = 0; tile * kQueryTile < queries; ++tile) {
              bool any = false, every = (tile + 1) * kQueryTile <= queries;
              for (int query = tile * kQueryTile; query < std::min((tile + 1) * kQueryTile, queries); ++query)
                for (int key = first; key <= last; ++key) {
                  const bool sees = seen_keys(w, query + shift, keys).sees(key);
                  if (sees != seen_by(w, key, shift, queries).query(query)) return "a pair seen from one side only";
                  any |= sees;
                  every &= sees;
                }
              bool visited = false, unmasked = false;
              for (int step = 0; step < steps.count; ++step)
                if (steps.tile(step) == tile) visited = true, unmasked = step >= steps.whole && step < steps.whole_end;
              if (any && !visited) return "a tile is missed";
              if (unmasked && !every) return "a tile needs a mask";
              if (every && !unmasked) return "a whole tile is masked";
            }
          }
  return nullptr;
}
