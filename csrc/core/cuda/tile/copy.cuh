// Shared-memory tiles of 16-bit elements, and copies between them and global memory.
#pragma once

#include <bit>

#include "core/cuda/ptx.cuh"

namespace effkern::cuda {

// kRows x kColumns elements, row-major, in chunks of 16 bytes. Chunk c of row r lies at place c ^ (r % 8) of its row,
// so the 8 rows of one ldmatrix phase fall into 8 different groups of 4 banks although their chunk index is equal.
template <int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kChunks = kColumns / 8;
  static constexpr uint32_t kRowBytes = kColumns * 2, kBytes = kRows * kRowBytes;
  static_assert(kColumns % 64 == 0, "the swizzle permutes 8 chunks of a row");

  uint32_t address;

  static constexpr uint32_t offset(int row, int chunk) {
    return row * kRowBytes + static_cast<uint32_t>(chunk ^ (row & 7)) * 16;
  }
};

struct Coordinate {
  int row, column;
};

// Where one lane reads or writes a tile, as a start and compile-time steps from it: with the step's rows a multiple of
// 8 and its chunks even, stepping is one exclusive or and an immediate offset.
template <class Tile>
struct LaneCursor {
  uint32_t row_address, chunk_bytes;

  EFFKERN_DEVICE LaneCursor(Tile tile, Coordinate start)  // the column counts chunks
      : row_address(tile.address + start.row * Tile::kRowBytes),
        chunk_bytes((start.column ^ (start.row & 7)) * 16) {}

  // `chunks` must have no bit in common with the starting chunk.
  EFFKERN_DEVICE uint32_t at(int rows, int chunks) const {
    return row_address + rows * Tile::kRowBytes + (chunk_bytes ^ (chunks * 16));
  }
};

// The part of a tile that one thread copies: one chunk column, every kRowStep-th row.
template <class Tile, int kThreads>
struct CopySlice {
  static constexpr int kRowStep = kThreads / Tile::kChunks, kSteps = Tile::kRows / kRowStep;
  static_assert(kRowStep % 8 == 0 && Tile::kRows % kRowStep == 0, "steps keep the swizzle");

  static constexpr int first_row(int thread) { return thread / Tile::kChunks; }
  static constexpr int chunk(int thread) { return thread % Tile::kChunks; }
  static constexpr uint32_t offset(int thread, int step) {
    return Tile::offset(first_row(thread), chunk(thread)) + step * kRowStep * Tile::kRowBytes;
  }
};

// Starts copying `rows` x `columns` elements into a tile; the rest of the tile becomes zero. `columns` is a multiple
// of 8, `row_stride` counts elements.
template <int kThreads, class Tile>
EFFKERN_DEVICE void copy_in(Tile tile, const uint16_t* source, int64_t row_stride, int rows, int columns) {
  using Slice = CopySlice<Tile, kThreads>;
  const int thread = thread_index(), row = Slice::first_row(thread), column = Slice::chunk(thread) * 8;
  const int rows_left = column < columns ? rows - row : 0;
  const uint16_t* from = source + row * row_stride + column;
#pragma unroll
  for (int step = 0; step < Slice::kSteps; ++step) {
    cp_async_16(tile.address + Slice::offset(thread, step), from, step * Slice::kRowStep < rows_left);
    from += Slice::kRowStep * row_stride;
  }
}

// Copies the first `rows` x `columns` elements of a tile out to global memory.
template <int kThreads, class Tile>
EFFKERN_DEVICE void copy_out(Tile tile, uint16_t* destination, int64_t row_stride, int rows, int columns) {
  using Slice = CopySlice<Tile, kThreads>;
  const int thread = thread_index(), row = Slice::first_row(thread), column = Slice::chunk(thread) * 8;
  const int rows_left = column < columns ? rows - row : 0;
  uint16_t* to = destination + row * row_stride + column;
#pragma unroll
  for (int step = 0; step < Slice::kSteps; ++step) {
    if (step * Slice::kRowStep < rows_left) store_global(to, load_shared(tile.address + Slice::offset(thread, step)));
    to += Slice::kRowStep * row_stride;
  }
}

// A value in shared memory that the whole block reads, in place of registers held over a loop.
template <class Value>
struct SharedValue {
  static constexpr int kVectors = sizeof(Value) / 16;
  static_assert(sizeof(Value) % 16 == 0);
  struct Vectors {
    Vector16 vector[kVectors];
  };

  uint32_t address;

  EFFKERN_DEVICE void store(const Value& value) const {
    const auto vectors = std::bit_cast<Vectors>(value);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) store_shared(address + i * 16, vectors.vector[i]);
  }

  EFFKERN_DEVICE Value load() const {
    Vectors vectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors.vector[i] = load_shared(address + i * 16);
    return std::bit_cast<Value>(vectors);
  }
};

// Flips the sign of the elements that this thread copied in itself and has waited for.
template <int kThreads, class Tile>
EFFKERN_DEVICE void negate_copied(Tile tile) {
  using Slice = CopySlice<Tile, kThreads>;
#pragma unroll
  for (int step = 0; step < Slice::kSteps; ++step) {
    const uint32_t address = tile.address + Slice::offset(thread_index(), step);
    Vector16 chunk = load_shared(address);
    for (uint32_t& word : chunk.words) word ^= 0x80008000u;
    store_shared(address, chunk);
  }
}

}  // namespace effkern::cuda
