// Products of a warpgroup on wgmma: 64 rows, operands in shared memory as PanelTile or the left one in registers.
//
// Warp w of the group has rows 16 w .. 16 w + 15; inside it fragments lie as in mma.cuh. Products are asynchronous:
// between start_* and the wait for their group neither accumulators nor fragments may be touched.
#pragma once

#include "core/cuda/tile/bulk_copy.cuh"
#include "core/cuda/tile/mma.cuh"

namespace effkern::cuda {

// 64 x kColumns accumulators: kColumns / 8 blocks of 8 columns.
template <int kColumns_>
struct WarpgroupAccumulator {
  static constexpr int kColumns = kColumns_, kBlocks = kColumns / 8;
  float value[kColumns / 2];

  EFFKERN_DEVICE float& at(int block, int half, int e) { return value[block * 4 + half * 2 + e]; }
  EFFKERN_DEVICE float at(int block, int half, int e) const { return value[block * 4 + half * 2 + e]; }
  struct Block {
    float value[4];
  };
  EFFKERN_DEVICE Block block_of(int block) const {
    return {value[block * 4], value[block * 4 + 1], value[block * 4 + 2], value[block * 4 + 3]};
  }
  EFFKERN_DEVICE void pin_all() {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) pin(value[i]);
  }
};

// Row (of 64) and column (of its block of 8) of a thread's elements at (half, e).
constexpr Coordinate warpgroup_coordinate(int thread, int half, int e) {
  return {thread % kWarpgroup / 32 * 16 + thread % 32 / 4 + 8 * half, 2 * (thread % 4) + e};
}

// Accumulators rounded to 16 bits as a left operand 16 kDepthBlocks deep.
template <int kDepthBlocks>
struct WarpgroupFragments {
  uint32_t block[kDepthBlocks][4];

  EFFKERN_DEVICE void pin_all() {
#pragma unroll
    for (int i = 0; i < kDepthBlocks; ++i)
#pragma unroll
      for (int word = 0; word < 4; ++word) pin(block[i][word]);
  }
};

template <class Element, int kColumns>
EFFKERN_DEVICE void round_to(WarpgroupFragments<kColumns / 16>& left, const WarpgroupAccumulator<kColumns>& c) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      left.block[j / 2][j % 2 * 2 + half] = pack(c.at(j, half, 0), c.at(j, half, 1), Element{});
}

// Descriptor of the 16-deep slice `step` of an operand whose rows run along the depth (q and k in q k^T).
template <class Tile>
EFFKERN_DEVICE uint64_t depth_in_rows(Tile tile, int step) {
  const int column = step * 16, panel = column / Tile::kPanelColumns;
  const uint32_t start = tile.address + panel * Tile::kPanelBytes + column % Tile::kPanelColumns * 2;
  // A panel is as deep as a swizzled row: the distance between panels is not used.
  return matrix_descriptor(start, 16, 8 * Tile::kRowBytes, Tile::kSwizzle);
}

// The same where the depth counts the rows of the tile (v in p v), from column `first` on.
template <class Tile>
EFFKERN_DEVICE uint64_t depth_in_columns(Tile tile, int step, int first = 0) {
  const uint32_t start = tile.address + first / Tile::kPanelColumns * Tile::kPanelBytes +
                         first % Tile::kPanelColumns * 2 + step * 16 * Tile::kRowBytes;
  return matrix_descriptor(start, Tile::kPanelBytes, 8 * Tile::kRowBytes, Tile::kSwizzle);
}

// Starts c = a b^T, the depth being the columns of both; commits it as one group.
template <class Element, class LeftTile, class RightTile>
EFFKERN_DEVICE void start_transposed(WarpgroupAccumulator<RightTile::kRows>& c, LeftTile a, RightTile b) {
  static_assert(LeftTile::kColumns == RightTile::kColumns && LeftTile::kRows == 64);
  c.pin_all();
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < LeftTile::kColumns / 16; ++step)
    wgmma_shared<0, 0>(c.value, depth_in_rows(a, step), depth_in_rows(b, step), step > 0, Element{});
  wgmma_commit();
}

// Starts c (+)= a b with a in registers, the depth being the rows of b; commits it as one group.
template <class Element, class RightTile>
EFFKERN_DEVICE void start_product(WarpgroupAccumulator<RightTile::kColumns>& c,
                                  WarpgroupFragments<RightTile::kRows / 16>& a, RightTile b, bool accumulate) {
  c.pin_all();
  a.pin_all();
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < RightTile::kRows / 16; ++step)
    wgmma_registers<1>(c.value, a.block[step], depth_in_columns(b, step), accumulate || step > 0, Element{});
  wgmma_commit();
}

// Writes fragments as the 64 rows of a tile.
template <class Tile>
EFFKERN_DEVICE void store_fragments(Tile tile, const WarpgroupFragments<Tile::kColumns / 16>& fragments) {
  static_assert(Tile::kRows == 64);
#pragma unroll
  for (int j = 0; j < Tile::kColumns / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Coordinate own = warpgroup_coordinate(thread_index(), half, 0);
      store_shared(tile.address + Tile::offset(own.row, j) + own.column * 2, fragments.block[j / 2][j % 2 * 2 + half]);
    }
}

// Writes the 64 rows rounded to 16 bits. Each quad of lanes fills a 16-byte chunk.
template <class Element, class Tile, int kColumns>
EFFKERN_DEVICE void store_rounded(Tile tile, const WarpgroupAccumulator<kColumns>& c) {
  static_assert(Tile::kRows == 64 && Tile::kColumns == kColumns);
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Coordinate own = warpgroup_coordinate(thread_index(), half, 0);
      store_shared(tile.address + Tile::offset(own.row, j) + own.column * 2,
                   pack(c.at(j, half, 0), c.at(j, half, 1), Element{}));
    }
}

}  // namespace effkern::cuda
