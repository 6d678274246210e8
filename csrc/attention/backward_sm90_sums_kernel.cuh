// Rounds dQ where backward_sm90_keys_kernel.cuh has added it up: scale * sums, from the order of registers to rows.
//
// Status: unverified. No GPU has run it yet; a software model of a thread block has (tests/cuda_host).
#pragma once

#include <cstdint>

#include "attention/backward_sm90_rows_kernel.cuh"
#include "core/cuda/tile/warpgroup_mma.cuh"

namespace effkern::attention {

// Grid and threads of the row terms. Neighbouring threads write neighbouring 16 bytes of a row.
template <class Element, int kHeadDim>
EFFKERN_DEVICE void attention_backward_sums_sm90(const BackwardSm90Params& p) {
  const ForwardParams& b = p.call.base;
  const RowTile tile = find_row_tile(p);
  const float* sums = p.query_sums + (int64_t{tile.line} * p.row_slots + tile.slot) * p.query_sums_tile;
  constexpr int kHalf = kHeadDim / 2;
  const int chunks = b.head_dim / 8;
  for (int i = cuda::thread_index(); i < tile.rows * chunks; i += kRowThreads) {
    const int row = i / chunks, column = i % chunks * 8;
    // The quad of lanes that held the row's block of 8 columns, two each.
    const int lane = row / 16 * 32 + row % 8 * 4, half = row % 16 / 8;
    const float* quad = sums + column / kHalf * query_part_floats(kHeadDim) +
                        (column % kHalf / 8 * cuda::kWarpgroup + lane) * 4 + half * 2;
    cuda::Vector16 rounded;
#pragma unroll
    for (int word = 0; word < 4; ++word)
      rounded.words[word] = cuda::pack(quad[word * 4] * p.scale, quad[word * 4 + 1] * p.scale, Element{});
    cuda::store_global(p.grad_q + row_of(p.grad_q_strides, tile.batch, tile.head, tile.first_token + row) + column,
                       rounded);
  }
}

}  // namespace effkern::attention
