// Attention backward on wgmma and the bulk copy engine (compute capability 9.0a): gradients of keys and values.
//
// Status: unverified. No GPU has run it yet; a software model of a thread block has (tests/cuda_host).
//
// A block keeps a tile of keys and values and walks over the query tiles of all query heads of its group, so that
// nothing needs atomic additions. One warp copies, two warpgroups compute. Scores are transposed, keys along the rows:
// probabilities and their gradients stay in registers as left operands of the products that sum up dV and dK. The
// products with the next queries run under the last ones of a step, the exponentials under dP.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/backward_sm90_launch.h"
#include "attention/forward_sm90_kernel.cuh"

namespace effkern::attention {

template <class Shape>
struct BackwardSm90KeyMemory {
  using KeyTile = cuda::PanelTile<64, Shape::kHeadDim>;  // later the gradients
  using QueryTile = cuda::PanelTile<Shape::kQueries, Shape::kHeadDim>;
  using QueryColumns = cuda::PanelTile<Shape::kQueries, Shape::kColumns>;  // those of one part
  using GradTile = cuda::PanelTile<64, Shape::kColumns>;
  using QueryRing = cuda::Ring<Shape::kStages>;
  using KeyRing = cuda::Ring<1>;
  static constexpr uint32_t kRowBytes = Shape::kQueries * 8;  // of the terms of a tile
  static constexpr uint32_t kValuesAt = Shape::kKeyTiles * KeyTile::kBytes;
  static constexpr uint32_t kQueriesAt = 2 * kValuesAt;
  static constexpr uint32_t kGradsAt = kQueriesAt + Shape::kStages * QueryTile::kBytes;
  static constexpr uint32_t kRowsAt = kGradsAt + Shape::kStages * QueryTile::kBytes;
  static constexpr uint32_t kRingsAt = kRowsAt + Shape::kStages * kRowBytes;
  static constexpr uint32_t kBytes = kRingsAt + 2 * QueryRing::kBytes + KeyRing::kBytes;
  static constexpr uint32_t kAlignment = 1024;  // of swizzled tiles; the launch asks for that much more

  using Position = cuda::RingPosition<Shape::kStages>;
  uint32_t start;

  EFFKERN_DEVICE KeyTile keys(int tile) const { return {start + tile * KeyTile::kBytes}; }
  EFFKERN_DEVICE KeyTile values(int tile) const { return {start + kValuesAt + tile * KeyTile::kBytes}; }
  EFFKERN_DEVICE QueryTile queries(const Position& at) const {
    return {start + kQueriesAt + at.stage * QueryTile::kBytes};
  }
  EFFKERN_DEVICE QueryTile grads(const Position& at) const { return {start + kGradsAt + at.stage * QueryTile::kBytes}; }
  EFFKERN_DEVICE uint32_t rows(const Position& at) const { return start + kRowsAt + at.stage * kRowBytes; }
  EFFKERN_DEVICE QueryRing query_ring() const { return {start + kRingsAt}; }
  EFFKERN_DEVICE QueryRing grad_ring() const { return {start + kRingsAt + QueryRing::kBytes}; }
  EFFKERN_DEVICE KeyRing key_ring() const { return {start + kRingsAt + 2 * QueryRing::kBytes}; }
};

// One key tile.
struct BackwardSm90KeyTask {
  int batch, key_head;
  int query_token, key_token;  // of the sequence's first query and key, in the tensors
  int first_key, rows;         // of the tile, within the sequence; no rows: nothing to do
  int tile;
  int shift, queries;  // query i stands at position i + shift
  int first_slot;      // of the sequence's row terms
};

template <class Shape>
EFFKERN_DEVICE BackwardSm90KeyTask find_key_task(const BackwardSm90Params& p) {
  const ForwardParams& b = p.call.base;
  const int key_heads = b.heads / b.group;
  const Work work =
      work_of_block(cuda::block_index(), (b.cu_seqlens_k ? 1 : b.sequences) * key_heads, b.slots, b.section_rows);
  BackwardSm90KeyTask task;
  task.batch = work.row / key_heads;
  task.key_head = work.row - task.batch * key_heads;
  task.tile = b.slots - 1 - work.slot;  // the first keys come first: with a causal mask most queries see them
  task.first_slot = 0;
  Span queries{0, b.queries}, keys{0, b.keys};
  if (b.cu_seqlens_k) {
    const QueryTile found = tile_of_slot(b.cu_seqlens_k, b.sequences, task.tile, Shape::kKeys);
    queries = packed_span(b.cu_seqlens_q, found.sequence, b.queries);
    keys = packed_span(b.cu_seqlens_k, found.sequence, b.keys);
    task.tile = found.tile;
    task.first_slot = queries.begin / p.row_tile + found.sequence;
  }
  task.query_token = queries.begin;
  task.key_token = keys.begin;
  task.first_key = task.tile * Shape::kKeys;
  task.rows = task.tile < 0 ? 0 : at_least(0, at_most(keys.count - task.first_key, Shape::kKeys));
  task.queries = queries.count;
  task.shift = b.top_left ? 0 : keys.count - queries.count;
  return task;
}

template <class Shape>
EFFKERN_DEVICE QuerySteps query_steps_of(const BackwardSm90Params& p, const BackwardSm90KeyTask& task, int head) {
  const StoredLists& lists = p.call.lists;
  if (lists.entries) {
    const int line = (task.batch * lists.batch_lines + head * lists.head_lines) * p.call.base.slots + task.tile;
    return listed_query_steps(lists.entries + int64_t{line} * lists.most, lists.full[line], lists.total[line]);
  }
  return query_steps(window_of(p.call, head), task.first_key, task.first_key + task.rows - 1, task.shift, task.queries,
                     Shape::kQueries);
}

// ---- the copying warp -----------------------------------------------------------------------------------------------

template <class Shape>
EFFKERN_DEVICE void copy_for_keys(const BackwardSm90Params& p, const BackwardSm90KeyMemory<Shape>& memory,
                                  const BackwardSm90KeyTask& task) {
  using Memory = BackwardSm90KeyMemory<Shape>;
  const ForwardParams& b = p.call.base;
  const typename Memory::KeyRing::Position key_at;
  memory.key_ring().acquire(key_at, 2 * Memory::kValuesAt);
  for (int tile = 0; tile < Shape::kKeyTiles; ++tile) {
    const int token = task.key_token + task.first_key + tile * 64;
    cuda::bulk_load(memory.keys(tile), p.call.k_map, token, task.key_head, task.batch, memory.key_ring().full(key_at));
    cuda::bulk_load(memory.values(tile), p.call.v_map, token, task.key_head, task.batch,
                    memory.key_ring().full(key_at));
  }
  typename Memory::Position at;
  for (int head = task.key_head * b.group; head < (task.key_head + 1) * b.group; ++head) {
    const QuerySteps steps = query_steps_of<Shape>(p, task, head);
    const float* rows = p.rows + (int64_t{task.batch} * b.heads + head) * p.row_slots * p.row_tile * 2;
    for (int step = 0; step < steps.count; ++step) {
      const int tile = steps.tile(step), token = task.query_token + tile * Shape::kQueries;
      memory.query_ring().acquire(at, Memory::QueryTile::kBytes + Memory::kRowBytes);
      cuda::bulk_load(memory.queries(at), p.call.q_map, token, head, task.batch, memory.query_ring().full(at));
      cuda::bulk_load_bytes(memory.rows(at), rows + (int64_t{task.first_slot} + tile) * Shape::kQueries * 2,
                            Memory::kRowBytes, memory.query_ring().full(at));
      memory.grad_ring().acquire(at, Memory::QueryTile::kBytes);
      cuda::bulk_load(memory.grads(at), p.grad_out_map, token, head, task.batch, memory.grad_ring().full(at));
      at.advance();
    }
  }
}

// ---- the computing warpgroups ---------------------------------------------------------------------------------------

// Hides the queries that do not see a row's key, of the tile that begins with `first_query`.
template <int kQueries>
EFFKERN_DEVICE void hide_queries(cuda::WarpgroupAccumulator<kQueries>& scores, const BackwardSm90Params& p,
                                 const BackwardSm90KeyTask& task, int head, int first_row, int first_query) {
  const int column = cuda::warpgroup_coordinate(cuda::thread_index(), 0, 0).column;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_row + cuda::warpgroup_coordinate(cuda::thread_index(), half, 0).row;
    const SeenBy bounds = seen_by(window_of(p.call, head), key, task.shift, task.queries);
    const SeenBy here{bounds.begin - first_query - column, bounds.end - first_query - column};
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (!here.query(j * 8 + e)) scores.at(j, half, e) = -INFINITY;
  }
  const Layout& layout = p.call.layout;
  if (layout.data == nullptr) return;
  // Blocks are multiples of 16 both ways: the 16 rows of a warp are in one, and so are 16 columns.
  const int key = at_most(first_row + cuda::thread_index() % cuda::kWarpgroup / 32 * 16, p.call.base.keys - 1);
  const uint8_t* blocks = layout.data + task.batch * layout.batch + head * layout.head + key / layout.block;
#pragma unroll
  for (int j = 0; j < kQueries / 8; j += 2)
    if (blocks[at_most(first_query + j * 8, task.queries - 1) / layout.block * layout.row] == 0)
#pragma unroll
      for (int i = 0; i < 8; ++i) scores.value[j * 4 + i] = -INFINITY;
}

// A term of the two queries of a thread's columns in a block of 8.
EFFKERN_DEVICE cuda::Pair column_terms(uint32_t terms, int block) {
  return cuda::load_shared_pair(terms +
                                (block * 8 + cuda::warpgroup_coordinate(cuda::thread_index(), 0, 0).column) * 4);
}

// One warpgroup.
template <class Element, class Shape>
struct BackwardSm90KeyConsumer {
  using Memory = BackwardSm90KeyMemory<Shape>;
  static constexpr int kFirstGroup = 1, kAllGroups = kFirstGroup + Shape::kGroups;  // names of barriers

  const BackwardSm90Params& p;
  const Memory memory;
  const BackwardSm90KeyTask& task;
  const int group, key_tile, part;
  typename Memory::Position at, last;
  bool under_way = false;  // products of the step before

  cuda::WarpgroupAccumulator<Shape::kQueries> scores, grads;  // S^T then P^T, and dP^T then dS^T
  cuda::WarpgroupFragments<Shape::kQueries / 16> weights, slopes;
  cuda::WarpgroupAccumulator<Shape::kColumns> grad_k, grad_v;

  EFFKERN_DEVICE BackwardSm90KeyConsumer(const BackwardSm90Params& params, const Memory& shared,
                                         const BackwardSm90KeyTask& key_task, int warpgroup)
      : p(params),
        memory(shared),
        task(key_task),
        group(warpgroup),
        key_tile(Shape::kColumnParts == 1 ? warpgroup : 0),
        part(Shape::kColumnParts == 1 ? 0 : warpgroup) {}

  EFFKERN_DEVICE void sync_group() const { cuda::named_barrier_sync(kFirstGroup + group, cuda::kWarpgroup); }

  EFFKERN_DEVICE typename Memory::QueryColumns columns(typename Memory::QueryTile tile) const {
    return {tile.address + part * Memory::QueryColumns::kBytes};
  }

  // What follows a packed sequence belongs to others, and 0 times NaN would be NaN.
  EFFKERN_DEVICE void clear_beyond(typename Memory::QueryTile tile, int first_query) const {
    const int valid = task.queries - first_query;
    if (p.call.base.cu_seqlens_q == nullptr || valid >= Shape::kQueries) return;
    cuda::clear_rows(tile, valid);
    cuda::fence_shared_to_engines();
    sync_group();
  }

  template <bool kMasked>
  EFFKERN_DEVICE void step(int head, int tile) {
    const int first_query = tile * Shape::kQueries;
    memory.query_ring().wait(at);
    if constexpr (kMasked) clear_beyond(memory.queries(at), first_query);
    cuda::start_transposed<Element>(scores, memory.keys(key_tile), memory.queries(at));
    cuda::wgmma_wait<1>();
    finish_last();
    memory.grad_ring().wait(at);
    if constexpr (kMasked) clear_beyond(memory.grads(at), first_query);
    cuda::start_transposed<Element>(grads, memory.values(key_tile), memory.grads(at));
    cuda::wgmma_wait<1>();
    scores.pin_all();
#pragma unroll
    for (int j = 0; j < Shape::kQueries / 8; ++j) {
      const cuda::Pair lse = column_terms(memory.rows(at), j);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scores.at(j, half, 0) = scores.at(j, half, 0) * p.scale_log2 - lse.low;
        scores.at(j, half, 1) = scores.at(j, half, 1) * p.scale_log2 - lse.high;
      }
    }
    if constexpr (kMasked) hide_queries(scores, p, task, head, task.first_key + key_tile * 64, first_query);
#pragma unroll
    for (float& score : scores.value) score = cuda::exp2_fast(score);
    cuda::round_to<Element>(weights, scores);
    cuda::start_product<Element>(grad_v, weights, columns(memory.grads(at)), true);
    cuda::wgmma_wait<1>();
    grads.pin_all();
#pragma unroll
    for (int j = 0; j < Shape::kQueries / 8; ++j) {
      const cuda::Pair delta = column_terms(memory.rows(at) + Shape::kQueries * 4, j);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        grads.at(j, half, 0) = scores.at(j, half, 0) * (grads.at(j, half, 0) - delta.low);
        grads.at(j, half, 1) = scores.at(j, half, 1) * (grads.at(j, half, 1) - delta.high);
      }
    }
    cuda::round_to<Element>(slopes, grads);
    cuda::start_product<Element>(grad_k, slopes, columns(memory.queries(at)), true);
    under_way = true;
    last = at;
    at.advance();
  }

  // The last step's products have been waited for.
  EFFKERN_DEVICE void finish_last() {
    grad_k.pin_all();
    grad_v.pin_all();
    weights.pin_all();
    slopes.pin_all();
    if (!under_way) return;
    memory.query_ring().release(last);
    memory.grad_ring().release(last);
  }

  EFFKERN_DEVICE void run() {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) grad_k.value[i] = grad_v.value[i] = 0.f;
    memory.key_ring().wait({});
    const int heads = p.call.base.group;
    for (int head = task.key_head * heads; head < (task.key_head + 1) * heads; ++head) {
      const QuerySteps steps = query_steps_of<Shape>(p, task, head);
      int index = 0;
      for (; index < steps.whole; ++index) step<true>(head, steps.tile(index));
      for (; index < steps.whole_end; ++index) step<false>(head, steps.tile(index));
      for (; index < steps.count; ++index) step<true>(head, steps.tile(index));
    }
    cuda::wgmma_wait<0>();
    finish_last();
#pragma unroll
    for (float& value : grad_k.value) value *= p.scale;
    if constexpr (Shape::kColumnParts > 1)  // the other warpgroup has read the keys and values too
      cuda::named_barrier_sync(kAllGroups, Shape::kGroups * cuda::kWarpgroup);
    store(grad_v, memory.values(key_tile), p.grad_v, p.grad_v_strides, p.call.base.value_dim);
    store(grad_k, memory.keys(key_tile), p.grad_k, p.grad_k_strides, p.call.base.head_dim);
    memory.key_ring().release({});
  }

  // Through the memory of the keys or values, from which no product reads any more.
  EFFKERN_DEVICE void store(const cuda::WarpgroupAccumulator<Shape::kColumns>& sums, typename Memory::KeyTile memory_of,
                            uint16_t* destination, const Strides& s, int width) const {
    const typename Memory::GradTile tile{memory_of.address + part * Memory::GradTile::kBytes};
    cuda::store_rounded<Element>(tile, sums);
    sync_group();
    const int64_t token = int64_t{task.key_token} + task.first_key + key_tile * 64;
    cuda::copy_panels_out(
        tile, destination + task.batch * s.batch + task.key_head * s.head + token * s.token + part * Shape::kColumns,
        s.token, task.rows - key_tile * 64, width - part * Shape::kColumns);
  }
};

template <class Element, class Shape>
EFFKERN_DEVICE void attention_backward_keys_sm90(const BackwardSm90Params& p, uint32_t shared) {
  using Memory = BackwardSm90KeyMemory<Shape>;
  const Memory memory{(shared + Memory::kAlignment - 1) / Memory::kAlignment * Memory::kAlignment};
  const BackwardSm90KeyTask task = find_key_task<Shape>(p);
  if (task.rows == 0) return;
  const int warpgroup = cuda::thread_index() / cuda::kWarpgroup;
  if (cuda::thread_index() == 0) {
    memory.query_ring().init(4 * Shape::kGroups);
    memory.grad_ring().init(4 * Shape::kGroups);
    memory.key_ring().init(4 * Shape::kGroups);
    cuda::barrier_init_fence();
  }
  cuda::sync_block();
  if (warpgroup == 0) {
    cuda::give_registers<24>();
    if (cuda::thread_index() == 0) copy_for_keys<Shape>(p, memory, task);
  } else {
    cuda::take_registers<240>();
    BackwardSm90KeyConsumer<Element, Shape>(p, memory, task, warpgroup - 1).run();
  }
}

}  // namespace effkern::attention
