// What the backward needs of every query row: its lse in base 2, and delta = rowsum(dO O) - dlse.
//
// Status: unverified. No GPU has run it yet; a software model of a thread block has (tests/cuda_host).
//
// Bound by memory. Clears the workspace of dQ where there is one. The terms are written twice: by token, and for the
// copy engine in whole tiles a sequence.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/backward_sm90_launch.h"
#include "core/cuda/ptx_sm90.cuh"

namespace effkern::attention {

constexpr int kRowThreads = 256, kRowLanes = 8;  // lanes that share a row

EFFKERN_DEVICE int64_t row_of(const Strides& s, int batch, int head, int64_t token) {
  return batch * s.batch + head * s.head + token * s.token;
}

// The query tile of a block.
struct RowTile {
  int line, slot;  // of the workspace
  int batch, head;
  int64_t first_token;
  int rows;
};

EFFKERN_DEVICE RowTile find_row_tile(const BackwardSm90Params& p) {
  const ForwardParams& b = p.call.base;
  RowTile tile;
  tile.line = cuda::block_index() / p.row_slots;
  tile.slot = cuda::block_index() - tile.line * p.row_slots;
  tile.batch = tile.line / b.heads;
  tile.head = tile.line - tile.batch * b.heads;
  int index = tile.slot;
  Span queries{0, b.queries};
  if (b.cu_seqlens_q) {
    const QueryTile found = tile_of_slot(b.cu_seqlens_q, b.sequences, tile.slot, p.row_tile);
    queries = packed_span(b.cu_seqlens_q, found.sequence, b.queries);
    index = found.tile;
  }
  tile.first_token = int64_t{queries.begin} + index * p.row_tile;
  tile.rows = index < 0 ? 0 : at_least(0, at_most(queries.count - index * p.row_tile, p.row_tile));
  return tile;
}

template <class Element>
EFFKERN_DEVICE void attention_backward_rows_sm90(const BackwardSm90Params& p) {
  const ForwardParams& b = p.call.base;
  const RowTile tile = find_row_tile(p);
  if (p.query_sums) {
    float* sums = p.query_sums + (int64_t{tile.line} * p.row_slots + tile.slot) * p.query_sums_tile;
    for (int i = cuda::thread_index() * 4; i < p.query_sums_tile; i += kRowThreads * 4)
      cuda::store_global(sums + i, cuda::Vector16{});
  }
  const int lane = cuda::thread_index() % kRowLanes;
  for (int row = cuda::thread_index() / kRowLanes; row < p.row_tile; row += kRowThreads / kRowLanes) {
    const bool there = row < tile.rows;
    const int64_t token = tile.first_token + row;
    float sum = 0.f;
    if (there) {
      const uint16_t* out = b.out + row_of(b.out_strides, tile.batch, tile.head, token);
      const uint16_t* grad = p.grad_out + row_of(p.grad_out_strides, tile.batch, tile.head, token);
      for (int column = lane * 8; column < b.value_dim; column += kRowLanes * 8) {
        const cuda::Vector16 left = cuda::load_global(out + column), right = cuda::load_global(grad + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const cuda::Pair o = cuda::unpack(left.words[i], Element{}), g = cuda::unpack(right.words[i], Element{});
          sum += o.low * g.low + o.high * g.high;
        }
      }
    }
#pragma unroll
    for (int mask = 1; mask < kRowLanes; mask *= 2) sum += cuda::shuffle_xor(sum, mask);
    if (lane != 0) continue;
    float lse = INFINITY, delta = 0.f;
    if (there) {
      const float natural = b.lse[row_of(b.lse_strides, tile.batch, tile.head, token)];
      if (natural != -INFINITY) {
        lse = natural * 1.44269504f;
        delta = p.grad_lse ? sum - p.grad_lse[row_of(p.grad_lse_strides, tile.batch, tile.head, token)] : sum;
      }
      p.delta[row_of(p.delta_strides, tile.batch, tile.head, token)] = delta;
    }
    float* terms = p.rows + (int64_t{tile.line} * p.row_slots + tile.slot) * p.row_tile * 2;
    terms[row] = lse;
    terms[p.row_tile + row] = delta;
  }
}

}  // namespace effkern::attention
