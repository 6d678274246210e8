// Attention forward on mma.sync and cp.async (compute capability 8.0 and newer), in the manner of FlashAttention-2.
//
// Status: unverified. No GPU has run it yet; a software model of a thread block has (tests/cuda_host).
//
// One block computes 128 queries of one head: 4 warps of 32 rows, each row's softmax inside one quad of lanes. Scores
// stay in registers and, rounded to 16 bits, are the left operand of the second product. Keys and values have one
// buffer each and take turns: while a tile's scores are computed its values arrive, while those are used the next keys
// do. 64 keys a tile are what the registers hold beside the output without spilling.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/forward_launch.h"
#include "core/cuda/tile/copy.cuh"
#include "core/cuda/tile/mma.cuh"
#include "core/cuda/tile/reduce.cuh"

namespace effkern::attention {

// The keys of one block's queries. It lives in shared memory while the accumulators take up the registers.
struct KeyWalk {
  const uint16_t *k, *v;  // the sequence's first key
  Visible visible;        // counted from the block's first query
  KeyTiles tiles;
};

template <int kHeadDim, int kValueDim>
struct ForwardShape {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr int kRowBlocks = 2;  // of 16 rows a warp: each fragment of k and v is used twice
  static constexpr int kQueries = kWarps * kRowBlocks * 16;
  static constexpr int kKeys = 64;
  using QueryTile = cuda::SharedTile<kQueries, kHeadDim>;
  using KeyTile = cuda::SharedTile<kKeys, kHeadDim>;
  using ValueTile = cuda::SharedTile<kKeys, kValueDim>;
  using OutTile = cuda::SharedTile<kQueries, kValueDim>;  // reuses the others' memory at the end
  static constexpr uint32_t kTileBytes = QueryTile::kBytes + KeyTile::kBytes + ValueTile::kBytes;
  static_assert(OutTile::kBytes <= kTileBytes);
  static constexpr uint32_t kSharedBytes = kTileBytes + sizeof(KeyWalk);
};

// Running maximum (of unscaled scores) and sum of one warp's rows; the sum is this lane's share until the end.
template <int kRowBlocks>
struct RowState {
  float max[kRowBlocks][2], sum[kRowBlocks][2];
};

// Hides what a row may not see: the scores from its key bound on.
template <int kRowBlocks, int kKeyBlocks>
EFFKERN_DEVICE void mask_scores(cuda::Accumulator<kRowBlocks, kKeyBlocks>& scores, const Visible& visible,
                                int first_key) {
  const cuda::Coordinate own = cuda::accumulator_coordinate<kRowBlocks>(cuda::thread_index(), 0);
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int end = visible.end(i * 16 + half * 8 + own.row) - first_key - own.column;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (j * 8 + e >= end) scores.block[i][j][2 * half + e] = -INFINITY;
    }
}

// Turns scores into probabilities in place and brings the sum and the output to the new maximum.
template <int kRowBlocks, int kKeyBlocks, int kValueBlocks>
EFFKERN_DEVICE void online_softmax(cuda::Accumulator<kRowBlocks, kKeyBlocks>& scores, RowState<kRowBlocks>& state,
                                   cuda::Accumulator<kRowBlocks, kValueBlocks>& out, float scale_log2) {
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = state.max[i][half];
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j)
        max = fmaxf(max, fmaxf(scores.block[i][j][2 * half], scores.block[i][j][2 * half + 1]));
      max = cuda::quad_max(max);
      // A row may have seen no key yet; its exponents must then be -inf, not -inf + inf.
      const float origin = max == -INFINITY ? 0.f : max, base = origin * scale_log2;
      // The difference first: with an unchanged maximum this is exactly 1, so nothing drifts over many tiles.
      const float shrink = cuda::exp2_fast((state.max[i][half] - origin) * scale_log2);
      state.max[i][half] = max;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores.block[i][j][2 * half + e];
          score = cuda::exp2_fast(score * scale_log2 - base);
          sum += score;
        }
      state.sum[i][half] = state.sum[i][half] * shrink + sum;
#pragma unroll
      for (int j = 0; j < kValueBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) out.block[i][j][2 * half + e] *= shrink;
    }
  }
}

// What one block works on; pointers are to its first query.
struct BlockTask {
  const uint16_t* q;
  uint16_t* out;
  float* lse;
  int rows;  // <= 0: nothing to do
  KeyWalk walk;
};

EFFKERN_DEVICE int64_t offset(const Strides& s, int batch, int head, int64_t token) {
  return batch * s.batch + head * s.head + token * s.token;
}

EFFKERN_DEVICE BlockTask locate(const ForwardParams& p, int tile_rows, int tile_keys) {
  const Work work =
      work_of_block(cuda::block_index(), (p.cu_seqlens_q ? 1 : p.sequences) * p.heads, p.slots, p.section_rows);
  const int batch = work.row / p.heads, head = work.row - batch * p.heads, key_head = head / p.group;
  int tile = work.slot;
  Span queries{0, p.queries}, keys{0, p.keys};
  if (p.cu_seqlens_q) {
    const QueryTile found = tile_of_slot(p.cu_seqlens_q, p.sequences, work.slot, tile_rows);
    queries = packed_span(p.cu_seqlens_q, found.sequence, p.queries);
    keys = packed_span(p.cu_seqlens_k, found.sequence, p.keys);
    tile = found.tile;
  }
  BlockTask task;
  const int first_query = tile * tile_rows;
  const int rows_left = tile < 0 ? 0 : queries.count - first_query;
  task.rows = rows_left < tile_rows ? rows_left : tile_rows;
  task.walk.visible = visible_keys(queries.count, keys.count, p.causal, p.top_left).from(first_query);
  task.walk.tiles = key_tiles(task.walk.visible, task.rows, tile_keys);
  const int64_t query_token = static_cast<int64_t>(queries.begin) + first_query;
  task.q = p.q + offset(p.q_strides, batch, head, query_token);
  task.walk.k = p.k + offset(p.k_strides, batch, key_head, keys.begin);
  task.walk.v = p.v + offset(p.v_strides, batch, key_head, keys.begin);
  task.out = p.out + offset(p.out_strides, batch, head, query_token);
  task.lse = p.lse + offset(p.lse_strides, batch, head, query_token);
  return task;
}

template <class Element, int kHeadDim, int kValueDim>
EFFKERN_DEVICE void attention_forward_sm80(const ForwardParams& p, uint32_t shared) {
  using Shape = ForwardShape<kHeadDim, kValueDim>;
  using namespace cuda;
  constexpr int kRowBlocks = Shape::kRowBlocks, kThreads = Shape::kThreads;

  const BlockTask task = locate(p, Shape::kQueries, Shape::kKeys);
  if (task.rows <= 0) return;

  const typename Shape::QueryTile query_tile{shared};
  const typename Shape::KeyTile key_tile{query_tile.address + Shape::QueryTile::kBytes};
  const typename Shape::ValueTile value_tile{key_tile.address + Shape::KeyTile::kBytes};
  const SharedValue<KeyWalk> shared_walk{shared + Shape::kTileBytes};
  const auto fetch_keys = [&](const KeyWalk& walk, int tile) {
    const int first = tile * Shape::kKeys;
    copy_in<kThreads>(key_tile, walk.k + first * p.k_strides.token, p.k_strides.token, walk.visible.keys - first,
                      p.head_dim);
    cp_async_commit();
  };
  const auto fetch_values = [&](const KeyWalk& walk, int tile) {
    const int first = tile * Shape::kKeys;
    copy_in<kThreads>(value_tile, walk.v + first * p.v_strides.token, p.v_strides.token, walk.visible.keys - first,
                      p.value_dim);
    cp_async_commit();
  };

  Accumulator<kRowBlocks, kValueDim / 8> out;
  out.clear();
  RowState<kRowBlocks> state;
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) state.max[i][half] = -INFINITY, state.sum[i][half] = 0.f;

  if (task.walk.tiles.all > 0) {
    if (thread_index() == 0) shared_walk.store(task.walk);
    copy_in<kThreads>(query_tile, task.q, p.q_strides.token, task.rows, p.head_dim);
    if (p.negate) {
      cp_async_commit();
      cp_async_wait<0>();
      negate_copied<kThreads>(query_tile);
    }
    fetch_keys(task.walk, task.walk.tiles.all - 1);
    for (int tile = task.walk.tiles.all - 1; tile >= 0; --tile) {
      cp_async_wait<0>();
      sync_block();  // keys are here; everyone is done with the previous values
      const KeyWalk walk = shared_walk.load();
      fetch_values(walk, tile);
      Accumulator<kRowBlocks, Shape::kKeys / 8> scores;
      scores.clear();
      multiply_transposed<Element>(scores, query_tile, key_tile);
      if (tile >= walk.tiles.full) mask_scores(scores, walk.visible, tile * Shape::kKeys);
      online_softmax(scores, state, out, p.scale_log2);
      const auto weights = round_to_left<Element>(scores);  // before the wait: they take half the registers of scores
      cp_async_wait<0>();
      sync_block();  // values are here; everyone is done with the keys
      if (tile > 0) fetch_keys(shared_walk.load(), tile - 1);
      multiply<Element>(out, weights, value_tile);
    }
  }

  const BlockTask result =
      locate(p, Shape::kQueries, Shape::kKeys);  // found again, which spares the loop its registers
  const Coordinate own = accumulator_coordinate<kRowBlocks>(thread_index(), 0);
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(state.sum[i][half]);
      const float inverse = sum == 0.f ? 0.f : reciprocal_fast(sum);  // no key: the output is zero
#pragma unroll
      for (int j = 0; j < kValueDim / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) out.block[i][j][2 * half + e] *= inverse;
      const int row = i * 16 + half * 8 + own.row;
      if (own.column == 0 && row < result.rows)
        result.lse[row * p.lse_strides.token] =
            sum == 0.f ? -INFINITY : (state.max[i][half] * p.scale_log2 + log2_fast(sum)) * 0.693147181f;
    }

  sync_block();  // the inputs have been read; their memory becomes the output tile
  const typename Shape::OutTile out_tile{shared};
  store_rounded<Element>(out_tile, out);
  sync_block();
  copy_out<kThreads>(out_tile, result.out, p.out_strides.token, result.rows, p.value_dim);
}

}  // namespace effkern::attention
