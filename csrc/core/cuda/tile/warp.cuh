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

// Which chunks of a tile a lane copies: in step s the (32 s + lane)-th in row-major order. Its first kPeriod chunks are
// in columns of their own; then the same columns come again, kPeriodRows further down.
template <class Tile>
struct WarpSlice {
  static constexpr int kPeriod = 32 % Tile::kChunks == 0 ? 1 : Tile::kChunks / 4;
  static constexpr int kPeriodRows = kPeriod * 32 / Tile::kChunks, kPeriods = Tile::kRows / kPeriodRows;
  static_assert(kPeriod * 32 % Tile::kChunks == 0 && Tile::kRows % kPeriodRows == 0);

  static constexpr int row(int lane, int i) { return (i * 32 + lane) / Tile::kChunks; }
  static constexpr int chunk(int lane, int i) { return (i * 32 + lane) % Tile::kChunks; }
  // Rows further down are an exclusive or and an immediate offset away, since tiles begin on multiples of 128 bytes.
  static constexpr uint32_t below(uint32_t address, int periods) {
    const int rows = periods * kPeriodRows;
    return (address ^ Tile::swizzle(rows) * 16) + rows * Tile::kRowBytes;
  }
};

// Starts copying a tile. `address_of(row)` says where a row begins; bit r of `rows` says whether row r is read. Other
// rows, and the columns from `columns` on, a multiple of 8, become zero.
template <class Tile, class AddressOf>
EFFKERN_DEVICE void copy_in_by_warp(Tile tile, uint32_t rows, int columns, const AddressOf& address_of) {
  using Slice = WarpSlice<Tile>;
  const int lane = thread_index() % 32;
#pragma unroll
  for (int i = 0; i < Slice::kPeriod; ++i) {
    const int row = Slice::row(lane, i), chunk = Slice::chunk(lane, i);
    const uint32_t to = tile.address + Tile::offset(row, chunk), mine = chunk * 8 < columns ? rows >> row : 0;
#pragma unroll
    for (int periods = 0; periods < Slice::kPeriods; ++periods)
      cp_async_16(Slice::below(to, periods), address_of(row + periods * Slice::kPeriodRows) + chunk * 16,
                  (mine & 1u << periods * Slice::kPeriodRows) != 0);
  }
}

// The same of rows `stride` bytes apart.
template <class Tile>
EFFKERN_DEVICE void copy_in_by_warp(Tile tile, uint32_t rows, int columns, const char* first, uint32_t stride) {
  using Slice = WarpSlice<Tile>;
  const int lane = thread_index() % 32;
#pragma unroll
  for (int i = 0; i < Slice::kPeriod; ++i) {
    const int row = Slice::row(lane, i), chunk = Slice::chunk(lane, i);
    const uint32_t to = tile.address + Tile::offset(row, chunk), mine = chunk * 8 < columns ? rows >> row : 0;
    const char* from = opaque(first + uint64_t{static_cast<uint32_t>(row)} * stride + chunk * 16);
#pragma unroll
    for (int periods = 0; periods < Slice::kPeriods; ++periods) {
      cp_async_16(Slice::below(to, periods), from, (mine & 1u << periods * Slice::kPeriodRows) != 0);
      from += uint64_t{Slice::kPeriodRows} * stride;
    }
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
