// What the launch of the GPU decode kernels is described by, what they support, and into how many parts they split the
// keys. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention_decode/schedule_kernel.cuh"

namespace effkern::attention_decode {

// What the kernels support; effkern._host hands it to the dispatcher, which refuses the rest with a reason.
struct Features {
  static constexpr int kMinCapability = 80;
  static constexpr int kMaxDim = 256, kDimStep = 8;   // rows of 16 bytes
  static constexpr int kDims[] = {64, 96, 128, 256};  // of the instances; others take the next larger one
};

constexpr int instance_dim(int64_t head_dim, int64_t value_dim) {
  const int64_t dim = std::max(head_dim, value_dim);
  for (int candidate : Features::kDims)
    if (dim <= candidate) return candidate;
  return 0;
}

// Shape of the instance for head dims up to kDim and tiles of 16 kRowBlocks rows, a row being a (head, query) pair.
template <int kDim_, int kRowBlocks_>
struct SplitShape {
  static constexpr int kDim = kDim_, kRowBlocks = kRowBlocks_, kRows = 16 * kRowBlocks;
  // As many stages as fit twice into an H100's and once into an A10's or L4's 99 KiB, and registers for one output.
  static constexpr int kWarps = kDim > 128 ? 2 : 4, kThreads = kWarps * 32;
  static constexpr int kStages = kDim > 96 ? 3 : 4;
  static constexpr uint32_t kTileBytes = kTileKeys * kDim * 2;      // of keys or of values
  static constexpr uint32_t kWarpBytes = 2 * kStages * kTileBytes;  // ring of one warp
  static constexpr int kValueStride = kDim + 8;                     // in floats: quads of lanes hit different banks
  static constexpr uint32_t kValueBytes = kWarps * kRows * kValueStride * 4;
  static constexpr uint32_t kSharedBytes = kWarps * kWarpBytes;
  static_assert(kSharedBytes <= 99 << 10);
  static_assert(kValueBytes + kRows * kWarps * 8 <= kSharedBytes, "at the end the ring holds what the warps found");
};

struct MergeShape {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr uint32_t kSharedBytes = kWarps * Features::kMaxDim * 4;
};

constexpr int row_blocks(int dim, int64_t rows) { return dim <= 128 && rows > 16 ? 2 : 1; }

// Strides count bytes. A contiguous cache has one page a sequence.
struct Cache {
  const char* data;
  int64_t page_stride, head_stride;
  uint32_t token_stride;
};

struct SplitParams {
  const char* q;
  int64_t q_batch_stride, q_head_stride, q_row_stride;  // in bytes
  Cache k, v;
  const int *lengths, *page_table;  // no page table: contiguous
  const void* sinks;                // per query head, or null
  uint16_t* out;                    // (batch, heads, queries, value_dim)
  float *lse, *values, *tops;       // values and tops: partial results, where there is more than one part
  Divisor page_divisor, query_divisor;
  int kv_heads, group, queries, capacity;
  int pages, page_size, table_stride;
  bool whole_tiles;  // the keys of a tile lie in one page
  bool sinks_fp32;
  int head_dim, value_dim;  // multiples of 8
  int row_tiles, splits, warps;
  float factor, cap_log2;  // logits in base 2: factor s, or with a cap: cap_log2 tanh(factor s)
  Bands bands;

  constexpr int rows() const { return group * queries; }
};

inline void set_scores(SplitParams& p, double scale, double softcap) {
  constexpr double kLog2e = 1.4426950408889634, kMost = std::numeric_limits<float>::max();
  p.cap_log2 = static_cast<float>(std::min(softcap * kLog2e, kMost));
  p.factor = static_cast<float>(std::clamp(softcap > 0 ? scale / softcap : scale * kLog2e, -kMost, kMost));
}

// Triples (left, right, sink); false where they are too many.
inline bool set_bands(SplitParams& p, const int64_t* bands, size_t count) {
  const auto clamped = [](int64_t n) { return static_cast<int>(std::clamp<int64_t>(n, -kMostKeys, kMostKeys)); };
  p.bands = {};
  for (size_t i = 0; i + 2 < count; i += 3) {
    p.bands.reach = std::min(p.bands.reach, clamped(bands[i + 1]));
    if (clamped(bands[i]) == kMostKeys) continue;  // a window without a left end hides nothing more
    if (p.bands.count == kMaxBands) return false;
    p.bands.left[p.bands.count] = clamped(bands[i]);
    p.bands.sink[p.bands.count++] = clamped(bands[i + 2]);
  }
  return true;
}

inline void set_pages(SplitParams& p, int pages, int page_size) {
  p.pages = pages;
  p.page_size = page_size;
  p.page_divisor = divisor(std::max(page_size, 1));
  p.whole_tiles = p.page_table == nullptr || page_size % kTileKeys == 0;
}

// Most tiles that a sequence can have: the whole capacity, or sinks and window, with what the ends of tiles add.
constexpr int most_tiles(int capacity, int queries, const Bands& bands) {
  int64_t sinks = 0, keys = capacity;
  for (int i = 0; i < bands.count; ++i) sinks = std::max<int64_t>(sinks, bands.sink[i]);
  for (int i = 0; i < bands.count; ++i)
    keys = std::min(keys, std::max<int64_t>(bands.left[i], 0) + queries + sinks + 2 * kTileKeys);
  return static_cast<int>((keys + kTileKeys - 1) / kTileKeys);
}

// Estimated time of a split, in turns: per wave of blocks the turns of a part and one to fill the pipeline; with more
// than one part another to write the partial results and to read them again, and about two for the second launch.
constexpr int64_t split_cost(int64_t splits, int64_t waves, int64_t turns) {
  return splits == 1 ? waves * (turns + 1) : waves * ((turns + splits - 1) / splits + 2) + 2;
}

// Into how many parts the keys are split. `blocks` thread blocks work on each part, `slots` run at a time; a block
// takes `warps` tiles a turn, and there are at most `tiles`. For each number of waves the best is as many parts as fit,
// or fewer of the same length.
constexpr int plan_splits(int64_t blocks, int64_t slots, int tiles, int warps) {
  constexpr int64_t kMostWaves = 4;  // every part costs its share of start and merge: more never paid in the estimate
  const int64_t turns = (tiles + warps - 1) / warps;
  if (blocks < 1 || slots < 1 || turns < 2) return 1;
  int64_t best = 1, least = split_cost(1, (blocks + slots - 1) / slots, turns);
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t most = std::min(waves * slots / blocks, turns);
    if (most < 2) continue;
    const int64_t part = (turns + most - 1) / most, splits = (turns + part - 1) / part;
    const int64_t cost = split_cost(splits, waves, turns);
    if (splits > 1 && cost < least) least = cost, best = splits;
  }
  return static_cast<int>(best);
}

// How many blocks share a multiprocessor: two by registers, where shared memory lets them.
constexpr int resident_blocks(int64_t shared_bytes, int64_t multiprocessor_bytes) {
  constexpr int64_t kReserved = 1024;  // of each block, by the driver
  return multiprocessor_bytes >= 2 * (shared_bytes + kReserved) ? 2 : 1;
}

// Sets tiles of rows and the split; returns the number of blocks, `units` being sequences times kv heads.
template <class Shape>
int64_t plan_grid(SplitParams& p, int64_t units, int64_t multiprocessors, int64_t multiprocessor_bytes) {
  p.row_tiles = (p.rows() + Shape::kRows - 1) / Shape::kRows;
  p.warps = Shape::kWarps;
  const int64_t blocks = units * p.row_tiles;
  const int64_t slots = multiprocessors * resident_blocks(Shape::kSharedBytes, multiprocessor_bytes);
  p.splits = plan_splits(blocks, slots, most_tiles(p.capacity, p.queries, p.bands), Shape::kWarps);
  return blocks * p.splits;
}

// How many rows of partial results there are: of value_dim values, a top and a total each.
constexpr int64_t partial_rows(const SplitParams& p, int64_t units) {
  return p.splits > 1 ? units * p.splits * p.rows() : 0;
}

}  // namespace effkern::attention_decode
