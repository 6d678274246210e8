// Tiles that one warp fills and reads by itself: it waits for its own copies and for no other warp.
#pragma once

#include "core/cuda/tile/mma.cuh"

namespace effkern::cuda {

// kRows x kColumns elements of 16 bits, row-major, in chunks of 16 bytes. Rows are a multiple of 64 or of 128 bytes,
// and chunk c of row r lies at place c ^ swizzle(r): in both cases 8 rows of one chunk column fall into 8 different
// groups of 4 banks.
template <int kRows_, int kColumns_>
struct WarpTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kChunks = kColumns / 8;
  static constexpr uint32_t kRowBytes = kColumns * 2, kBytes = kRows * kRowBytes;
  static_assert(kColumns % 32 == 0 && kRows % 8 == 0);

  uint32_t address;

  static constexpr int swizzle(int row) { return kColumns % 64 == 0 ? row & 7 : row >> 1 & 3; }
  static constexpr uint32_t offset(int row, int chunk) {
    return row * kRowBytes + static_cast<uint32_t>(chunk ^ swizzle(row)) * 16;
  }
};

template <int kRows, int kColumns>
struct LaneCursor<WarpTile<kRows, kColumns>> {
  using Tile = WarpTile<kRows, kColumns>;
  uint32_t row_address, chunk_bytes;

  EFFKERN_DEVICE LaneCursor(Tile tile, Coordinate start)  // the column counts chunks
      : row_address(tile.address + start.row * Tile::kRowBytes),
        chunk_bytes((start.column ^ Tile::swizzle(start.row)) * 16) {}

  EFFKERN_DEVICE uint32_t at(int rows, int chunks) const {
    return row_address + rows * Tile::kRowBytes + (chunk_bytes ^ (chunks * 16));
  }
};

// Which chunks of a tile a lane copies: in step s the (32 s + lane)-th in row-major order. After kPeriod steps the
// chunk column comes again, so that a lane needs no more than kPeriod divisions.
template <class Tile>
struct WarpSlice {
  static constexpr int kSteps = Tile::kRows * Tile::kChunks / 32;
  static constexpr int kPeriod = 32 % Tile::kChunks == 0 ? 1 : Tile::kChunks / 4;
  static constexpr int kPeriodRows = kPeriod * 32 / Tile::kChunks;
  static_assert(Tile::kRows * Tile::kChunks % 32 == 0 && kPeriod * 32 % Tile::kChunks == 0);

  static constexpr int row(int lane, int step) {
    return (step % kPeriod * 32 + lane) / Tile::kChunks + step / kPeriod * kPeriodRows;
  }
  static constexpr int chunk(int lane, int step) { return (step % kPeriod * 32 + lane) % Tile::kChunks; }
};

// Starts copying a tile. `address_of` says where a row begins; bit i of `rows` says whether row i is read. Other rows,
// and the columns from `columns` on, a multiple of 8, become zero.
template <class Tile, class AddressOf>
EFFKERN_DEVICE void copy_in_by_warp(Tile tile, uint32_t rows, int columns, const AddressOf& address_of) {
  using Slice = WarpSlice<Tile>;
  const int lane = thread_index() % 32;
  uint32_t mine[Slice::kPeriod];  // one shift a chunk column, so that each step tests a bit known to the compiler
#pragma unroll
  for (int i = 0; i < Slice::kPeriod; ++i)
    mine[i] = Slice::chunk(lane, i) * 8 < columns ? rows >> Slice::row(lane, i) : 0;
#pragma unroll
  for (int step = 0; step < Slice::kSteps; ++step) {
    const int row = Slice::row(lane, step), chunk = Slice::chunk(lane, step);
    const bool valid = (mine[step % Slice::kPeriod] & 1u << step / Slice::kPeriod * Slice::kPeriodRows) != 0;
    cp_async_16(tile.address + Tile::offset(row, chunk), address_of(row) + chunk * 16, valid);
  }
}

// The fragments of a 16-row tile as a left operand.
template <class Tile, int kDepthBlocks>
EFFKERN_DEVICE void load_left(uint32_t (&fragments)[kDepthBlocks][4], Tile tile) {
  static_assert(Tile::kRows == 16 && Tile::kColumns == kDepthBlocks * 16);
  const LaneCursor<Tile> cursor(tile, left_start<1>(thread_index() % 32));
#pragma unroll
  for (int depth = 0; depth < kDepthBlocks; ++depth) ldmatrix_x4(fragments[depth], cursor.at(0, depth * 2));
}

// c += a b^T with a in registers and b a whole tile whose rows are the columns of the product.
template <class Element, class RightTile, int kRowBlocks, int kColumnBlocks, int kDepthBlocks>
EFFKERN_DEVICE void multiply_transposed(Accumulator<kRowBlocks, kColumnBlocks>& c,
                                        const LeftFragments<kRowBlocks, kDepthBlocks>& a, RightTile b_tile) {
  static_assert(RightTile::kColumns == kDepthBlocks * 16 && RightTile::kRows == kColumnBlocks * 8);
  const LaneCursor<RightTile> b(b_tile, right_transposed_start(thread_index() % 32));
#pragma unroll
  for (int depth = 0; depth < kDepthBlocks; ++depth) {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; j += 2) {
      uint32_t right[4];
      ldmatrix_x4(right, b.at(j * 8, depth * 2));
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        mma_16x8x16(c.block[i][j], a.block[i][depth], right[0], right[1], Element{});
        mma_16x8x16(c.block[i][j + 1], a.block[i][depth], right[2], right[3], Element{});
      }
    }
  }
}

}  // namespace effkern::cuda
