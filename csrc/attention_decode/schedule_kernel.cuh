// Which keys a thread block of the GPU kernels visits. Plain integer functions, so that the tests can check them on the
// host over all small shapes.
#pragma once

#include <cstdint>

namespace effkern::attention_decode {

constexpr int kTileKeys = 16;  // keys that a warp takes at a time
constexpr int kMaxBands = 4;
constexpr int kMostKeys = 1 << 29;  // of a cache; a window of that length has no end

// n / d by a multiplication, for 0 <= n < 2^31. The error of the multiplier, below d / 2^(31 + shift), cannot carry.
struct Divisor {
  uint32_t multiplier;
  int shift;

  constexpr int divide(int n) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * multiplier >> (31 + shift));
  }
};

constexpr Divisor divisor(int d) {
  int shift = 0;
  while ((int64_t{1} << shift) < d) ++shift;
  const uint64_t power = uint64_t{1} << (31 + shift);
  return {static_cast<uint32_t>((power + d - 1) / d), shift};
}

// Position p sees key j when j <= p + reach, and for every band j >= p - left or j < sink.
struct Bands {
  int reach;  // not above 0: decoding is causal
  int count;
  int left[kMaxBands], sink[kMaxBands];
};

// Bit i stands for number `first` + i of a tile: those below `key`. Every number here is below 2^29 in size.
constexpr uint32_t keys_below(int key, int first) {
  const int count = key - first;
  return count <= 0 ? 0u : count >= kTileKeys ? (1u << kTileKeys) - 1 : (1u << count) - 1;
}

// What the left ends of the windows of one position leave of a tile.
constexpr uint32_t behind_left_ends(int position, const Bands& bands, int first) {
  uint32_t seen = ~0u;
  for (int i = 0; i < bands.count; ++i)
    seen &= ~keys_below(position - bands.left[i], first) | keys_below(bands.sink[i], first);
  return seen;
}

// What one position sees of a tile.
constexpr uint32_t seen_from(int position, const Bands& bands, int first) {
  return keys_below(position + bands.reach + 1, first) & behind_left_ends(position, bands, first);
}

// A range that holds what the queries of a sequence see: keys below `end` that are below `sinks` or not below `low`.
struct VisibleKeys {
  int sinks, low, end;
};

// The queries are the last `queries` positions; there may be more of them than keys.
constexpr VisibleKeys visible_keys(int length, int queries, const Bands& bands) {
  VisibleKeys keys{0, 0, length + bands.reach};
  if (keys.end < 0) keys.end = 0;
  for (int i = 0; i < bands.count; ++i) {
    const int low = length - queries - bands.left[i];
    keys.low = low > keys.low ? low : keys.low;
    keys.sinks = bands.sink[i] > keys.sinks ? bands.sink[i] : keys.sinks;
  }
  if (keys.sinks >= keys.low) keys.low = 0;
  if (keys.sinks > keys.end) keys.sinks = keys.end;
  return keys;
}

// What the queries see of a tile. The windows of the first begin first; a key behind it is seen from its own position.
constexpr uint32_t seen_by_any(int length, int queries, const Bands& bands, int first) {
  return keys_below(length + bands.reach, first) & behind_left_ends(length - queries, bands, first);
}

// Whether every query sees every key of a tile.
constexpr bool seen_by_all(int length, int queries, const Bands& bands, int first) {
  bool seen = first + kTileKeys <= length - queries + 1 + bands.reach;
  for (int i = 0; i < bands.count; ++i) seen = seen && first >= length - 1 - bands.left[i];
  return seen;
}

// The tiles of those keys, counted without the gap between sinks and window.
struct TileWalk {
  int sink_tiles, gap, count;

  constexpr int tile(int index) const { return index < sink_tiles ? index : index + gap; }
};

constexpr TileWalk tile_walk(const VisibleKeys& keys) {
  const int all = (keys.end + kTileKeys - 1) / kTileKeys;
  if (keys.low == 0) return {0, 0, all};
  const int sink_tiles = (keys.sinks + kTileKeys - 1) / kTileKeys, window = keys.low / kTileKeys;
  const int first = window > sink_tiles ? window : sink_tiles;
  const int window_tiles = keys.low < keys.end && first < all ? all - first : 0;
  return {sink_tiles, first - sink_tiles, sink_tiles + window_tiles};
}

// The tiles of a walk, cut into parts of whole turns: in a turn each warp of a block takes one tile. Short sequences
// leave the last parts empty.
struct Parts {
  int tiles, step;

  constexpr int begin(int part) const {
    const int64_t first = int64_t{part} * step;
    return first < tiles ? static_cast<int>(first) : tiles;
  }
  constexpr int used() const { return step == 0 ? 0 : (tiles + step - 1) / step; }
};

constexpr Parts parts_of(int tiles, int splits, int warps) {
  const int turns = (tiles + warps - 1) / warps;
  return {tiles, (turns + splits - 1) / splits * warps};
}

// Lengths come unchecked from device memory.
constexpr int clamped_length(int length, int capacity) {
  return length < 0 ? 0 : length < capacity ? length : capacity;
}

// Blocks are numbered by tile of rows, part, and (sequence, kv head): those that read the same keys for other rows are
// neighbours and run at the same time.
struct Work {
  int row_tile, part, unit;
};

constexpr Work work_of_block(int block, int row_tiles, int splits) {
  const int rest = block / row_tiles;
  return {block % row_tiles, rest % splits, rest / splits};
}

}  // namespace effkern::attention_decode
