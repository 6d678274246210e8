// Which query tile a thread block works on and which key tiles it visits. Plain integer functions, so that the tests
// can check them on the host over all small shapes.
#pragma once

namespace effkern::attention {

// The grid enumerates `rows` (batch x query heads) times `slots` (query tiles). Rows come in sections whose keys and
// values fit in L2 together. Inside a section all rows take their last slot first, since with a causal mask that is
// the longest; neighbouring blocks are the query heads of one key head.
struct Work {
  int row, slot;
};

constexpr Work work_of_block(int block, int rows, int slots, int section_rows) {
  const int section = block / (section_rows * slots), rest = block - section * section_rows * slots;
  const int first = section * section_rows, count = rows - first < section_rows ? rows - first : section_rows;
  return {first + rest % count, slots - 1 - rest / count};
}

// Packed sequences: sequence i owns the slots from offsets[i] / tile + i on. That is at least one per started tile and
// needs no pass over the lengths, which only the device knows; left-over slots have nothing to do.
constexpr int packed_slots(int tokens, int sequences, int tile) { return tokens / tile + sequences; }

struct QueryTile {
  int sequence, tile;
};

constexpr QueryTile tile_of_slot(const int* offsets, int sequences, int slot, int tile) {
  int low = 0, high = sequences;  // the last sequence whose first slot is not beyond `slot`
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (offsets[middle] / tile + middle <= slot)
      low = middle;
    else
      high = middle;
  }
  return {low, slot - offsets[low] / tile - low};
}

// A part of the token axis: begin is an index, count a length.
struct Span {
  int begin, count;
};

// Offsets come unchecked from device memory; whatever they hold, the span stays inside [0, tokens).
constexpr Span packed_span(const int* offsets, int sequence, int tokens) {
  const int begin = offsets[sequence], end = offsets[sequence + 1];
  if (begin < 0 || end > tokens || end < begin) return {0, 0};
  return {begin, end - begin};
}

// Query i sees the keys [0, end(i)). Without a causal mask `first_end` is `keys`.
struct Visible {
  int keys, first_end;

  constexpr int end(int query) const {
    const int bound = first_end + query;
    return bound < 0 ? 0 : bound < keys ? bound : keys;
  }
  constexpr Visible from(int query) const { return {keys, first_end + query}; }
};

constexpr Visible visible_keys(int queries, int keys, bool causal, bool top_left) {
  return {keys, !causal ? keys : top_left ? 1 : keys - queries + 1};
}

// The key tiles of one query tile, walked from the last to the first: [full, all) need the mask, [0, full) are seen
// whole by every query.
struct KeyTiles {
  int full, all;
};

constexpr KeyTiles key_tiles(const Visible& visible, int queries, int tile) {
  return {visible.end(0) / tile, (visible.end(queries - 1) + tile - 1) / tile};
}

}  // namespace effkern::attention
