// AVX-512 and AMX intrinsics in software (SIMDe, plus what it lacks), so that the units for those levels can be
// tested on a CPU without them. Only a build with EFFKERN_EMULATE includes this; it is for tests and slow.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

namespace effkern {
namespace EFFKERN_UNIT {

static inline uint16_t emulated_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float emulated_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline __m256i emulated_cvtneps(__m512 x) {
  float values[16];
  uint16_t halves[16];
  memcpy(values, &x, sizeof values);
  for (int i = 0; i < 16; ++i) halves[i] = emulated_bf16(values[i]);
  __m256i result;
  memcpy(&result, halves, sizeof result);
  return result;
}

static inline __m512i emulated_cvtne2ps(__m512 high, __m512 low) {
  const __m256i halves[2] = {emulated_cvtneps(low), emulated_cvtneps(high)};
  __m512i result;
  memcpy(&result, halves, sizeof result);
  return result;
}

static inline __m512 emulated_dpbf16(__m512 c, __m512 a, __m512 b) {
  float sums[16];
  uint16_t x[32], y[32];
  memcpy(sums, &c, sizeof sums);
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < 32; ++i) sums[i / 2] += emulated_float(x[i]) * emulated_float(y[i]);
  __m512 result;
  memcpy(&result, sums, sizeof result);
  return result;
}

// A conversion of both halves of x.
template <class Result, class Half, class From, class Convert>
static inline Result emulated_halves(From x, const Convert& convert) {
  Half halves[2];
  memcpy(halves, &x, sizeof halves);
  const decltype(convert(halves[0])) converted[2] = {convert(halves[0]), convert(halves[1])};
  Result result;
  memcpy(&result, converted, sizeof result);
  return result;
}

static inline __m512 emulated_cvtph(__m256i x) {
  return emulated_halves<__m512, __m128i>(x, [](__m128i half) { return _mm256_cvtph_ps(half); });
}

static inline __m512d emulated_cvtps_pd(__m256 x) {
  return emulated_halves<__m512d, __m128>(x, [](__m128 half) { return _mm256_cvtps_pd(half); });
}

static inline __m256 emulated_cvtpd_ps(__m512d x) {
  return emulated_halves<__m256, __m256d>(x, [](__m256d half) { return _mm256_cvtpd_ps(half); });
}

static inline __m256i emulated_cvtps_ph(__m512 x) {
  __m256 floats[2];
  memcpy(floats, &x, sizeof floats);
  const __m128i halves[2] = {_mm256_cvtps_ph(floats[0], 0), _mm256_cvtps_ph(floats[1], 0)};
  __m256i result;
  memcpy(&result, halves, sizeof result);
  return result;
}

static inline __m256i emulated_narrow(__m512i x) {
  uint32_t words[16];
  uint16_t halves[16];
  memcpy(words, &x, sizeof words);
  for (int i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(words[i]);
  __m256i result;
  memcpy(&result, halves, sizeof result);
  return result;
}

static inline __m512i emulated_widen(__m256i x) {
  uint16_t halves[16];
  uint32_t words[16];
  memcpy(halves, &x, sizeof halves);
  for (int i = 0; i < 16; ++i) words[i] = halves[i];
  __m512i result;
  memcpy(&result, words, sizeof result);
  return result;
}

// Selects four 128-bit quarters, two of each source.
template <int kOrder>
static inline __m512 emulated_shuffle_f32x4(__m512 a, __m512 b) {
  float x[16], y[16], picked[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int quarter = 0; quarter < 4; ++quarter)
    memcpy(picked + 4 * quarter, (quarter < 2 ? x : y) + 4 * ((kOrder >> (2 * quarter)) & 3), 16);
  __m512 result;
  memcpy(&result, picked, sizeof result);
  return result;
}

// Eight tiles of 16 x 64 bytes; the shape is fixed, as gemm_bf16.h configures it.
struct EmulatedTiles {
  uint32_t words[8][16][16];
};
static thread_local EmulatedTiles emulated_tiles;

static inline void emulated_tile_load(int tile, const void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    memcpy(emulated_tiles.words[tile][row], static_cast<const char*>(base) + row * stride, 64);
}

static inline void emulated_tile_store(int tile, void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    memcpy(static_cast<char*>(base) + row * stride, emulated_tiles.words[tile][row], 64);
}

static inline void emulated_tile_product(int c, int a, int b) {
  for (int row = 0; row < 16; ++row) {
    float sums[16];
    memcpy(sums, emulated_tiles.words[c][row], sizeof sums);
    for (int d = 0; d < 16; ++d) {
      const uint32_t x = emulated_tiles.words[a][row][d];
      for (int column = 0; column < 16; ++column) {
        const uint32_t y = emulated_tiles.words[b][d][column];
        sums[column] += emulated_float(static_cast<uint16_t>(x)) * emulated_float(static_cast<uint16_t>(y)) +
                        emulated_float(static_cast<uint16_t>(x >> 16)) * emulated_float(static_cast<uint16_t>(y >> 16));
      }
    }
    memcpy(emulated_tiles.words[c][row], sums, sizeof sums);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern

#define __m512bh __m512i
#undef _mm512_dpbf16_ps
#define _mm512_cvtneps_pbh(x) emulated_cvtneps(x)
#define _mm512_cvtne2ps_pbh(high, low) emulated_cvtne2ps(high, low)
#define _mm512_dpbf16_ps(c, a, b) emulated_dpbf16(c, _mm512_castsi512_ps(a), _mm512_castsi512_ps(b))
#define _mm512_cvtph_ps(x) emulated_cvtph(x)
#define _mm512_cvtps_ph(x, rounding) emulated_cvtps_ph(x)
#define _mm512_cvtps_pd(x) emulated_cvtps_pd(x)
#define _mm512_cvtpd_ps(x) emulated_cvtpd_ps(x)
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(x) emulated_widen(x)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, order) emulated_shuffle_f32x4<order>(a, b)
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(x) emulated_narrow(x)

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shape) ((void)(shape))
#define _tile_release() memset(&emulated_tiles, 0xff, sizeof emulated_tiles)
#define _tile_zero(tile) memset(emulated_tiles.words[tile], 0, sizeof emulated_tiles.words[tile])
#define _tile_loadd(tile, base, stride) emulated_tile_load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_tile_store(tile, base, stride)
#define _tile_dpbf16ps(c, a, b) emulated_tile_product(c, a, b)
