// Shared-memory tiles as the copy engine writes them and wgmma reads them, and copies of whole tiles.
#pragma once

#include "core/cuda/ptx_sm90.cuh"

namespace effkern::cuda {

// kRows x kColumns 16-bit elements as panels of 64 columns, or of 32 where 64 does not divide them. A panel is
// row-major; its 16-byte chunks are swizzled within 8 rows. Tiles start at multiples of 1024 bytes.
template <int kRows_, int kColumns_>
struct PanelTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPanelColumns = kColumns % 64 == 0 ? 64 : 32, kPanels = kColumns / kPanelColumns;
  static constexpr Swizzle kSwizzle = kPanelColumns == 64 ? Swizzle::k128B : Swizzle::k64B;
  static constexpr int kChunks = kPanelColumns / 8;  // of a row of a panel
  static constexpr uint32_t kRowBytes = kPanelColumns * 2, kPanelBytes = kRows * kRowBytes;
  static constexpr uint32_t kBytes = kPanels * kPanelBytes;
  static_assert(kColumns % kPanelColumns == 0 && kRows % 8 == 0 && kPanelBytes % 1024 == 0);

  uint32_t address;

  // Of the chunk that holds columns 8 chunk .. 8 chunk + 7 of the whole row.
  static constexpr uint32_t offset(int row, int chunk) {
    const int panel = chunk / kChunks, place = chunk % kChunks;
    const int swizzled = kPanelColumns == 64 ? place ^ (row & 7) : place ^ (row >> 1 & 3);
    return panel * kPanelBytes + row * kRowBytes + swizzled * 16;
  }
};

// Fetches the descriptors of copies to come, so that the first ones need not wait for theirs.
template <class... Maps>
EFFKERN_DEVICE void prefetch_maps(const Maps&... maps) {
  (prefetch_map(&maps), ...);
}

// Starts copying the tile whose first element is (row, column 0) of (head, batch); boxes of the map are one panel.
template <class Tile>
EFFKERN_DEVICE void bulk_load(Tile tile, const TensorMap& map, int row, int head, int batch, uint32_t barrier) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    bulk_load_4d(tile.address + panel * Tile::kPanelBytes, &map, panel * Tile::kPanelColumns, row, head, batch,
                 barrier);
}

// The other way, as one group of stores. What the threads wrote must be visible to the engine.
template <class Tile>
EFFKERN_DEVICE void bulk_store(Tile tile, const TensorMap& map, int row, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    bulk_store_4d(&map, panel * Tile::kPanelColumns, row, head, batch, tile.address + panel * Tile::kPanelBytes);
  bulk_commit();
}

// Makes rows [first, kRows) zero, by the threads of one warpgroup.
template <class Tile>
EFFKERN_DEVICE void clear_rows(Tile tile, int first) {
  constexpr int kRowChunks = Tile::kPanels * Tile::kChunks;
  for (int i = thread_index() % kWarpgroup; i < (Tile::kRows - first) * kRowChunks; i += kWarpgroup)
    store_shared(tile.address + Tile::offset(first + i / kRowChunks, i % kRowChunks), Vector16{});
}

// Copies the first `rows` x `columns` elements out to global memory, by the threads of one warpgroup.
template <class Tile>
EFFKERN_DEVICE void copy_panels_out(Tile tile, uint16_t* destination, int64_t row_stride, int rows, int columns) {
  constexpr int kRowChunks = Tile::kPanels * Tile::kChunks;
  for (int i = thread_index() % kWarpgroup; i < Tile::kRows * kRowChunks; i += kWarpgroup) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    if (row < rows && chunk * 8 < columns)
      store_global(destination + row * row_stride + chunk * 8, load_shared(tile.address + Tile::offset(row, chunk)));
  }
}

}  // namespace effkern::cuda
