// Attention forward on wgmma and the bulk copy engine (compute capability 9.0a), in the manner of FlashAttention-3.
//
// Status: unverified. No GPU has run it yet; a software model of a thread block has (tests/cuda_host).
//
// A persistent block takes query tiles, longest first. One warp copies, two or three warpgroups compute 64 rows each.
// Scores stay in registers and, rounded to 16 bits, are the left operand of the second product. Inside a warpgroup the
// products with the next keys run under the products with the last values and under the softmax between them; among
// warpgroups turns let one's products run under the other's softmax. Steps that need a mask have a loop body of their
// own.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/forward_sm90_softmax_kernel.cuh"
#include "attention/forward_sm90_tasks_kernel.cuh"
#include "core/cuda/tile/barrier.cuh"
#include "core/cuda/tile/warpgroup_mma.cuh"

namespace effkern::attention {

// One warpgroup: all of its tasks.
template <class Element, class Shape>
struct ForwardSm90Consumer {
  using Memory = ForwardSm90Memory<Shape>;
  static constexpr int kFirstTurn = 1, kFirstGroup = kFirstTurn + Shape::kGroups;  // names of barriers
  // With 256 columns the softmax is short beside the products: turns would only hold them up.
  static constexpr bool kTurns = Shape::kHeadDim <= 128;

  const ForwardSm90Params& p;
  const Memory memory;
  const int group;
  const cuda::Turns<Shape::kGroups> turns;
  typename Memory::KeyRing::Position key_at, value_at;
  typename Memory::QueryRing::Position query_at;

  cuda::WarpgroupAccumulator<Shape::kKeys> scores;
  cuda::WarpgroupAccumulator<Shape::kHeadDim> out;
  cuda::WarpgroupFragments<Shape::kKeys / 16> weights;
  RowPair rows;

  EFFKERN_DEVICE ForwardSm90Consumer(const ForwardSm90Params& params, const Memory& shared, int warpgroup)
      : p(params),
        memory(shared),
        group(warpgroup),
        turns{kFirstTurn, warpgroup} {}

  EFFKERN_DEVICE void sync_group() const { cuda::named_barrier_sync(kFirstGroup + group, cuda::kWarpgroup); }

  EFFKERN_DEVICE void run() {
    if constexpr (kTurns) turns.begin();
    for (int round = 0; int64_t{round} * p.blocks < p.tasks; ++round) {
      const int64_t index = task_of_round(cuda::block_index(), p.blocks, round);
      if (index >= p.tasks) continue;
      const ForwardSm90Task task = find_task<Shape>(p, static_cast<int>(index));
      if (task.rows == 0) continue;
      if (task.steps.count > 0)
        attend(task);
      else
        see_nothing(task);
    }
    if constexpr (kTurns) turns.end();
  }

  // Waits for the values of a step. Those of packed sequences end in the middle of a tile, which is always the first to
  // be visited: what follows belongs to others, and 0 times NaN would be NaN.
  EFFKERN_DEVICE void wait_for_values(const ForwardSm90Task& task, int step) {
    memory.value_ring().wait(value_at);
    if (step > 0 || p.base.cu_seqlens_q == nullptr) return;
    const int valid = task.keys - task.steps.tile(0) * Shape::kKeys;
    if (valid >= Shape::kKeys) return;
    cuda::clear_rows(memory.values(value_at), valid);
    cuda::fence_shared_to_engines();
    sync_group();
  }

  template <bool kMasked>
  EFFKERN_DEVICE void prepare_weights(const ForwardSm90Task& task, int step, float (&shrink)[2]) {
    if constexpr (kMasked) hide(scores, p, task, task.first_query + group * 64, task.steps.tile(step) * Shape::kKeys);
    softmax_step(scores, rows, shrink, p.base.scale_log2);
  }

  template <bool kMasked>
  EFFKERN_DEVICE void first_step(const ForwardSm90Task& task) {
    memory.key_ring().wait(key_at);
    cuda::start_transposed<Element>(scores, memory.queries(group), memory.keys(key_at));
    cuda::wgmma_wait<0>();
    scores.pin_all();
    memory.key_ring().release(key_at);
    key_at.advance();
    float shrink[2];  // of nothing
    prepare_weights<kMasked>(task, 0, shrink);
    cuda::round_to<Element>(weights, scores);
  }

  // The keys of `step`, and the values of the step before.
  template <bool kMasked>
  EFFKERN_DEVICE void next_step(const ForwardSm90Task& task, int step) {
    memory.key_ring().wait(key_at);
    if constexpr (kTurns) turns.take();
    cuda::start_transposed<Element>(scores, memory.queries(group), memory.keys(key_at));
    wait_for_values(task, step - 1);
    cuda::start_product<Element>(out, weights, memory.values(value_at), step > 1);
    if constexpr (kTurns) turns.pass();
    cuda::wgmma_wait<1>();
    scores.pin_all();
    memory.key_ring().release(key_at);
    key_at.advance();
    float shrink[2];
    prepare_weights<kMasked>(task, step, shrink);
    // The compiler would move the wait up into the softmax. A branch keeps it here: these values have long arrived.
    scores.pin_all();
    cuda::pin(rows.sum[0]);
    cuda::pin(rows.sum[1]);
    memory.value_ring().wait(value_at);
    cuda::wgmma_wait<0>();
    out.pin_all();
    weights.pin_all();
    memory.value_ring().release(value_at);
    value_at.advance();
    scale_rows(out, shrink);
    cuda::round_to<Element>(weights, scores);
  }

  EFFKERN_DEVICE void attend(const ForwardSm90Task& task) {
    memory.query_ring().wait(query_at);
    if (p.base.negate) {
      negate_tile(memory.queries(group));
      cuda::fence_shared_to_engines();
      sync_group();
    }
    rows = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
    const KeySteps& steps = task.steps;
    if (steps.whole == 0 && steps.whole_end > 0)
      first_step<false>(task);
    else
      first_step<true>(task);
    int step = 1;
    for (; step < steps.whole; ++step) next_step<true>(task, step);
    for (; step < steps.whole_end; ++step) next_step<false>(task, step);
    for (; step < steps.count; ++step) next_step<true>(task, step);

    wait_for_values(task, steps.count - 1);
    cuda::start_product<Element>(out, weights, memory.values(value_at), steps.count > 1);
    cuda::wgmma_wait<0>();
    out.pin_all();
    memory.value_ring().release(value_at);
    value_at.advance();
    finish(task);
  }

  EFFKERN_DEVICE int64_t first_token(const ForwardSm90Task& task) const {
    return int64_t{task.query_token} + task.first_query + group * 64;
  }
  EFFKERN_DEVICE float* lse_of(const ForwardSm90Task& task) const {
    const Strides& s = p.base.lse_strides;
    return p.base.lse + task.batch * s.batch + task.head * s.head + first_token(task) * s.token;
  }
  EFFKERN_DEVICE uint16_t* out_of(const ForwardSm90Task& task) const {
    const Strides& s = p.base.out_strides;
    return p.base.out + task.batch * s.batch + task.head * s.head + first_token(task) * s.token;
  }

  // Divides by the sums and stores; the queries' memory becomes the output tile.
  EFFKERN_DEVICE void finish(const ForwardSm90Task& task) {
    const int rows_left = task.rows - group * 64;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = cuda::quad_sum(rows.sum[half]);
      inverse[half] = sum == 0.f ? 0.f : cuda::reciprocal_fast(sum);  // no key: the output is zero
      const cuda::Coordinate own = cuda::warpgroup_coordinate(cuda::thread_index(), half, 0);
      if (own.column == 0 && own.row < rows_left)
        lse_of(task)[own.row * p.base.lse_strides.token] =
            sum == 0.f ? -INFINITY : (rows.max[half] * p.base.scale_log2 + cuda::log2_fast(sum)) * 0.693147181f;
    }
    scale_rows(out, inverse);
    const auto tile = memory.queries(group);
    cuda::store_rounded<Element>(tile, out);
    if (p.base.cu_seqlens_q == nullptr) {
      cuda::fence_shared_to_engines();
      sync_group();
      if (cuda::thread_index() % cuda::kWarpgroup == 0 && rows_left > 0) {
        cuda::bulk_store(tile, p.out_map, static_cast<int>(first_token(task)), task.head, task.batch);
        cuda::bulk_wait_read<0>();
      }
      // The other warps' release says that they have read nothing since; this warp's, that the engine has read all.
    } else {  // rows that follow belong to the next sequence
      sync_group();
      cuda::copy_panels_out(tile, out_of(task), p.base.out_strides.token, rows_left, p.base.value_dim);
      cuda::fence_shared_to_engines();  // the next queries overwrite what threads have stored
    }
    memory.query_ring().release(query_at);
    query_at.advance();
  }

  EFFKERN_DEVICE void see_nothing(const ForwardSm90Task& task) const {
    const int rows_left = task.rows - group * 64, thread = cuda::thread_index() % cuda::kWarpgroup;
    for (int row = thread; row < at_most(rows_left, 64); row += cuda::kWarpgroup)
      lse_of(task)[row * p.base.lse_strides.token] = -INFINITY;
    const int chunks = p.base.value_dim / 8;
    for (int i = thread; i < at_most(rows_left, 64) * chunks; i += cuda::kWarpgroup)
      cuda::store_global(out_of(task) + i / chunks * p.base.out_strides.token + i % chunks * 8, cuda::Vector16{});
  }
};

template <class Element, class Shape>
EFFKERN_DEVICE void attention_forward_sm90(const ForwardSm90Params& p, uint32_t shared) {
  using Memory = ForwardSm90Memory<Shape>;
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
    cuda::give_registers<Shape::kGroups == 3 ? 32 : 24>();
    if (cuda::thread_index() == 0) copy_tasks<Shape>(p, memory);
  } else {
    cuda::take_registers<Shape::kGroups == 3 ? 160 : 240>();
    ForwardSm90Consumer<Element, Shape>(p, memory, warpgroup - 1).run();
  }
}

}  // namespace effkern::attention
