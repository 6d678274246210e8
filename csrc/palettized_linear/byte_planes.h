// Tables of up to 16 entries on the avx2 level. A permutation of floats has eight entries and is slow on some machines;
// one of bytes has 16, looks up 32 at a time, and is needed once for each byte of an entry that is not 0.
// Included by lookup.h.
#pragma once

namespace effkern {
namespace EFFKERN_UNIT {

// Entries of 32 codes, one in the low four bits of each byte whose highest bit is 0. `value` has four vectors.
template <bool kShort>
struct BytePlanes;

template <>
struct BytePlanes<false> {
  __m256i plane[4];
  EFFKERN_MEMBER explicit BytePlanes(const float* entries) {
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i four[4];  // entries: their lowest bytes, then the next ones
    for (int i = 0; i < 4; ++i)
      four[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + 4 * i)), turn);
    const __m128i low0 = _mm_unpacklo_epi32(four[0], four[1]), low1 = _mm_unpacklo_epi32(four[2], four[3]);
    const __m128i high0 = _mm_unpackhi_epi32(four[0], four[1]), high1 = _mm_unpackhi_epi32(four[2], four[3]);
    plane[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low0, low1));
    plane[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(low0, low1));
    plane[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(high0, high1));
    plane[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(high0, high1));
  }
  // Which code entry `at` of a value belongs to: its byte, and its lane in that half of `codes`.
  static constexpr int byte_of(int, int at) { return at % 4; }
  static constexpr int lane_of(int value, int) { return value; }
  EFFKERN_MEMBER void operator()(Words codes, Vec* value) const {
    Words byte[4];
    for (int b = 0; b < 4; ++b) byte[b] = _mm256_shuffle_epi8(plane[b], codes);
    const Words low0 = _mm256_unpacklo_epi8(byte[0], byte[1]), low1 = _mm256_unpackhi_epi8(byte[0], byte[1]);
    const Words high0 = _mm256_unpacklo_epi8(byte[2], byte[3]), high1 = _mm256_unpackhi_epi8(byte[2], byte[3]);
    value[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
    value[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    value[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
    value[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
  }
};

// Two bytes of each entry are 0.
template <>
struct BytePlanes<true> {
  __m256i plane[2];
  EFFKERN_MEMBER explicit BytePlanes(const float* entries) {
    const BytePlanes<false> all(entries);
    for (int b = 0; b < 2; ++b) plane[b] = all.plane[2 + b];
  }
  static constexpr int byte_of(int value, int at) { return at % 2 * 2 + value % 2; }
  static constexpr int lane_of(int value, int at) { return value / 2 * 2 + at % 4 / 2; }
  EFFKERN_MEMBER void operator()(Words codes, Vec* value) const {
    const Words low = _mm256_shuffle_epi8(plane[0], codes), high = _mm256_shuffle_epi8(plane[1], codes);
    const Words first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    const Words upper = words_set(0xffff0000u);
    value[0] = _mm256_castsi256_ps(_mm256_slli_epi32(first, 16));
    value[1] = _mm256_castsi256_ps(_mm256_and_si256(first, upper));
    value[2] = _mm256_castsi256_ps(_mm256_slli_epi32(second, 16));
    value[3] = _mm256_castsi256_ps(_mm256_and_si256(second, upper));
  }
};

// Calls body(codes, which) for the codes of a part of a block: kFields / 4 vectors, four fields in the bytes of each
// lane.
template <int kBits>
struct ByteCodes {
  static constexpr int field(int vector, int byte) { return 8 / kBits * byte + vector; }
  template <class Body>
  EFFKERN_MEMBER static void split(const Words* word, const Body& body) {
    constexpr int kMask = ((1 << kBits) - 1) * 0x01010101;
    for (int v = 0; v < 8 / kBits; ++v) body(words_and(words_right(word[0], kBits * v), kMask), v);
  }
};

// Fields of three bits start at every bit of a byte. Those of bytes 1 and 2 come to its lowest one by products, the two
// of each word that reach over its bytes' ends, and the two that have their bits in three words, by themselves.
template <>
struct ByteCodes<3> {
  static constexpr int field(int vector, int byte) {
    constexpr int kFirst[4] = {0, 3, 6, 8}, kRest[2][4] = {{2, 5, 12, 15}, {22, 25, 30, 31}};
    return vector < 6 ? vector / 2 * 10 + vector % 2 + kFirst[byte] : kRest[vector - 6][byte];
  }
  // Fields 2 and 5 in bytes 0 and 1.
  EFFKERN_MEMBER static Words reaching(Words word) {
    return words_or(words_and(words_right(word, 6), 0x07), words_and(words_right(word, 7), 0x0700));
  }
  EFFKERN_MEMBER static Words four(Words outer, Words inner) {
    return words_or(words_and(outer, 0x07000007), words_and(inner, 0x00070700));
  }
  template <class Body>
  EFFKERN_MEMBER static void split(const Words* word, const Body& body) {
    for (int w = 0; w < 3; ++w) {
      body(four(word[w], _mm256_mulhi_epu16(word[w], words_set(1u << 30 | 1u << 15))), 2 * w);
      body(four(words_right(word[w], 3), _mm256_mulhi_epu16(word[w], words_set(1u << 27 | 1u << 12))), 2 * w + 1);
    }
    body(words_or(reaching(word[0]), _mm256_slli_epi32(reaching(word[1]), 16)), 6);
    const Words low =
        words_or(words_and(words_right(word[0], 14), 0x00030000), words_and(words_right(word[1], 6), 0x03000000));
    const Words high =
        words_or(words_and(words_right(word[2], 12), 0x00040000), words_and(words_right(word[2], 5), 0x04000000));
    body(words_or(reaching(word[2]), words_or(low, high)), 7);
  }
};

template <int kBits, bool kShort>
struct ByteLookup {
  static constexpr int kChains = 4;  // registers for more are needed here
  static constexpr bool kShortToo = true;
  static constexpr int kVectors = Layout<kBits>::kFields / 4;
  BytePlanes<kShort> table;
  EFFKERN_MEMBER explicit ByteLookup(const float* entries) : table(entries) {}

  static const uint16_t* order() {
    constexpr int kBlock = kBlockLanes * Layout<kBits>::kFields;
    struct Places {
      uint16_t from[kBlock];
    };
    static constexpr Places places = [] {
      Places made{};
      for (int i = 0; i < kBlock; ++i) {
        const int at = i % 8, value = i / 8 % 4, vector = i / 32 % kVectors, part = i / 32 / kVectors;
        const int field = ByteCodes<kBits>::field(vector, BytePlanes<kShort>::byte_of(value, at));
        const int lane = part * kLanes + at / 4 * 4 + BytePlanes<kShort>::lane_of(value, at);
        made.from[i] = static_cast<uint16_t>(field * kBlockLanes + lane);
      }
      return made;
    }();
    return places.from;
  }

  template <class Body>
  EFFKERN_MEMBER void operator()(const uint32_t* words, const Body& body) const {
    for (int part = 0; part < kParts; ++part) {
      Words word[3];
      load_words<kBits>(words, part, word);
      ByteCodes<kBits>::split(word, [&](Words codes, int which) __attribute__((always_inline)) {
        Vec value[4];
        table(codes, value);
        for (int i = 0; i < 4; ++i) body(value[i], ((part * kVectors + which) * 4 + i) * kLanes);
      });
    }
  }
};

template <bool kShort>
struct BlockLookup<4, kShort> : ByteLookup<4, kShort> {
  using ByteLookup<4, kShort>::ByteLookup;
};
// With all four bytes, three bits take longer than by a permutation of floats.
template <>
struct BlockLookup<3, true> : ByteLookup<3, true> {
  using ByteLookup<3, true>::ByteLookup;
};

}  // namespace EFFKERN_UNIT
}  // namespace effkern
