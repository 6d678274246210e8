// Rows of a palettised weight: their blocks of words, and their numbers. Included by the bodies.
#pragma once

#include "palettized_linear/kernel.h"
#include "palettized_linear/lookup.h"

namespace effkern {
namespace EFFKERN_UNIT {

using palettized_linear::kEntries;
using palettized_linear::Packed;

EFFKERN_INLINE const float* table_of(const Packed& w, int64_t row, int64_t place) {
  const int64_t group = w.groups == 1 ? 0 : row / (w.rows / w.groups);
  return w.tables + (group * w.dim + place) * kEntries;
}

constexpr int64_t kAhead = 2048;  // bytes

// Calls body(first index, lanes, words) for every block of a row in [begin, end), which are ends of blocks or the
// row's; `words` are whole blocks.
template <int kBits, class Body>
EFFKERN_INLINE void for_blocks(const Packed& w, int64_t row, int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t kFields = Layout<kBits>::kFields, kBlock = kBlockLanes * kFields;
  constexpr int64_t kBytes = Layout<kBits>::kWords * kBlockLanes * 4;
  const uint8_t* p = w.indices + row * w.row_bytes + begin / kBlock * kBytes;
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock, p += kBytes) {
    // Rows are read once, and lie one after the other: what is that far ahead is needed soon.
    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(p + kAhead + line);
    body(i, kBlockLanes, reinterpret_cast<const uint32_t*>(p));
  }
  if (i == end) return;
  uint32_t words[3 * kBlockLanes];
  const int64_t lanes = (end - i + kFields - 1) / kFields;
  widen_block<kBits>(p, lanes, words);
  body(i, lanes, words);
}

// count * dim numbers; of vectors as floats only.
template <int kBits, class T>
static void decode_of(const Packed& w, int64_t row, float* scratch, T* out) {
  constexpr int64_t kBlock = kBlockLanes * Layout<kBits>::kFields;
  for (int64_t place = 0; place < w.dim; ++place) {
    const Table<kBits> table(table_of(w, row, place));
    for_blocks<kBits>(w, row, 0, w.count,
                      [&](int64_t first, int64_t lanes, const uint32_t* words) __attribute__((always_inline)) {
                        if (w.dim == 1 && first + kBlock <= w.count)
                          return decode_block<kBits>(words, lanes, table, out + first);
                        decode_block<kBits>(words, lanes, table, scratch);
                        const int64_t count = min64(lanes * Layout<kBits>::kFields, w.count - first);
                        if (w.dim == 1) {
                          for (int64_t i = 0; i < count; i += kLanes)
                            store_some(out + first + i, vload(scratch + i), count - i);
                        } else if constexpr (sizeof(T) == sizeof(float)) {
                          for (int64_t i = 0; i < count; ++i) out[(first + i) * w.dim + place] = scratch[i];
                        }
                      });
  }
}

#define EFFKERN_BY_BITS(bits, call) \
  switch (bits) {                   \
    case 1: call(1); break;         \
    case 2: call(2); break;         \
    case 3: call(3); break;         \
    case 4: call(4); break;         \
    case 6: call(6); break;         \
    default: call(8);               \
  }

template <class T>
static void decode(const Packed& w, int64_t row, float* scratch, T* out) {
#define EFFKERN_CALL(kBits) decode_of<kBits>(w, row, scratch, out)
  EFFKERN_BY_BITS(w.bits, EFFKERN_CALL)
#undef EFFKERN_CALL
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
