// The walk over query tiles of backward_sm90_keys_kernel.cuh: shared memory, tasks, and the copying warp.
#pragma once

#include <cstdint>

#include "attention/backward_sm90_launch.h"
#include "attention/forward_sm90_tasks_kernel.cuh"
#include "core/cuda/tile/barrier.cuh"
#include "core/cuda/tile/bulk_copy.cuh"

namespace effkern::attention {

template <class Shape>
struct BackwardSm90KeyMemory {
  using KeyTile = cuda::PanelTile<64, Shape::kHeadDim>;  // later the gradients
  using QueryTile = cuda::PanelTile<Shape::kQueries, Shape::kHeadDim>;
  using QueryColumns = cuda::PanelTile<Shape::kQueries, Shape::kColumns>;  // those of one part
  using GradTile = cuda::PanelTile<64, Shape::kColumns>;
  using SlopeTile = cuda::PanelTile<64, 64>;  // dS^T of a warpgroup, where dQ is added up
  using QueryRing = cuda::Ring<Shape::kStages>;
  using KeyRing = cuda::Ring<1>;
  static constexpr uint32_t kRowBytes = Shape::kQueries * 8;  // of the terms of a tile
  static constexpr uint32_t kPartBytes = query_part_floats(Shape::kHeadDim) * 4;
  static constexpr uint32_t kValuesAt = Shape::kKeyTiles * KeyTile::kBytes;
  static constexpr uint32_t kQueriesAt = 2 * kValuesAt;
  static constexpr uint32_t kGradsAt = kQueriesAt + Shape::kStages * QueryTile::kBytes;
  static constexpr uint32_t kRowsAt = kGradsAt + Shape::kStages * QueryTile::kBytes;
  static constexpr uint32_t kSlopesAt = kRowsAt + (Shape::kStages * kRowBytes + 1023) / 1024 * 1024;
  static constexpr uint32_t kSumsAt = kSlopesAt + (Shape::kAddsQueries ? 2 * Shape::kKeyTiles * SlopeTile::kBytes : 0);
  static constexpr uint32_t kRingsAt = kSumsAt + (Shape::kAddsQueries ? Shape::kGroups * kPartBytes : 0);
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
  // Two of each warpgroup's, so that one is written while the other is read.
  EFFKERN_DEVICE SlopeTile slopes(int tile, int buffer) const {
    return {start + kSlopesAt + (buffer * Shape::kKeyTiles + tile) * SlopeTile::kBytes};
  }
  EFFKERN_DEVICE uint32_t sums(int part) const { return start + kSumsAt + part * kPartBytes; }
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
  QuerySteps steps = query_steps(window_of(p.call, head), task.first_key, task.first_key + task.rows - 1, task.shift,
                                 task.queries, Shape::kQueries);
  // Rows of keys that are not there have to be hidden: nothing else keeps their exponents from overflowing.
  if (task.rows < Shape::kKeys) steps.whole = steps.whole_end = 0;
  return steps;
}

// Where a query tile of a head is added up.
EFFKERN_DEVICE float* query_sums(const BackwardSm90Params& p, const BackwardSm90KeyTask& task, int head, int tile) {
  return p.query_sums +
         ((int64_t{task.batch} * p.call.base.heads + head) * p.row_slots + task.first_slot + tile) * p.query_sums_tile;
}

// ---- the copying warp -----------------------------------------------------------------------------------------------

template <class Shape>
EFFKERN_DEVICE void copy_for_keys(const BackwardSm90Params& p, const BackwardSm90KeyMemory<Shape>& memory,
                                  const BackwardSm90KeyTask& task) {
  using Memory = BackwardSm90KeyMemory<Shape>;
  const ForwardParams& b = p.call.base;
  cuda::prefetch_maps(p.call.k_map, p.call.v_map, p.call.q_map, p.grad_out_map);
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

}  // namespace effkern::attention
