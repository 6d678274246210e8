// Layouts of bf16 operands. A product of pairs wants its B operand with two neighbours along the depth in one 32-bit
// word ("VNNI"); A operands are plain rows. Everything is zero padded, so that products run on whole tiles.
// Included inside a bf16 unit after simd.h.
#pragma once

#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

EFFKERN_INLINE __m256i load_bf16(const Bf16* p, int64_t count) {
  if (count >= 16) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  Bf16 buffer[16];
  memset(buffer, 0, sizeof buffer);
  if (count > 0) memcpy(buffer, p, count * sizeof(Bf16));
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer));
}

// One word a lane: `even` in the low half, `odd` in the high half.
EFFKERN_INLINE __m512i interleave(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Sixteen rows of sixteen words, transposed through the fp32 shuffles, which move bits unchanged.
EFFKERN_INLINE void transpose_words(__m512i words[16]) {
  Vec block[16];
  for (int i = 0; i < 16; ++i) block[i] = _mm512_castsi512_ps(words[i]);
  transpose(block);
  for (int i = 0; i < 16; ++i) words[i] = _mm512_castps_si512(block[i]);
}

// target[r][c] = source[r][c], to (padded_rows, padded_columns)
[[maybe_unused]] static void copy_rows(const Bf16* source, int64_t stride, int64_t rows, int64_t columns,
                                       int64_t padded_rows, int64_t padded_columns, Bf16* target) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    Bf16* row = target + r * padded_columns;
    const int64_t filled = r < rows ? columns : 0;
    if (filled) memcpy(row, source + r * stride, filled * sizeof(Bf16));
    memset(row + filled, 0, (padded_columns - filled) * sizeof(Bf16));
  }
}

// target[c][r] = source[r][c], to (padded_columns, padded_rows), both multiples of 16
[[maybe_unused]] static void transpose_rows(const Bf16* source, int64_t stride, int64_t rows, int64_t columns,
                                            int64_t padded_rows, int64_t padded_columns, Bf16* target) {
  for (int64_t r = 0; r < padded_rows; r += 16) {
    for (int64_t c = 0; c < padded_columns; c += 16) {
      __m512i block[16];
      for (int64_t i = 0; i < 16; ++i)
        block[i] =
            _mm512_cvtepu16_epi32(load_bf16(source + (r + i) * stride + c, r + i < rows ? max64(0, columns - c) : 0));
      transpose_words(block);
      for (int64_t i = 0; i < 16; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + (c + i) * padded_rows + r),
                            _mm512_cvtepi32_epi16(block[i]));
    }
  }
}

// Word target[c / 2][r] = (source[r][c], source[r][c + 1]): the transposed matrix as B operand, (padded_columns / 2,
// lanes) words with padded_columns a multiple of 32 and lanes of 16. `negate` flips every sign.
[[maybe_unused]] static void transpose_pairs(const Bf16* source, int64_t stride, int64_t rows, int64_t columns,
                                             int64_t lanes, int64_t padded_columns, bool negate, Bf16* target) {
  const __m512i flip = _mm512_set1_epi32(negate ? static_cast<int>(0x80008000u) : 0);
  for (int64_t r = 0; r < lanes; r += 16) {
    for (int64_t c = 0; c < padded_columns; c += 32) {
      __m512i block[16];
      for (int64_t i = 0; i < 16; ++i) {
        const Bf16* row = source + (r + i) * stride + c;
        const int64_t count = r + i < rows ? max64(0, columns - c) : 0;
        block[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load_bf16(row, count)),
                                      load_bf16(row + 16, max64(0, count - 16)), 1);
        if (r + i < rows) block[i] = _mm512_xor_si512(block[i], flip);
      }
      transpose_words(block);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(target + ((c / 2 + i) * lanes + r) * 2, block[i]);
    }
  }
}

// Word target[r / 2][c] = (source[r][c], source[r + 1][c]): the matrix itself as B operand, (padded_rows / 2,
// padded_columns) words with padded_columns a multiple of 16.
[[maybe_unused]] static void interleave_rows(const Bf16* source, int64_t stride, int64_t rows, int64_t columns,
                                             int64_t padded_rows, int64_t padded_columns, Bf16* target) {
  for (int64_t r = 0; r < padded_rows; r += 2) {
    for (int64_t c = 0; c < padded_columns; c += 16) {
      const int64_t count = max64(0, columns - c);
      const Bf16* row = source + r * stride + c;
      _mm512_storeu_si512(
          target + (r / 2 * padded_columns + c) * 2,
          interleave(load_bf16(row, r < rows ? count : 0), load_bf16(row + stride, r + 1 < rows ? count : 0)));
    }
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
