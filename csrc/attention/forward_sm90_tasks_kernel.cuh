// What a block of the sm_90a forward works on: the tiles in its memory, its tasks, and the warp that copies them in.
#pragma once

#include <cstdint>

#include "attention/forward_sm90_launch.h"
#include "core/cuda/tile/barrier.cuh"
#include "core/cuda/tile/bulk_copy.cuh"

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
  cuda::prefetch_maps(p.k_map, p.q_map, p.v_map);
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

}  // namespace effkern::attention
