// The SIMD vocabulary of an ISA unit. A unit (<family>/<isa>.cpp) defines EFFKERN_UNIT as its namespace and one of
// EFFKERN_UNIT_AVX2, EFFKERN_UNIT_AVX512 (or neither: portable), then includes this header and its kernel body.
//
// Everything lands in effkern::EFFKERN_UNIT, and no std template is instantiated here: an inline function compiled
// with AVX-512 and merged by the linker into code for every CPU would crash the CPUs that lack it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(EFFKERN_EMULATE) && defined(EFFKERN_UNIT_AVX512)
#include "core/cpu/emulate.h"
#elif defined(EFFKERN_UNIT_AVX2) || defined(EFFKERN_UNIT_AVX512)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 headers start from a deliberately undefined register (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define EFFKERN_INLINE static inline __attribute__((always_inline))
#define EFFKERN_MEMBER inline __attribute__((always_inline))  // of a struct

namespace effkern {
namespace EFFKERN_UNIT {

struct Bf16 {
  unsigned short bits;
};
struct Fp16 {
  unsigned short bits;
};

// 2^f on [-1/2, 1/2], highest power first, and exactly 1 at 0: a row's best key then weighs exactly 1. Relative error
// 9.2e-8; the bf16 units, which round the result to eight bits anyway, take one term less (2.8e-6).
#if defined(EFFKERN_UNIT_BF16)
constexpr int kExp2Terms = 5;
constexpr float kExp2Coefficients[kExp2Terms] = {0.00958285294f, 0.0559064262f, 0.240240991f, 0.693124175f, 1.0f};
#else
constexpr int kExp2Terms = 6;
constexpr float kExp2Coefficients[kExp2Terms] = {0.00132647273f, 0.00967151299f, 0.0555073358f,
                                                 0.240222424f,   0.693147004f,   1.0f};
#endif

#if defined(EFFKERN_UNIT_AVX512)
#if defined(EFFKERN_UNIT_BF16)
EFFKERN_INLINE __m256i native_to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#endif
#include "core/cpu/simd_avx512.h"
#elif defined(EFFKERN_UNIT_AVX2)
#include "core/cpu/simd_avx2.h"
#else
#include "core/cpu/simd_generic.h"
#endif

EFFKERN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
EFFKERN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
EFFKERN_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// 2^x for x <= 1, relative error below 2e-7; exactly 0 below -126.5, NaN stays NaN. Of several registers side by side:
// the chain of one is too long for its latencies to be hidden by what comes after it.
template <int kCount>
EFFKERN_INLINE void vexp2_below_one(Vec (&x)[kCount]) {
#define EFFKERN_EACH _Pragma("GCC unroll 8") for (int i = 0; i < kCount; ++i)
  const Vec least = vset(-127.0f);  // whose exponent is that of 0
  const Vec shifter = vset(12582912.0f + 127.0f);
  Vec shifted[kCount], p[kCount];
  EFFKERN_EACH x[i] = vmax(least, x[i]);
  EFFKERN_EACH shifted[i] = vadd(x[i], shifter);
  EFFKERN_EACH x[i] = vsub(x[i], vsub(shifted[i], shifter));
  EFFKERN_EACH p[i] = vset(kExp2Coefficients[0]);
  for (int term = 1; term < kExp2Terms; ++term) EFFKERN_EACH p[i] = vfma(p[i], x[i], vset(kExp2Coefficients[term]));
  EFFKERN_EACH x[i] = vmul(p[i], as_exponent(shifted[i]));
#undef EFFKERN_EACH
}

// tanh(x), within 2 units of the last place: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel, and that
// elsewhere.
EFFKERN_INLINE Vec vtanh(Vec x) {
  const Vec magnitude = vmax(vsub(vzero(), x), x), square = vmul(x, x);
  Vec p = vset(-5.70498872745e-3f);
  p = vfma(p, square, vset(2.06390887954e-2f));
  p = vfma(p, square, vset(-5.37397155531e-2f));
  p = vfma(p, square, vset(1.33314422036e-1f));
  p = vfma(p, square, vset(-3.33332819422e-1f));
  const Vec near = vfma(vmul(p, square), x, x);
  // From 10 on tanh rounds to 1.
  const Vec power = vexp2(vmul(vmin(vset(10.0f), magnitude), vset(2.88539008177792681f)));
  const Vec far = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(power, vset(1.0f))));
  const Vec signed_far = select_greater(vzero(), x, vsub(vzero(), far), far);
  return select_greater(magnitude, vset(0.625f), signed_far, near);
}

// The first `count` elements, zeros behind them.
template <class T>
EFFKERN_INLINE Vec load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load_full(p);
  T buffer[kLanes];
  memset(buffer, 0, sizeof buffer);
  if (count > 0) memcpy(buffer, p, count * sizeof(T));
  return load_full(buffer);
}

template <class T>
EFFKERN_INLINE void store_some(T* p, Vec x, int64_t count) {
  if (count >= kLanes) return store_full(p, x);
  T buffer[kLanes];
  store_full(buffer, x);
  if (count > 0) memcpy(p, buffer, count * sizeof(T));
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
