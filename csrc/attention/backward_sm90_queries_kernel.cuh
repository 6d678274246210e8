// Attention backward on wgmma and the bulk copy engine (compute capability 9.0a): the gradient of the queries, without
// atomic additions.
//
// Status: unverified. No GPU has run it yet; a software model of a thread block has (tests/cuda_host).
//
// The forward's walk over key tiles (forward_sm90_tasks_kernel.cuh) and its masks, with S and dP computed again: dQ =
// scale * sum of dS K. The products with the next keys run under the last ones of a step.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/backward_sm90_launch.h"
#include "attention/forward_sm90_softmax_kernel.cuh"
#include "core/cuda/tile/barrier.cuh"
#include "core/cuda/tile/warpgroup_mma.cuh"

namespace effkern::attention {

template <class Shape>
struct BackwardSm90QueryMemory {
  using QueryTile = cuda::PanelTile<64, Shape::kHeadDim>;  // one a warpgroup; later the gradient
  using KeyTile = cuda::PanelTile<Shape::kKeys, Shape::kHeadDim>;
  using KeyRing = cuda::Ring<Shape::kKeyStages>;
  using ValueRing = cuda::Ring<Shape::kValueStages>;
  using QueryRing = cuda::Ring<1>;
  static constexpr uint32_t kGradsAt = Shape::kGroups * QueryTile::kBytes;
  static constexpr uint32_t kKeysAt = 2 * kGradsAt;
  static constexpr uint32_t kValuesAt = kKeysAt + Shape::kKeyStages * KeyTile::kBytes;
  static constexpr uint32_t kRingsAt = kValuesAt + Shape::kValueStages * KeyTile::kBytes;
  static constexpr uint32_t kBytes = kRingsAt + KeyRing::kBytes + ValueRing::kBytes + QueryRing::kBytes;
  static constexpr uint32_t kAlignment = 1024;  // of swizzled tiles; the launch asks for that much more

  uint32_t start;

  EFFKERN_DEVICE QueryTile queries(int group) const { return {start + group * QueryTile::kBytes}; }
  EFFKERN_DEVICE QueryTile grads(int group) const { return {start + kGradsAt + group * QueryTile::kBytes}; }
  EFFKERN_DEVICE KeyTile keys(const typename KeyRing::Position& at) const {
    return {start + kKeysAt + at.stage * KeyTile::kBytes};
  }
  EFFKERN_DEVICE KeyTile values(const typename ValueRing::Position& at) const {
    return {start + kValuesAt + at.stage * KeyTile::kBytes};
  }
  EFFKERN_DEVICE KeyRing key_ring() const { return {start + kRingsAt}; }
  EFFKERN_DEVICE ValueRing value_ring() const { return {start + kRingsAt + KeyRing::kBytes}; }
  EFFKERN_DEVICE QueryRing query_ring() const { return {start + kRingsAt + KeyRing::kBytes + ValueRing::kBytes}; }
};

// ---- the copying warp -----------------------------------------------------------------------------------------------

template <class Shape>
EFFKERN_DEVICE void copy_for_queries(const BackwardSm90Params& p, const BackwardSm90QueryMemory<Shape>& memory) {
  using Memory = BackwardSm90QueryMemory<Shape>;
  cuda::prefetch_maps(p.call.k_map, p.call.q_map, p.grad_out_map, p.call.v_map);
  typename Memory::KeyRing::Position key_at;
  typename Memory::ValueRing::Position value_at;
  typename Memory::QueryRing::Position query_at;
  for (int round = 0; int64_t{round} * p.call.blocks < p.call.tasks; ++round) {
    const int64_t index = task_of_round(cuda::block_index(), p.call.blocks, round);
    if (index >= p.call.tasks) continue;
    const ForwardSm90Task task = find_task<Shape>(p.call, static_cast<int>(index));
    for (int step = 0; step < task.steps.count; ++step) {
      const int token = task.key_token + task.steps.tile(step) * Shape::kKeys;
      memory.key_ring().acquire(key_at, Memory::KeyTile::kBytes);
      cuda::bulk_load(memory.keys(key_at), p.call.k_map, token, task.key_head, task.batch,
                      memory.key_ring().full(key_at));
      key_at.advance();
      if (step == 0) {  // after the first keys: those need not wait until the last gradient has left
        memory.query_ring().acquire(query_at, Memory::kKeysAt);
        const uint32_t full = memory.query_ring().full(query_at);
        for (int group = 0; group < Shape::kGroups; ++group) {
          const int query = task.query_token + task.first_query + group * 64;
          cuda::bulk_load(memory.queries(group), p.call.q_map, query, task.head, task.batch, full);
          cuda::bulk_load(memory.grads(group), p.grad_out_map, query, task.head, task.batch, full);
        }
        query_at.advance();
      }
      memory.value_ring().acquire(value_at, Memory::KeyTile::kBytes);
      cuda::bulk_load(memory.values(value_at), p.call.v_map, token, task.key_head, task.batch,
                      memory.value_ring().full(value_at));
      value_at.advance();
    }
  }
}

// ---- the computing warpgroups ---------------------------------------------------------------------------------------

template <class Element, class Shape>
struct BackwardSm90QueryConsumer {
  using Memory = BackwardSm90QueryMemory<Shape>;
  static constexpr int kFirstGroup = 1;  // names of barriers

  const BackwardSm90Params& p;
  const Memory memory;
  const int group;
  typename Memory::KeyRing::Position key_at, last_key;
  typename Memory::ValueRing::Position value_at;
  typename Memory::QueryRing::Position query_at;

  cuda::WarpgroupAccumulator<Shape::kKeys> scores, grads;  // S then P, and dP then dS
  cuda::WarpgroupFragments<Shape::kKeys / 16> slopes;
  cuda::WarpgroupAccumulator<Shape::kHeadDim> grad_q;
  float lse[2], delta[2];  // of this thread's two rows; lse in base 2

  EFFKERN_DEVICE BackwardSm90QueryConsumer(const BackwardSm90Params& params, const Memory& shared, int warpgroup)
      : p(params),
        memory(shared),
        group(warpgroup) {}

  EFFKERN_DEVICE void sync_group() const { cuda::named_barrier_sync(kFirstGroup + group, cuda::kWarpgroup); }

  EFFKERN_DEVICE void run() {
    for (int round = 0; int64_t{round} * p.call.blocks < p.call.tasks; ++round) {
      const int64_t index = task_of_round(cuda::block_index(), p.call.blocks, round);
      if (index >= p.call.tasks) continue;
      const ForwardSm90Task task = find_task<Shape>(p.call, static_cast<int>(index));
      if (task.rows == 0) continue;
      if (task.steps.count > 0)
        attend(task);
      else
        see_nothing(task);
    }
  }

  // The keys that follow a packed sequence belong to others, and 0 times NaN would be NaN.
  EFFKERN_DEVICE void clear_beyond(const ForwardSm90Task& task, typename Memory::KeyTile tile, int first_key) const {
    const int valid = task.keys - first_key;
    if (p.call.base.cu_seqlens_k == nullptr || valid >= Shape::kKeys) return;
    cuda::clear_rows(tile, valid);
    cuda::fence_shared_to_engines();
    sync_group();
  }

  template <bool kMasked>
  EFFKERN_DEVICE void step(const ForwardSm90Task& task, int index) {
    const int first_key = task.steps.tile(index) * Shape::kKeys;
    memory.key_ring().wait(key_at);
    if constexpr (kMasked) clear_beyond(task, memory.keys(key_at), first_key);
    cuda::start_transposed<Element>(scores, memory.queries(group), memory.keys(key_at));
    cuda::wgmma_wait<1>();
    finish_last(index > 0);
    memory.value_ring().wait(value_at);
    if constexpr (kMasked) clear_beyond(task, memory.values(value_at), first_key);
    cuda::start_transposed<Element>(grads, memory.grads(group), memory.values(value_at));
    cuda::wgmma_wait<1>();
    scores.pin_all();
#pragma unroll
    for (int j = 0; j < Shape::kKeys / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) scores.at(j, half, e) = scores.at(j, half, e) * p.scale_log2 - lse[half];
    if constexpr (kMasked) hide(scores, p.call, task, task.first_query + group * 64, first_key);
#pragma unroll
    for (float& score : scores.value) score = cuda::exp2_fast(score);
    // The compiler would move the wait up into the exponentials. A branch keeps it here.
    scores.pin_all();
    memory.value_ring().wait(value_at);
    cuda::wgmma_wait<0>();
    grads.pin_all();
    memory.value_ring().release(value_at);
    value_at.advance();
#pragma unroll
    for (int j = 0; j < Shape::kKeys / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) grads.at(j, half, e) = scores.at(j, half, e) * (grads.at(j, half, e) - delta[half]);
    cuda::round_to<Element>(slopes, grads);
    cuda::start_product<Element>(grad_q, slopes, memory.keys(key_at), index > 0);
    last_key = key_at;
    key_at.advance();
  }

  // The last step's product has been waited for, if there was one.
  EFFKERN_DEVICE void finish_last(bool any) {
    grad_q.pin_all();
    slopes.pin_all();
    if (any) memory.key_ring().release(last_key);
  }

  EFFKERN_DEVICE void attend(const ForwardSm90Task& task) {
    memory.query_ring().wait(query_at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group * 64 + cuda::warpgroup_coordinate(cuda::thread_index(), half, 0).row;
      const int64_t token = int64_t{task.query_token} + task.first_query + row;
      const ForwardParams& b = p.call.base;
      const float natural =
          row < task.rows
              ? b.lse[task.batch * b.lse_strides.batch + task.head * b.lse_strides.head + token * b.lse_strides.token]
              : -INFINITY;
      // A row that saw nothing has no probabilities.
      lse[half] = natural == -INFINITY ? INFINITY : natural * 1.44269504f;
      const Strides& s = p.delta_strides;
      delta[half] = row < task.rows ? p.delta[task.batch * s.batch + task.head * s.head + token * s.token] : 0.f;
    }
    const KeySteps& steps = task.steps;
    int index = 0;
    for (; index < steps.whole; ++index) step<true>(task, index);
    for (; index < steps.whole_end; ++index) step<false>(task, index);
    for (; index < steps.count; ++index) step<true>(task, index);
    cuda::wgmma_wait<0>();
    finish_last(true);
#pragma unroll
    for (float& value : grad_q.value) value *= p.scale;
    const auto tile = memory.queries(group);
    cuda::store_rounded<Element>(tile, grad_q);
    sync_group();
    cuda::copy_panels_out(tile, grad_of(task), p.grad_q_strides.token, task.rows - group * 64, p.call.base.head_dim);
    cuda::fence_shared_to_engines();  // the next queries overwrite what threads have stored
    memory.query_ring().release(query_at);
    query_at.advance();
  }

  EFFKERN_DEVICE uint16_t* grad_of(const ForwardSm90Task& task) const {
    const Strides& s = p.grad_q_strides;
    return p.grad_q + task.batch * s.batch + task.head * s.head +
           (int64_t{task.query_token} + task.first_query + group * 64) * s.token;
  }

  EFFKERN_DEVICE void see_nothing(const ForwardSm90Task& task) const {
    const int rows = at_most(task.rows - group * 64, 64), chunks = p.call.base.head_dim / 8;
    for (int i = cuda::thread_index() % cuda::kWarpgroup; i < rows * chunks; i += cuda::kWarpgroup)
      cuda::store_global(grad_of(task) + i / chunks * p.grad_q_strides.token + i % chunks * 8, cuda::Vector16{});
  }
};

template <class Element, class Shape>
EFFKERN_DEVICE void attention_backward_queries_sm90(const BackwardSm90Params& p, uint32_t shared) {
  using Memory = BackwardSm90QueryMemory<Shape>;
  const Memory memory{(shared + Memory::kAlignment - 1) / Memory::kAlignment * Memory::kAlignment};
  const int warpgroup = cuda::thread_index() / cuda::kWarpgroup;
  if (cuda::thread_index() == 0) {
    memory.key_ring().init(4 * Shape::kGroups);
    memory.value_ring().init(4 * Shape::kGroups);
    memory.query_ring().init(4 * Shape::kGroups);
    cuda::barrier_init_fence();
  }
  cuda::sync_block();
  if (warpgroup == 0) {
    cuda::give_registers<24>();
    if (cuda::thread_index() == 0) copy_for_queries<Shape>(p, memory);
  } else {
    cuda::take_registers<240>();
    BackwardSm90QueryConsumer<Element, Shape>(p, memory, warpgroup - 1).run();
  }
}

}  // namespace effkern::attention
