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

#include "attention/forward_sm90_launch.h"
#include "core/cuda/tile/barrier.cuh"
#include "core/cuda/tile/reduce.cuh"
#include "core/cuda/tile/warpgroup_mma.cuh"

namespace effkern::attention {

template <class Shape>
struct ForwardSm90Memory {
  using QueryTile = cuda::PanelTile<64, Shape::kHeadDim>;  // one a warpgroup; later its rows of the output
  using KeyTile = cuda::PanelTile<Shape::kKeys, Shape::kHeadDim>;
  using KeyRing = cuda::Ring<Shape::kStages>;
  using QueryRing = cuda::Ring<1>;
  static constexpr uint32_t kKeysAt = Shape::kGroups * QueryTile::kBytes;
  static constexpr uint32_t kValuesAt = kKeysAt + Shape::kStages * KeyTile::kBytes;
  static constexpr uint32_t kRingsAt = kValuesAt + Shape::kStages * KeyTile::kBytes;
  static constexpr uint32_t kBytes = kRingsAt + 2 * KeyRing::kBytes + QueryRing::kBytes;
  static constexpr uint32_t kAlignment = 1024;  // of swizzled tiles; the launch asks for that much more

  uint32_t start;

  EFFKERN_DEVICE QueryTile queries(int group) const { return {start + group * QueryTile::kBytes}; }
  EFFKERN_DEVICE KeyTile keys(const cuda::RingPosition<Shape::kStages>& at) const {
    return {start + kKeysAt + at.stage * KeyTile::kBytes};
  }
  EFFKERN_DEVICE KeyTile values(const cuda::RingPosition<Shape::kStages>& at) const {
    return {start + kValuesAt + at.stage * KeyTile::kBytes};
  }
  EFFKERN_DEVICE KeyRing key_ring() const { return {start + kRingsAt}; }
  EFFKERN_DEVICE KeyRing value_ring() const { return {start + kRingsAt + KeyRing::kBytes}; }
  EFFKERN_DEVICE QueryRing query_ring() const { return {start + kRingsAt + 2 * KeyRing::kBytes}; }
};

// One query tile.
struct ForwardSm90Task {
  int batch, head, key_head;
  int query_token, key_token;  // of the sequence's first query and key, in the tensors
  int first_query, rows;       // of the tile, within the sequence; no rows: nothing to do
  int shift, keys;             // query i stands at position i + shift
  KeySteps steps;
};

EFFKERN_DEVICE const Window& window_of(const ForwardSm90Params& p, int head) {
  return head >= p.base.heads / 2 ? p.second_half : p.window;
}

template <class Shape>
EFFKERN_DEVICE ForwardSm90Task find_task(const ForwardSm90Params& p, int index) {
  const ForwardParams& b = p.base;
  const Work work = work_of_block(index, (b.cu_seqlens_q ? 1 : b.sequences) * b.heads, b.slots, b.section_rows);
  ForwardSm90Task task;
  task.batch = work.row / b.heads;
  task.head = work.row - task.batch * b.heads;
  task.key_head = task.head / b.group;
  int tile = work.slot;
  Span queries{0, b.queries}, keys{0, b.keys};
  if (b.cu_seqlens_q) {
    const QueryTile found = tile_of_slot(b.cu_seqlens_q, b.sequences, work.slot, Shape::kQueries);
    queries = packed_span(b.cu_seqlens_q, found.sequence, b.queries);
    keys = packed_span(b.cu_seqlens_k, found.sequence, b.keys);
    tile = found.tile;
  }
  task.query_token = queries.begin;
  task.key_token = keys.begin;
  task.first_query = tile * Shape::kQueries;
  task.rows = tile < 0 ? 0 : at_least(0, at_most(queries.count - task.first_query, Shape::kQueries));
  task.keys = keys.count;
  task.shift = b.top_left ? 0 : keys.count - queries.count;
  if (p.lists.entries) {
    const int line = (task.batch * p.lists.batch_lines + task.head * p.lists.head_lines) * b.slots + tile;
    task.steps = listed_steps(p.lists.entries + int64_t{line} * p.lists.most, p.lists.full[line], p.lists.total[line]);
  } else {
    const Window& window = window_of(p, task.head);
    const int position = task.first_query + task.shift;
    task.steps = key_steps(seen_keys(window, position, task.keys),
                           seen_keys(window, position + at_least(task.rows, 1) - 1, task.keys), Shape::kKeys);
  }
  if (task.rows == 0) task.steps.count = 0;
  return task;
}

// ---- the copying warp -----------------------------------------------------------------------------------------------

template <class Shape>
EFFKERN_DEVICE void copy_tasks(const ForwardSm90Params& p, const ForwardSm90Memory<Shape>& memory) {
  using Memory = ForwardSm90Memory<Shape>;
  typename Memory::KeyRing::Position key_at, value_at;
  typename Memory::QueryRing::Position query_at;
  for (int round = 0;; ++round) {
    const int64_t index = task_of_round(cuda::block_index(), p.blocks, round);
    if (int64_t{round} * p.blocks >= p.tasks) break;
    if (index >= p.tasks) continue;
    const ForwardSm90Task task = find_task<Shape>(p, static_cast<int>(index));
    for (int step = 0; step < task.steps.count; ++step) {
      memory.key_ring().acquire(key_at, Memory::KeyTile::kBytes);
      cuda::bulk_load(memory.keys(key_at), p.k_map, task.key_token + task.steps.tile(step) * Shape::kKeys,
                      task.key_head, task.batch, memory.key_ring().full(key_at));
      key_at.advance();
      if (step == 0) {  // after the first keys: those need not wait until the last output has left
        memory.query_ring().acquire(query_at, Shape::kGroups * Memory::QueryTile::kBytes);
        for (int group = 0; group < Shape::kGroups; ++group)
          cuda::bulk_load(memory.queries(group), p.q_map, task.query_token + task.first_query + group * 64, task.head,
                          task.batch, memory.query_ring().full(query_at));
        query_at.advance();
      }
      memory.value_ring().acquire(value_at, Memory::KeyTile::kBytes);
      cuda::bulk_load(memory.values(value_at), p.v_map, task.key_token + task.steps.tile(step) * Shape::kKeys,
                      task.key_head, task.batch, memory.value_ring().full(value_at));
      value_at.advance();
    }
  }
}

// ---- the computing warpgroups ---------------------------------------------------------------------------------------

// Running maximum of unscaled scores, and this thread's share of the sum, of its two rows.
struct RowPair {
  float max[2], sum[2];
};

// Hides what a row may not see of the tile that begins with key `first_key`.
template <int kKeys>
EFFKERN_DEVICE void hide(cuda::WarpgroupAccumulator<kKeys>& scores, const ForwardSm90Params& p,
                         const ForwardSm90Task& task, int first_row, int first_key) {
  const int column = cuda::warpgroup_coordinate(cuda::thread_index(), 0, 0).column;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first_row + cuda::warpgroup_coordinate(cuda::thread_index(), half, 0).row;
    const SeenKeys bounds = seen_keys(window_of(p, task.head), query + task.shift, task.keys);
    const SeenKeys here{bounds.begin - first_key - column, bounds.end - first_key - column,
                        bounds.sink - first_key - column};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (!here.sees(j * 8 + e)) scores.at(j, half, e) = -INFINITY;
  }
  if (p.layout.data == nullptr) return;
  // Blocks are multiples of 16 both ways: the 16 rows of a warp are in one, and so are 16 columns.
  const int row =
      at_most(first_row + cuda::thread_index() % cuda::kWarpgroup / 32 * 16, at_least(p.base.queries - 1, 0));
  const uint8_t* blocks =
      p.layout.data + task.batch * p.layout.batch + task.head * p.layout.head + row / p.layout.block * p.layout.row;
#pragma unroll
  for (int j = 0; j < kKeys / 8; j += 2)
    if (blocks[at_most(first_key + j * 8, task.keys - 1) / p.layout.block] == 0)
#pragma unroll
      for (int i = 0; i < 8; ++i) scores.value[j * 4 + i] = -INFINITY;
}

// Turns scores into probabilities in place; `shrink` brings what was summed before to the new maximum.
template <int kKeys>
EFFKERN_DEVICE void softmax_step(cuda::WarpgroupAccumulator<kKeys>& scores, RowPair& rows, float (&shrink)[2],
                                 float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float max = rows.max[half];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) max = fmaxf(max, fmaxf(scores.at(j, half, 0), scores.at(j, half, 1)));
    max = cuda::quad_max(max);
    // A row may have seen no key yet; its exponents must then be -inf, not -inf + inf.
    const float origin = max == -INFINITY ? 0.f : max, base = origin * scale_log2;
    // The difference first: with an unchanged maximum this is exactly 1, so nothing drifts over many tiles.
    shrink[half] = cuda::exp2_fast((rows.max[half] - origin) * scale_log2);
    rows.max[half] = max;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores.at(j, half, e);
        score = cuda::exp2_fast(score * scale_log2 - base);
        sum += score;
      }
    rows.sum[half] = rows.sum[half] * shrink[half] + sum;
  }
}

template <int kColumns>
EFFKERN_DEVICE void scale_rows(cuda::WarpgroupAccumulator<kColumns>& c, const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 2; ++e) c.at(j, half, e) *= factor[half];
}

// Flips the signs of the warpgroup's queries.
template <class Tile>
EFFKERN_DEVICE void negate_tile(Tile tile) {
  for (uint32_t at = cuda::thread_index() % cuda::kWarpgroup * 16; at < Tile::kBytes; at += cuda::kWarpgroup * 16) {
    cuda::Vector16 chunk = cuda::load_shared(tile.address + at);
    for (uint32_t& word : chunk.words) word ^= 0x80008000u;
    cuda::store_shared(tile.address + at, chunk);
  }
}

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
