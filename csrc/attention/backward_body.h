// Attention backward for one key tile: grad_k and grad_v stay put while the query tiles that see the keys stream by,
// and each visit adds its share of grad_q. Five products a visit, nothing recomputed twice, no atomics on data: key
// tiles add to a query gradient in list order, so results do not depend on the number of threads.
#pragma once

#include <sched.h>

#include "attention/forward_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

using attention::BackwardHead;
using attention::BackwardTile;
using attention::QueryPack;
using attention::QueryRun;

// The packed block of one query tile: operands of the four products it takes part in, row statistics, and the
// transposed fp32 accumulator of its gradient.
struct QueryBlock {
  void *query_operand, *grad_out_operand;  // transposed: scores, and dP
  void *query_rows, *grad_out_rows;        // as rows: grad_k, and grad_v
  float *lse, *delta;                      // log2 units with +inf for rows without keys; rowsum(dO O) - dLSE
  float* grad_query;                       // (head_dim, lanes)
};

template <class Engine>
static int64_t query_block_layout(const Problem& p, int64_t query_tile, char* base, QueryBlock* block) {
  const int64_t lanes = round_up(query_tile, Engine::kLaneMultiple);
  const int64_t sizes[7] = {Engine::query_operand_bytes(p.head_dim, lanes),
                            Engine::query_operand_bytes(p.value_dim, lanes),
                            Engine::query_rows_bytes(p.head_dim, lanes),
                            Engine::query_rows_bytes(p.value_dim, lanes),
                            lanes * 4,
                            lanes * 4,
                            Engine::padded_dim(p.head_dim) * lanes * 4};
  int64_t offsets[8] = {0};
  for (int i = 0; i < 7; ++i) offsets[i + 1] = round_up(offsets[i] + sizes[i], 64);
  if (block) {
    block->query_operand = base + offsets[0];
    block->grad_out_operand = base + offsets[1];
    block->query_rows = base + offsets[2];
    block->grad_out_rows = base + offsets[3];
    block->lse = reinterpret_cast<float*>(base + offsets[4]);
    block->delta = reinterpret_cast<float*>(base + offsets[5]);
    block->grad_query = reinterpret_cast<float*>(base + offsets[6]);
  }
  return offsets[7];
}

template <class Engine>
static int64_t query_block_bytes(const Problem& p, int64_t query_tile) {
  return query_block_layout<Engine>(p, query_tile, nullptr, nullptr);
}

template <class T>
static float row_dot(const T* a, const T* b, int64_t count) {
  Vec sum = vzero();
  for (int64_t i = 0; i < count; i += kLanes) sum = vfma(load_some(a + i, count - i), load_some(b + i, count - i), sum);
  float lanes[kLanes], total = 0.0f;
  vstore(lanes, sum);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

template <class Engine>
static void pack_queries(const QueryPack& t) {
  using T = typename Engine::Element;
  const Problem& p = t.problem;
  QueryBlock block;
  query_block_layout<Engine>(p, t.query_tile, static_cast<char*>(t.packed), &block);
  const int64_t lanes = round_up(t.queries, Engine::kLaneMultiple);
  Engine::pack_query_operand(t.q, t.queries, p.head_dim, lanes, p.scale < 0, block.query_operand);
  Engine::pack_query_operand(t.grad_out, t.queries, p.value_dim, lanes, false, block.grad_out_operand);
  Engine::pack_query_rows(t.q, t.queries, p.head_dim, block.query_rows);
  Engine::pack_query_rows(t.grad_out, t.queries, p.value_dim, block.grad_out_rows);
  const T* grad_out = static_cast<const T*>(t.grad_out.data);
  const T* out = static_cast<const T*>(t.out.data);
  for (int64_t row = 0; row < lanes; ++row) {
    const bool seen = row < t.queries && t.lse[row] != -INFINITY;
    block.lse[row] = seen ? t.lse[row] * kLog2e : INFINITY;
    block.delta[row] = !seen ? 0.0f
                             : row_dot(grad_out + row * t.grad_out.stride, out + row * t.out.stride, p.value_dim) -
                                   (t.grad_lse ? t.grad_lse[row] : 0.0f);
    if (row < t.queries) t.delta[row] = block.delta[row];
  }
}

// P^T = 2^(factor S^T - lse) and dS^T = P^T (dP^T - delta). A weight is at most 1: for huge scores, where the fp32
// lse is coarse, the bound keeps rounding from turning into infinity.
template <class Engine>
static void probabilities_and_gradient(const float* s, const float* grad_p, int64_t padded, int64_t lanes, float factor,
                                       const QueryBlock& block, const typename Engine::Gradients& gradients) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    const Vec lse = vload(block.lse + lane), delta = vload(block.delta + lane);
    const Vec offset = vsub(vzero(), lse);
    for (int64_t key = 0; key < padded; key += 2) {
      const int64_t at = key * lanes + lane;
      const Vec even = vexp2(vmin(vzero(), vfma(vload(s + at), vset(factor), offset)));
      const Vec odd = vexp2(vmin(vzero(), vfma(vload(s + at + lanes), vset(factor), offset)));
      const Vec grad_even = vmul(even, vsub(vload(grad_p + at), delta));
      const Vec grad_odd = vmul(odd, vsub(vload(grad_p + at + lanes), delta));
      Engine::store_gradient_pair(gradients, lanes, key, lane, even, odd, grad_even, grad_odd);
    }
  }
}

// The same with the terms that come between scores and weights. P and dS stay in fp32 where the scores and dP were, for
// the gradient of the bias; what the products read are the weights that dropout kept, and dS behind the softcap.
template <class Engine>
static void terms_and_gradient(const Terms& terms, const TilePlace& at, float* s, float* grad_p, const float* keep,
                               const float* slope_of_cap, int64_t padded, float factor, const QueryBlock& block,
                               const typename Engine::Gradients& gradients) {
  const int64_t lanes = at.lanes;
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    const Vec delta = vload(block.delta + lane), offset = vsub(vzero(), vload(block.lse + lane));
    for (int64_t key = 0; key < padded; ++key) {
      const int64_t i = key * lanes + lane;
      const Vec weight = vexp2(vmin(vzero(), vfma(vload(s + i), vset(factor), offset)));
      const Vec kept = keep ? vload(keep + i) : vset(1.0f);
      vstore(grad_p + i, vmul(weight, vsub(vmul(vload(grad_p + i), kept), delta)));
      vstore(s + i, vmul(weight, kept));
    }
  }
  if (terms.grad_bias) add_to_bias_gradient(terms, at, grad_p);
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    for (int64_t key = 0; key < padded; key += 2) {
      const int64_t i = key * lanes + lane;
      Vec even = vload(grad_p + i), odd = vload(grad_p + i + lanes);
      if (slope_of_cap) {
        even = vmul(even, vload(slope_of_cap + i));
        odd = vmul(odd, vload(slope_of_cap + i + lanes));
      }
      Engine::store_gradient_pair(gradients, lanes, key, lane, vload(s + i), vload(s + i + lanes), even, odd);
    }
  }
}

// Spins until `*counter` has reached `target`. The tile it waits for is already running on another thread.
static inline void wait_until(const int* counter, int target) {
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != target; ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > 2000) sched_yield();  // more threads than cores
  }
}

struct BackwardScratch {
  float *scores, *grad_scores, *grad_k, *grad_v;
  void* gradients;
  float *bias, *keep, *slope_of_cap;
};

template <class Engine>
static int64_t backward_layout(const Problem& p, char* base, BackwardScratch* scratch) {
  const int64_t lanes = Engine::kMostQueries, keys = Engine::kBackwardKeyTile;
  const int64_t tile = (keys + Engine::kKeyMultiple) * lanes * 4;
  const int64_t sizes[8] = {tile,
                            tile,
                            keys * Engine::padded_dim(p.head_dim) * 4,
                            keys * Engine::padded_dim(p.value_dim) * 4,
                            Engine::gradient_bytes(keys, lanes),
                            p.terms ? tile : 0,
                            p.terms ? tile : 0,
                            p.terms ? tile : 0};
  int64_t offsets[9] = {0};
  for (int i = 0; i < 8; ++i) offsets[i + 1] = round_up(offsets[i] + sizes[i], 64);
  if (scratch) {
    base = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(base), 64));
    scratch->scores = reinterpret_cast<float*>(base + offsets[0]);
    scratch->grad_scores = reinterpret_cast<float*>(base + offsets[1]);
    scratch->grad_k = reinterpret_cast<float*>(base + offsets[2]);
    scratch->grad_v = reinterpret_cast<float*>(base + offsets[3]);
    scratch->gradients = base + offsets[4];
    scratch->bias = reinterpret_cast<float*>(base + offsets[5]);
    scratch->keep = reinterpret_cast<float*>(base + offsets[6]);
    scratch->slope_of_cap = reinterpret_cast<float*>(base + offsets[7]);
  }
  return offsets[8] + 64;
}

template <class Engine>
static int64_t backward_scratch_bytes(const Problem& p) {
  return backward_layout<Engine>(p, nullptr, nullptr);
}

template <class T>
static void store_rows(const float* source, int64_t source_stride, float scale, int64_t rows, int64_t columns,
                       T* target) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < columns; d += kLanes)
      store_some(target + row * columns + d, vmul(vset(scale), vload(source + row * source_stride + d)), columns - d);
}

// When a key tile adds to a query gradient: after `rank` others, and whether it is the last to do so.
struct Turn {
  int rank;
  bool last;
};

EFFKERN_INLINE Turn turn_of(const KeyRun* runs, int64_t count, int64_t key_begin, int64_t key_tile) {
  int64_t i = 0;
  while (key_begin >= runs[i].end) ++i;
  const int64_t rank = runs[i].first_rank + (key_begin - runs[i].begin) / key_tile;
  return {static_cast<int>(rank), i + 1 == count && key_begin + key_tile >= runs[i].end};
}

// P and dS of one query tile against the keys of `t`, from the packed query side to the operands of the products.
template <class Engine>
static typename Engine::Gradients weigh_query_tile(const BackwardTile& t, const typename Engine::BackwardKeys& keys,
                                                   const BackwardScratch& scratch, const BackwardHead& head,
                                                   const TilePlace& place, bool partial, const QueryBlock& block) {
  const Problem& p = t.problem;
  const Terms& terms = *head.terms;
  const int64_t lanes = place.lanes, padded = round_up(t.keys, Engine::kKeyMultiple);
  float *s = scratch.scores, *grad_p = scratch.grad_scores;
  keys.scores(block.query_operand, lanes, s);
  keys.grad_probabilities(block.grad_out_operand, lanes, grad_p);
  float* slope_of_cap = terms.softcap != 0.0f ? scratch.slope_of_cap : nullptr;
  if (terms.shaped) shape_scores(terms, place, p.scale, s, scratch.bias, slope_of_cap);
  if (partial) mask_scores(s, lanes, *head.mask, place.first_query, place.queries, t.key_begin, t.keys);
  fill_rows(s, lanes, t.keys, padded, -INFINITY);
  fill_rows(grad_p, lanes, t.keys, padded, 0.0f);
  const typename Engine::Gradients gradients(s, grad_p, scratch.gradients, lanes);
  const float factor = terms.shaped ? kLog2e : exponent_factor(p.scale);
  if (terms.keep == 0.0f && !slope_of_cap && !terms.grad_bias) {
    probabilities_and_gradient<Engine>(s, grad_p, padded, lanes, factor, block, gradients);
    return gradients;
  }
  float* keep = terms.keep != 0.0f ? scratch.keep : nullptr;
  TilePlace all = place;
  all.keys = padded;
  if (keep) dropout_factors(terms, all, keep);
  if (slope_of_cap) fill_rows(slope_of_cap, lanes, t.keys, padded, 0.0f);
  terms_and_gradient<Engine>(terms, place, s, grad_p, keep, slope_of_cap, padded, factor, block, gradients);
  return gradients;
}

// One query tile of one head against the keys of `t`.
template <class Engine>
static void visit_query_tile(const BackwardTile& t, const typename Engine::BackwardKeys& keys,
                             const BackwardScratch& scratch, int64_t head, int64_t tile, bool partial) {
  using T = typename Engine::Element;
  const Problem& p = t.problem;
  const BackwardHead& lists = t.heads[head];
  const int64_t first_query = tile * t.query_tile, queries = min64(t.query_tile, t.queries - first_query);
  const int64_t lanes = round_up(queries, Engine::kLaneMultiple), index = head * t.query_tiles + tile;
  QueryBlock block;
  query_block_layout<Engine>(p, t.query_tile, t.packed_queries + index * query_block_bytes<Engine>(p, t.query_tile),
                             &block);
  const TilePlace place = {first_query, queries, lists.mask->shift, t.key_begin, t.keys, lanes};
  const auto gradients = weigh_query_tile<Engine>(t, keys, scratch, lists, place, partial, block);
  gradients.add_to_values(block.grad_out_rows, t.keys, queries, lanes, Engine::padded_dim(p.value_dim), scratch.grad_v);
  gradients.add_to_keys(block.query_rows, t.keys, queries, lanes, Engine::padded_dim(p.head_dim), scratch.grad_k);

  const int64_t* list = lists.key_runs_first + tile;
  const Turn turn = turn_of(lists.key_runs + list[0], list[1] - list[0], t.key_begin, t.key_tile);
  wait_until(t.progress + index, turn.rank);
  if (turn.rank == 0)
    keys.template add_to_queries<false>(gradients, lanes, block.grad_query);
  else
    keys.template add_to_queries<true>(gradients, lanes, block.grad_query);
  __atomic_store_n(t.progress + index, turn.rank + 1, __ATOMIC_RELEASE);
  if (turn.last) {
    T* grad_q = static_cast<T*>(t.grad_q) + head * t.grad_q_head_stride + first_query * p.head_dim;
    unpack_transposed(block.grad_query, lanes, static_cast<const float*>(nullptr), p.scale, queries, p.head_dim, grad_q,
                      p.head_dim);
  }
}

template <class Engine>
static void backward_tile(const BackwardTile& t) {
  using T = typename Engine::Element;
  typename Engine::Session session;
  (void)session;
  const Problem& p = t.problem;
  BackwardScratch scratch;
  backward_layout<Engine>(p, static_cast<char*>(t.scratch), &scratch);
  const typename Engine::BackwardKeys keys(p, t.k, t.v, t.packed_keys, t.all_keys, t.key_begin, t.keys);
  const int64_t k_columns = Engine::padded_dim(p.head_dim), v_columns = Engine::padded_dim(p.value_dim);
  memset(scratch.grad_k, 0, t.keys * k_columns * sizeof(float));
  memset(scratch.grad_v, 0, t.keys * v_columns * sizeof(float));
  for (int64_t head = 0; head < t.group; ++head) {
    const int64_t* list = t.heads[head].query_runs_first + t.key_begin / t.key_tile;
    for (int64_t i = list[0]; i < list[1]; ++i) {
      const QueryRun& run = t.heads[head].query_runs[i];
      for (int64_t tile = run.first; tile < run.last; ++tile)
        visit_query_tile<Engine>(t, keys, scratch, head, tile, run.partial);
    }
  }
  store_rows(scratch.grad_k, k_columns, p.scale, t.keys, p.head_dim, static_cast<T*>(t.grad_k));
  store_rows(scratch.grad_v, v_columns, 1.0f, t.keys, p.value_dim, static_cast<T*>(t.grad_v));
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
