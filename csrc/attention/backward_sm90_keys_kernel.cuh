// Attention backward on wgmma and the bulk copy engine (compute capability 9.0a): gradients of keys and values.
//
// Status: unverified. No GPU has run it yet; a software model of a thread block has (tests/cuda_host).
//
// A block keeps a tile of keys and values and walks over the query tiles of all query heads of its group, so that
// these gradients need no atomic additions. One warp copies, two warpgroups compute. Scores are transposed, keys along
// the rows: probabilities and their gradients stay in registers as left operands of the products that sum up dV and dK.
// The products with the next queries run under the last ones of a step, the exponentials under dP.
//
// With kAddsQueries the block also adds its part of dQ to a workspace, through shared memory and the copy engine, in no
// particular order. Without, backward_sm90_queries_kernel.cuh computes dQ and every bit repeats.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/backward_sm90_walk_kernel.cuh"
#include "core/cuda/tile/barrier.cuh"
#include "core/cuda/tile/warpgroup_mma.cuh"

namespace effkern::attention {

// Hides the queries that do not see a row's key, of the tile that begins with `first_query`.
template <int kQueries>
EFFKERN_DEVICE void hide_queries(cuda::WarpgroupAccumulator<kQueries>& scores, const BackwardSm90Params& p,
                                 const BackwardSm90KeyTask& task, int head, int first_row, int first_query) {
  const int column = cuda::warpgroup_coordinate(cuda::thread_index(), 0, 0).column;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_row + cuda::warpgroup_coordinate(cuda::thread_index(), half, 0).row;
    SeenBy bounds = seen_by(window_of(p.call, head), key, task.shift, task.queries);
    if (key >= task.first_key + task.rows) bounds.end = bounds.begin;
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
  cuda::WarpgroupAccumulator<Shape::kHeadDim / 2> grad_q;  // half of the columns of a tile
  int buffer = 0;                                          // of dS^T

  EFFKERN_DEVICE BackwardSm90KeyConsumer(const BackwardSm90Params& params, const Memory& shared,
                                         const BackwardSm90KeyTask& key_task, int warpgroup)
      : p(params),
        memory(shared),
        task(key_task),
        group(warpgroup),
        key_tile(Shape::kColumnParts == 1 ? warpgroup : 0),
        part(Shape::kColumnParts == 1 ? 0 : warpgroup) {}

  EFFKERN_DEVICE void sync_group() const { cuda::named_barrier_sync(kFirstGroup + group, cuda::kWarpgroup); }
  EFFKERN_DEVICE void sync_all() const { cuda::named_barrier_sync(kAllGroups, Shape::kGroups * cuda::kWarpgroup); }

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

  // Their part of dQ has to be zero.
  EFFKERN_DEVICE void clear_keys_beyond() const {
    const int valid = at_least(task.rows - key_tile * 64, 0);
    if (p.call.base.cu_seqlens_k == nullptr || valid >= 64) return;
    cuda::clear_rows(memory.keys(key_tile), valid);
    cuda::clear_rows(memory.values(key_tile), valid);
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
    if constexpr (Shape::kAddsQueries) {
      cuda::store_fragments(memory.slopes(key_tile, buffer), slopes);
      cuda::fence_shared_to_engines();
    }
    cuda::start_product<Element>(grad_k, slopes, columns(memory.queries(at)), true);
    if constexpr (Shape::kAddsQueries)
      add_query_part(query_sums(p, task, head, tile) + group * query_part_floats(Shape::kHeadDim));
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

  // dQ = dS K of half of the columns, over all keys of the block, added to the workspace in the order in which threads
  // hold it. Waited for at once: under the next step's products the registers do not suffice.
  EFFKERN_DEVICE void add_query_part(float* destination) {
    const int thread = cuda::thread_index() % cuda::kWarpgroup;
    if (thread == 0) cuda::bulk_wait_read<0>();
    cuda::sync_warp();
    sync_all();  // all of dS^T is there, nobody reads the other buffer any more, and the last part has left
    grad_q.pin_all();
    cuda::wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < Shape::kKeyTiles; ++tile)
#pragma unroll
      for (int step = 0; step < 4; ++step)
        cuda::wgmma_shared<1, 1>(grad_q.value, cuda::depth_in_columns(memory.slopes(tile, buffer), step),
                                 cuda::depth_in_columns(memory.keys(tile), step, group * (Shape::kHeadDim / 2)),
                                 tile + step > 0, Element{});
    cuda::wgmma_commit();
    cuda::wgmma_wait<0>();
    grad_q.pin_all();
    buffer ^= 1;
    const uint32_t sums = memory.sums(group);
#pragma unroll
    for (int j = 0; j < Shape::kHeadDim / 16; ++j)
      cuda::store_shared(sums + (j * cuda::kWarpgroup + thread) * 16,
                         std::bit_cast<cuda::Vector16>(grad_q.block_of(j)));
    cuda::fence_shared_to_engines();
    sync_group();
    if (thread == 0) {
      cuda::bulk_add(destination, sums, Memory::kPartBytes);
      cuda::bulk_commit();
    }
  }

  EFFKERN_DEVICE void run() {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) grad_k.value[i] = grad_v.value[i] = 0.f;
    memory.key_ring().wait({});
    if constexpr (Shape::kAddsQueries) clear_keys_beyond();
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
    if constexpr (Shape::kColumnParts > 1 || Shape::kAddsQueries) sync_all();  // the others have read the keys too
    store(grad_v, memory.values(key_tile), p.grad_v, p.grad_v_strides, p.call.base.value_dim);
    store(grad_k, memory.keys(key_tile), p.grad_k, p.grad_k_strides, p.call.base.head_dim);
    memory.key_ring().release({});
    if (Shape::kAddsQueries && cuda::thread_index() % cuda::kWarpgroup == 0) cuda::bulk_wait_read<0>();
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
