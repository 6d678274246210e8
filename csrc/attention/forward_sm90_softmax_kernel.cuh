// What happens to the scores of a warpgroup between the two products of the sm_90a forward: masks and the softmax.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/forward_sm90_tasks_kernel.cuh"
#include "core/cuda/tile/reduce.cuh"
#include "core/cuda/tile/warpgroup_mma.cuh"

namespace effkern::attention {

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

}  // namespace effkern::attention
