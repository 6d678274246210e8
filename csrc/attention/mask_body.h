// Masks inside a tile: 32 keys at a time become one word of visibility bits a query, and scores whose bit is clear
// become minus infinity. Only tiles that the lists call partial come here.
#pragma once

#include "attention/mask.h"
#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

using attention::Band;
using attention::Groups;
using attention::Mask;

constexpr int64_t kMaxQueryTile = 128;
constexpr int64_t kWordKeys = 32;

// Bits [0, n).
EFFKERN_INLINE uint32_t bits_below(int64_t n) { return n <= 0 ? 0u : n >= kWordKeys ? ~0u : (1u << n) - 1u; }

EFFKERN_INLINE int64_t floor_divide(int64_t a, int64_t b) {
  const int64_t quotient = a / b;
  return quotient * b > a ? quotient - 1 : quotient;
}

static uint32_t layout_bits(const Mask& mask, int64_t query, int64_t begin, int64_t end) {
  const uint8_t* row = mask.layout + query / mask.block * mask.layout_row;
  uint32_t bits = 0;
  for (int64_t block = begin / mask.block; block * mask.block < end; ++block)
    if (row[block]) bits |= bits_below((block + 1) * mask.block - begin) & ~bits_below(block * mask.block - begin);
  return bits;
}

static uint32_t id_bits(const Mask& mask, int64_t position, int64_t begin, int64_t end) {
  if (position < 0 || position >= mask.keys) return 0;
  const int64_t id = mask.ids[position];
  uint32_t bits = 0;
  for (int64_t key = begin; key < end; ++key) bits |= static_cast<uint32_t>(mask.ids[key] == id) << (key - begin);
  return bits;
}

static uint32_t table_bits(const Mask& mask, int64_t query, int64_t begin, int64_t end) {
  const uint8_t* row = mask.visible + query * mask.visible_row;
  if (mask.visible_column == 0) return row[0] ? ~0u : 0u;
  uint32_t bits = 0;
  int64_t key = begin;
  for (; key + 8 <= end; key += 8) {
    uint64_t eight;  // bytes 0 or 1: the product gathers them in its top byte
    memcpy(&eight, row + key, sizeof eight);
    bits |= static_cast<uint32_t>((eight * 0x0102040810204080u) >> 56) << (key - begin);
  }
  for (; key < end; ++key) bits |= static_cast<uint32_t>(row[key] != 0) << (key - begin);
  return bits;
}

// Bit i: does `query` see key begin + i?
static uint32_t visible_bits(const Mask& mask, int64_t query, int64_t begin) {
  const int64_t position = query + mask.shift, end = min64(begin + kWordKeys, mask.keys);
  uint32_t bits = bits_below(mask.keys - begin);
  for (int64_t i = 0; i < mask.band_count; ++i) {
    const Band& band = mask.bands[i];
    const uint32_t recent = ~bits_below(position - band.left - begin), sink = bits_below(band.sink - begin);
    bits &= bits_below(position + band.right + 1 - begin) & (recent | sink);
  }
  for (int64_t i = 0; i < mask.groups_count; ++i) {
    const Groups& groups = mask.groups[i];
    const int64_t first = floor_divide(position + groups.offset, groups.size) * groups.size - groups.offset;
    bits &= bits_below(first + groups.size - begin) & ~bits_below(first - begin);
  }
  if (bits && mask.layout) bits &= layout_bits(mask, query, begin, end);
  if (bits && mask.ids) bits &= id_bits(mask, position, begin, end);
  if (bits && mask.visible) bits &= table_bits(mask, query, begin, end);
  return bits;
}

// Minus infinity where the mask hides the key from the query. Lanes beyond `queries` stay as they are.
static inline void mask_scores(float* s, int64_t lanes, const Mask& mask, int64_t first_query, int64_t queries,
                               int64_t key_begin, int64_t count) {
  uint32_t words[kMaxQueryTile];
  for (int64_t key = 0; key < count; key += kWordKeys) {
    for (int64_t lane = 0; lane < lanes; ++lane)
      words[lane] = lane < queries ? visible_bits(mask, first_query + lane, key_begin + key) : ~0u;
    const int64_t here = min64(kWordKeys, count - key);
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      Words word = words_load(words + lane);
      // The last key first: its bit is the top one, and doubling the word brings up the next.
      for (int64_t i = here; i < kWordKeys; ++i) word = words_add(word, word);
      for (int64_t i = here - 1; i >= 0; --i, word = words_add(word, word)) {
        float* p = s + (key + i) * lanes + lane;
        vstore(p, keep_top_bit(word, vload(p)));
      }
    }
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
