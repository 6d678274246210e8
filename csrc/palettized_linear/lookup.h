// Unpacking fields of words and looking them up in a table, one vector of lanes at a time. Included inside an ISA unit
// after simd.h.
#pragma once

#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

constexpr int kBlockLanes = 16, kParts = kBlockLanes / kLanes;

template <int kBits>
struct Layout {
  static constexpr int kWords = kBits % 3 == 0 ? 3 : 1;
  static constexpr int kEach = 32 / kBits;  // whole fields of a word
  static constexpr int kFields = 32 * kWords / kBits;
};

#if defined(EFFKERN_UNIT_AVX512)
EFFKERN_INLINE Words words_right(Words x, int bits) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(bits)); }
EFFKERN_INLINE Words words_and(Words x, uint32_t mask) { return _mm512_and_si512(x, words_set(mask)); }
EFFKERN_INLINE Words words_or(Words x, Words y) { return _mm512_or_si512(x, y); }

// Entries of a table for the low kBits of each word; of tables up to 16 entries the permutation ignores other bits.
template <int kBits>
struct Table {
  const float* entries;
  Vec low;
  EFFKERN_MEMBER explicit Table(const float* p) : entries(p), low(vload(p)) {}
  EFFKERN_MEMBER Vec operator()(Words code) const {
    if constexpr (kBits <= 4) return _mm512_permutexvar_ps(code, low);
    const Words index = words_and(code, (1u << kBits) - 1);
    const __m256 first = _mm256_i32gather_ps(entries, _mm512_castsi512_si256(index), 4);
    const __m256 second = _mm256_i32gather_ps(entries, _mm512_extracti64x4_epi64(index, 1), 4);
    return _mm512_castpd_ps(
        _mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(first)), _mm256_castps_pd(second), 1));
  }
};
#elif defined(EFFKERN_UNIT_AVX2)
EFFKERN_INLINE Words words_right(Words x, int bits) { return _mm256_srli_epi32(x, bits); }
EFFKERN_INLINE Words words_and(Words x, uint32_t mask) { return _mm256_and_si256(x, words_set(mask)); }
EFFKERN_INLINE Words words_or(Words x, Words y) { return _mm256_or_si256(x, y); }

// Entries of a table for the low kBits of each word; the permutation ignores all but three.
template <int kBits>
struct Table {
  const float* entries;
  Vec low, high;
  EFFKERN_MEMBER explicit Table(const float* p) : entries(p), low(vload(p)), high(vload(p + 8)) {}
  EFFKERN_MEMBER Vec operator()(Words code) const {
    if constexpr (kBits <= 3) return _mm256_permutevar8x32_ps(low, code);
    if constexpr (kBits == 4)
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                              _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    return _mm256_i32gather_ps(entries, words_and(code, (1u << kBits) - 1), 4);
  }
};

#else
EFFKERN_INLINE Words words_right(Words x, int bits) { return x >> static_cast<uint32_t>(bits); }
EFFKERN_INLINE Words words_and(Words x, uint32_t mask) { return x & mask; }
EFFKERN_INLINE Words words_or(Words x, Words y) { return x | y; }

template <int kBits>
struct Table {
  const float* entries;
  EFFKERN_MEMBER explicit Table(const float* p) : entries(p) {}
  EFFKERN_MEMBER Vec operator()(Words code) const {
    const Words index = words_and(code, (1u << kBits) - 1);
    return Vec{entries[index[0]], entries[index[1]], entries[index[2]], entries[index[3]]};
  }
};
#endif

// Field f in the low bits of each lane; whatever bits above it.
template <int kBits>
EFFKERN_INLINE Words field_of(const Words* word, int f) {
  constexpr int kEach = Layout<kBits>::kEach;
  if constexpr (kBits == 3) {
    if (f >= 30) return words_or(words_right(word[f - 30], 30), words_and(words_right(word[2], f - 2), 4));
  } else if constexpr (kBits == 6) {
    if (f == 15)
      return words_or(words_right(word[0], 30),
                      words_or(words_and(words_right(word[1], 28), 0x0c), words_and(words_right(word[2], 26), 0x30)));
  }
  return words_right(word[f / kEach], kBits * (f % kEach));
}

template <int kBits>
EFFKERN_INLINE void load_words(const uint32_t* p, int part, Words* word) {
  for (int w = 0; w < Layout<kBits>::kWords; ++w) word[w] = words_load(p + w * kBlockLanes + part * kLanes);
}

// The last block of a row, with fewer lanes: its words as a whole block has them, zeros in the other lanes.
template <int kBits>
EFFKERN_INLINE void widen_block(const uint8_t* source, int64_t lanes, uint32_t* target) {
  memset(target, 0, Layout<kBits>::kWords * kBlockLanes * sizeof(uint32_t));
  for (int w = 0; w < Layout<kBits>::kWords; ++w)
    memcpy(target + w * kBlockLanes, source + w * lanes * 4, lanes * sizeof(uint32_t));
}

// The entries of a whole block: body(vector, where its first entry stands in the order of `few`). kShort: every entry
// is a bf16 number.
template <int kBits, bool kShort>
struct BlockLookup {
  static constexpr int kChains = 8;         // products at a time
  static constexpr bool kShortToo = false;  // whether there is a way of its own for such entries
  Table<kBits> table;
  EFFKERN_MEMBER explicit BlockLookup(const float* entries) : table(entries) {}
  static const uint16_t* order() { return nullptr; }
  template <class Body>
  EFFKERN_MEMBER void operator()(const uint32_t* words, const Body& body) const {
    for (int part = 0; part < kParts; ++part) {
      Words word[3];
      load_words<kBits>(words, part, word);
#pragma GCC unroll 32
      for (int f = 0; f < Layout<kBits>::kFields; ++f)
        body(table(field_of<kBits>(word, f)), f * kBlockLanes + part * kLanes);
    }
  }
};

#if defined(EFFKERN_UNIT_AVX2)
}  // namespace EFFKERN_UNIT
}  // namespace effkern
#include "palettized_linear/byte_planes.h"

namespace effkern {
namespace EFFKERN_UNIT {
#endif

// target[lanes * f + l] = the entry of field f of lane l, for a block in whole words. Up to 16 more are written.
template <int kBits, class T>
EFFKERN_INLINE void decode_block(const uint32_t* words, int64_t lanes, const Table<kBits>& table, T* target) {
  Words word[kParts][3];
  for (int part = 0; part < kParts; ++part) load_words<kBits>(words, part, word[part]);
#pragma GCC unroll 32
  for (int f = 0; f < Layout<kBits>::kFields; ++f)
    for (int part = 0; part < kParts; ++part)  // what lies behind the lanes, the next field overwrites
      store_full(target + f * lanes + part * kLanes, table(field_of<kBits>(word[part], f)));
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
