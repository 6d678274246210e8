// Warp-level products on mma.sync m16n8k16 with fp32 accumulation.
//
// Fragment coordinates within a warp, with g = lane / 4 and t = lane % 4:
//   a (16x16)  word 0: row g, columns 2t, 2t+1;  word 1: row g+8;  words 2, 3: the same rows, columns + 8
//   b (16x8)   word 0: rows 2t, 2t+1, column g;  word 1: rows + 8
//   c (16x8)   0, 1: row g, columns 2t, 2t+1;  2, 3: row g+8
#pragma once

#include "core/cuda/tile/copy.cuh"

namespace effkern::cuda {

// Warps are stacked along the rows, kRowBlocks * 16 each. Row in the tile, and column in its block of 8, of element e
// of a thread's first accumulator block.
template <int kRowBlocks>
constexpr Coordinate accumulator_coordinate(int thread, int e) {
  return {thread / 32 * (kRowBlocks * 16) + thread % 32 / 4 + 8 * (e / 2), 2 * (thread % 4) + e % 2};
}

// Which row and 16-byte chunk of a tile a thread points ldmatrix at, per operand:
// the first 16x16 block of the warp's rows of a row-major left operand,
template <int kRowBlocks>
constexpr Coordinate left_start(int thread) {
  return {thread / 32 * (kRowBlocks * 16) + thread % 16, thread % 32 / 16};
}
// a right operand stored with its columns as rows (keys of QK^T): 16 columns x 16 deep, so words 0, 1 are b of the
// first 8 columns and words 2, 3 of the next,
constexpr Coordinate right_transposed_start(int thread) { return {thread % 32 / 16 * 8 + thread % 8, thread / 8 % 2}; }
// and a right operand stored row-major (values of PV): 16 deep x 16 columns, in the same order, read transposed.
constexpr Coordinate right_start(int thread) { return {thread % 16, thread % 32 / 16}; }

// kRowBlocks x kColumnBlocks blocks of 16x8 accumulators of one warp.
template <int kRowBlocks, int kColumnBlocks>
struct Accumulator {
  float block[kRowBlocks][kColumnBlocks][4];

  EFFKERN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) block[i][j][e] = 0.f;
  }
};

// c += a b^T over the whole depth (the columns of both tiles). a is the warp's rows of a tile, b a whole tile.
template <class Element, class LeftTile, class RightTile, int kRowBlocks, int kColumnBlocks>
EFFKERN_DEVICE void multiply_transposed(Accumulator<kRowBlocks, kColumnBlocks>& c, LeftTile a_tile, RightTile b_tile) {
  static_assert(LeftTile::kColumns == RightTile::kColumns && RightTile::kRows == kColumnBlocks * 8);
  const LaneCursor<LeftTile> a(a_tile, left_start<kRowBlocks>(thread_index()));
  const LaneCursor<RightTile> b(b_tile, right_transposed_start(thread_index()));
#pragma unroll
  for (int depth = 0; depth < LeftTile::kChunks; depth += 2) {
    uint32_t left[kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) ldmatrix_x4(left[i], a.at(i * 16, depth));
#pragma unroll
    for (int j = 0; j < kColumnBlocks; j += 2) {
      uint32_t right[4];
      ldmatrix_x4(right, b.at(j * 8, depth));
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        mma_16x8x16(c.block[i][j], left[i], right[0], right[1], Element{});
        mma_16x8x16(c.block[i][j + 1], left[i], right[2], right[3], Element{});
      }
    }
  }
}

// A left operand held in registers: accumulators rounded to 16 bits, whose layout is already that of `a`.
template <int kRowBlocks, int kDepthBlocks>
struct LeftFragments {
  uint32_t block[kRowBlocks][kDepthBlocks][4];
};

template <class Element, int kRowBlocks, int kColumnBlocks>
EFFKERN_DEVICE LeftFragments<kRowBlocks, kColumnBlocks / 2> round_to_left(
    const Accumulator<kRowBlocks, kColumnBlocks>& c) {
  LeftFragments<kRowBlocks, kColumnBlocks / 2> left;
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      left.block[i][j / 2][j % 2 * 2] = pack(c.block[i][j][0], c.block[i][j][1], Element{});
      left.block[i][j / 2][j % 2 * 2 + 1] = pack(c.block[i][j][2], c.block[i][j][3], Element{});
    }
  return left;
}

// c += a b with a in registers and b a whole row-major tile.
template <class Element, class RightTile, int kRowBlocks, int kColumnBlocks, int kDepthBlocks>
EFFKERN_DEVICE void multiply(Accumulator<kRowBlocks, kColumnBlocks>& c,
                             const LeftFragments<kRowBlocks, kDepthBlocks>& a, RightTile b_tile) {
  static_assert(RightTile::kRows == kDepthBlocks * 16 && RightTile::kColumns == kColumnBlocks * 8);
  const LaneCursor<RightTile> b(b_tile, right_start(thread_index()));
#pragma unroll
  for (int depth = 0; depth < kDepthBlocks; ++depth) {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; j += 2) {
      uint32_t right[4];
      ldmatrix_x4_transposed(right, b.at(depth * 16, j));
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        mma_16x8x16(c.block[i][j], a.block[i][depth], right[0], right[1], Element{});
        mma_16x8x16(c.block[i][j + 1], a.block[i][depth], right[2], right[3], Element{});
      }
    }
  }
}

// Writes the warp's rows of a 16-bit tile. Each quad of lanes fills one 16-byte chunk.
template <class Element, class Tile, int kRowBlocks, int kColumnBlocks>
EFFKERN_DEVICE void store_rounded(Tile tile, const Accumulator<kRowBlocks, kColumnBlocks>& c) {
  const Coordinate own = accumulator_coordinate<kRowBlocks>(thread_index(), 0);
  const LaneCursor<Tile> cursor(tile, {own.row, 0});
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared(cursor.at(i * 16 + half * 8, j) + own.column * 2,
                     pack(c.block[i][j][2 * half], c.block[i][j][2 * half + 1], Element{}));
}

}  // namespace effkern::cuda
