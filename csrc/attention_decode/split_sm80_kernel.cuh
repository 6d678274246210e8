// Decoding on mma.sync and cp.async (compute capability 8.0 and newer): one part of the keys of a (sequence, kv head),
// against a tile of its (head, query) rows.
//
// Status: unverified. No GPU has run it yet; a software model of a thread block has (tests/cuda_host).
//
// Reading the cache is all that costs time, so the kernel is built around keeping reads under way. Each warp takes
// every kWarps-th tile of 16 keys for all rows, through a ring of its own: it waits for no other warp, and whenever it
// waits, 2 kStages - 3 further tiles of keys or values are on their way. The warps' results come together at the end.
#pragma once

#include "attention_decode/rows_kernel.cuh"
#include "core/cuda/tile/warp.cuh"

namespace effkern::attention_decode {

// One (sequence, kv head) as a block sees it.
struct KeySource {
  const char *k, *v;  // of page 0
  const int* pages;   // the sequence's line of the table, or null
  int batch, length;
  VisibleKeys keys;
};

EFFKERN_DEVICE KeySource key_source(const SplitParams& p, int unit) {
  const int batch = unit / p.kv_heads, kv_head = unit - batch * p.kv_heads;
  KeySource s;
  s.k = p.k.data + kv_head * p.k.head_stride;
  s.v = p.v.data + kv_head * p.v.head_stride;
  s.pages = p.page_table ? p.page_table + int64_t{batch} * p.table_stride : nullptr;
  s.batch = batch;
  s.length = clamped_length(p.lengths[batch], p.capacity);
  s.keys = visible_keys(s.length, p.queries, p.bands);
  return s;
}

// Where a tile lies: page and place in it, of the first key where that says it for all, else of key `lane` % 16.
struct TilePlace {
  uint32_t rows;   // bit i: key i is read
  int page, slot;  // slot -1: no tile
};

// The table may hold anything: pages that do not exist are not read.
EFFKERN_DEVICE TilePlace locate(const SplitParams& p, const KeySource& s, int first) {
  const uint32_t rows = seen_by_any(s.length, p.queries, p.bands, first);
  if (s.pages == nullptr) return {rows, s.batch, first};
  const int key = first + (p.whole_tiles ? 0 : cuda::thread_index() % kTileKeys);
  const int index = p.page_divisor.divide(key), slot = key - index * p.page_size;
  const int page = key < s.keys.end ? s.pages[index] : -1;
  const bool exists = page >= 0 && page < p.pages;
  if (p.whole_tiles) return {exists ? rows : 0, page, slot};
  return {rows & cuda::ballot(exists), page, slot};
}

template <class Tile>
EFFKERN_DEVICE void fetch(Tile tile, const SplitParams& p, const Cache& cache, const char* base, const TilePlace& place,
                          int columns) {
  const auto address = [&](int page, int slot) {
    return base + page * cache.page_stride + static_cast<uint64_t>(static_cast<uint32_t>(slot)) * cache.token_stride;
  };
  if (p.whole_tiles) {
    cuda::copy_in_by_warp(tile, place.rows, columns, address(place.page, place.slot), cache.token_stride);
  } else {
    cuda::copy_in_by_warp(tile, place.rows, columns, [&](int row) {
      return address(cuda::shuffle(place.page, row), cuda::shuffle(place.slot, row));
    });
  }
}

// The queries of a tile of rows, as a left operand, through `tile`'s memory, one tile a row block.
template <class Shape, class Tile>
EFFKERN_DEVICE void fetch_queries(Tile tile, const SplitParams& p, int unit, int first_row) {
  const int batch = unit / p.kv_heads, first_head = (unit - batch * p.kv_heads) * p.group;
  const char* base = p.q + batch * p.q_batch_stride + first_head * p.q_head_stride;
#pragma unroll
  for (int i = 0; i < Shape::kRowBlocks; ++i) {
    const int first = first_row + i * 16;
    cuda::copy_in_by_warp(Tile{tile.address + i * Tile::kBytes}, keys_below(p.rows(), first), p.head_dim,
                          [&](int in_tile) {
                            const int row = first + in_tile;
                            const int head = p.query_divisor.divide(row), query = row - head * p.queries;
                            return base + head * p.q_head_stride + query * p.q_row_stride;
                          });
  }
}

// Adds up what the warps have left in shared memory, and stores the result, or its part of it.
template <class Element, class Shape>
EFFKERN_DEVICE void store_rows(const SplitParams& p, uint32_t shared, const Work& work) {
  using cuda::Vector16;
  const int first_row = work.row_tile * Shape::kRows, chunks = p.value_dim / 8;
  const uint32_t states = shared + Shape::kValueBytes;
  for (int item = cuda::thread_index(); item < Shape::kRows * chunks; item += Shape::kThreads) {
    const int in_tile = item / chunks, chunk = item - in_tile * chunks, row = first_row + in_tile;
    if (row >= p.rows()) break;
    float tops[Shape::kWarps], totals[Shape::kWarps], top = -INFINITY, total = 0.f;
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; warp += 2) {
      const Vector16 two = cuda::load_shared(states + (in_tile * Shape::kWarps + warp) * 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        tops[warp + i] = std::bit_cast<float>(two.words[2 * i]);
        totals[warp + i] = std::bit_cast<float>(two.words[2 * i + 1]);
        top = fmaxf(top, tops[warp + i]);
      }
    }
    float values[8] = {};
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; ++warp) {
      const float share = cuda::exp2_fast(tops[warp] - (top == -INFINITY ? 0.f : top));
      total += share * totals[warp];
      const uint32_t from = shared + ((warp * Shape::kRows + in_tile) * Shape::kValueStride + chunk * 8) * 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vector16 four = cuda::load_shared(from + half * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[half * 4 + i] += share * std::bit_cast<float>(four.words[i]);
      }
    }
    if (p.splits == 1) {
      const int batch = work.unit / p.kv_heads, kv_head = work.unit - batch * p.kv_heads;
      const Finish end = finish(top, total, sink_of<Element>(p, kv_head * p.group + p.query_divisor.divide(row)));
      const int64_t line = int64_t{work.unit} * p.rows() + row;
      Vector16 packed;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed.words[i] = cuda::pack(values[2 * i] * end.factor, values[2 * i + 1] * end.factor, Element{});
      cuda::store_global(p.out + line * p.value_dim + chunk * 8, packed);
      if (chunk == 0) p.lse[line] = end.lse;
    } else {
      const int64_t line = (int64_t{work.unit} * p.splits + work.part) * p.rows() + row;
      float* to = p.values + line * p.value_dim + chunk * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector16 four;
#pragma unroll
        for (int i = 0; i < 4; ++i) four.words[i] = std::bit_cast<uint32_t>(values[half * 4 + i]);
        cuda::store_global(reinterpret_cast<uint16_t*>(to + half * 4), four);
      }
      if (chunk == 0) p.tops[line * 2] = top, p.tops[line * 2 + 1] = total;
    }
  }
}

template <class Element, int kDim, int kRowBlocks>
EFFKERN_DEVICE void attention_decode_split_sm80(const SplitParams& p, uint32_t shared) {
  using Shape = SplitShape<kDim, kRowBlocks>;
  using Tile = cuda::WarpTile<kTileKeys, kDim>;
  using namespace cuda;
  constexpr int kWarps = Shape::kWarps, kStages = Shape::kStages, kPending = 2 * kStages - 3;
  static_assert(Tile::kBytes == Shape::kTileBytes);

  const Work work = work_of_block(block_index(), p.row_tiles, p.splits);
  const KeySource source = key_source(p, work.unit);
  const TileWalk walk = tile_walk(source.keys);
  const Parts parts = parts_of(walk.count, p.splits, kWarps);
  const int end = parts.begin(work.part + 1), first_row = work.row_tile * Shape::kRows;
  int index = parts.begin(work.part);
  if (p.splits > 1 && index == end) return;  // the merge does not ask for this part

  const int warp = thread_index() / 32;
  const uint32_t ring = shared + warp * Shape::kWarpBytes;  // keys and values of each stage in turn
  const auto key_tile = [&](int stage) { return Tile{ring + stage * (2 * Tile::kBytes)}; };
  const auto value_tile = [&](int stage) { return Tile{ring + stage * (2 * Tile::kBytes) + Tile::kBytes}; };
  index += warp;
  int next = index;
  TilePlace place;
  const auto find_next = [&] {
    place = next < end ? locate(p, source, walk.tile(next) * kTileKeys) : TilePlace{0, 0, -1};
    next += kWarps;
  };
  // Empty copies and groups at the end keep the count of groups that the waits rely on.
  const auto fetch_keys = [&](int stage) {
    if (place.slot >= 0) fetch(key_tile(stage), p, p.k, source.k, place, p.head_dim);
    cp_async_commit();
  };
  const auto fetch_values = [&](int stage) {
    if (place.slot >= 0) fetch(value_tile(stage), p, p.v, source.v, place, p.value_dim);
    cp_async_commit();
  };

  LeftFragments<kRowBlocks, kDim / 16> queries;
  Accumulator<kRowBlocks, kDim / 8> out;
  out.clear();
  RowState<kRowBlocks> state;
  state.clear();
  // The queries arrive first, in the stage that is filled last.
  fetch_queries<Shape>(key_tile(kStages - 1), p, work.unit, first_row);
  cp_async_commit();
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    find_next();
    fetch_keys(stage);
    fetch_values(stage);
  }
  find_next();
  cp_async_wait<2 * (kStages - 1)>();
  sync_warp();
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
    load_left(queries.block[i], Tile{key_tile(kStages - 1).address + i * Tile::kBytes});

  int reading = 0, writing = kStages - 1;
  for (; index < end; index += kWarps) {
    cp_async_wait<kPending>();
    sync_warp();  // the keys are here; every lane is done with those before
    fetch_keys(writing);
    Accumulator<kRowBlocks, kTileKeys / 8> scores;
    scores.clear();
    multiply_transposed<Element>(scores, queries, key_tile(reading));
    to_logits(scores, p);
    const int first_key = walk.tile(index) * kTileKeys;
    if (!seen_by_all(source.length, p.queries, p.bands, first_key))
      mask_logits(scores, p, source.length, first_row, first_key);
    weigh(scores, state, out);
    cp_async_wait<kPending>();
    sync_warp();  // the values are here; every lane is done with those before
    fetch_values(writing);
    find_next();
    multiply<Element>(out, round_to_left<Element>(scores), value_tile(reading));
    reading = reading == kStages - 1 ? 0 : reading + 1;
    writing = writing == kStages - 1 ? 0 : writing + 1;
  }

  cp_async_wait<0>();
  sync_block();  // the rings have been read; their memory takes up what the warps found
  const Coordinate own = accumulator_coordinate<kRowBlocks>(thread_index() % 32, 0);
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = i * 16 + half * 8 + own.row;
      const uint32_t to = shared + ((warp * Shape::kRows + row) * Shape::kValueStride + own.column) * 4;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
        store_shared(to + j * 32, out.block[i][j][2 * half], out.block[i][j][2 * half + 1]);
      const float total = quad_sum(state.total[i][half]);
      if (own.column == 0)
        store_shared(shared + Shape::kValueBytes + (row * kWarps + warp) * 8, state.top[i][half], total);
    }
  sync_block();
  store_rows<Element, Shape>(p, shared, work);
}

}  // namespace effkern::attention_decode
