// The vector vocabulary on AVX2 + FMA + F16C: eight fp32 lanes. Included inside an ISA unit's namespace.

constexpr int kLanes = 8;
using Vec = __m256;

EFFKERN_INLINE Vec vzero() { return _mm256_setzero_ps(); }
EFFKERN_INLINE Vec vset(float x) { return _mm256_set1_ps(x); }
EFFKERN_INLINE Vec vload(const float* p) { return _mm256_loadu_ps(p); }
EFFKERN_INLINE void vstore(float* p, Vec x) { _mm256_storeu_ps(p, x); }
EFFKERN_INLINE Vec vbroadcast(const float* p) { return _mm256_broadcast_ss(p); }
EFFKERN_INLINE Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
EFFKERN_INLINE Vec vsub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
EFFKERN_INLINE Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
EFFKERN_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
EFFKERN_INLINE Vec vfms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }  // a b - c
// Where either is NaN both return the second argument: keep a running maximum second.
EFFKERN_INLINE Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
EFFKERN_INLINE Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
EFFKERN_INLINE Vec vdiv(Vec a, Vec b) { return _mm256_div_ps(a, b); }
// To the nearest whole number, ties to even; zeros keep their sign.
EFFKERN_INLINE Vec vround(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

EFFKERN_INLINE bool any_greater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }

// yes in lanes where a > b, else no.
EFFKERN_INLINE Vec select_greater(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

// b where a is minus infinity, else a.
EFFKERN_INLINE Vec replace_minus_infinity(Vec a, Vec b) {
  return _mm256_blendv_ps(a, b, _mm256_cmp_ps(a, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ));
}

// 2^x for x <= 127, relative error below 2e-7; exactly 0 below -126, NaN stays NaN.
EFFKERN_INLINE Vec vexp2(Vec x) {
  const Vec shifter = _mm256_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const Vec shifted = _mm256_add_ps(x, shifter);
  const Vec f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, shifter));
  Vec p = _mm256_set1_ps(kExp2Coefficients[0]);
  for (int i = 1; i < kExp2Terms; ++i) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2Coefficients[i]));
  const __m256i exponent =
      _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23), _mm256_set1_epi32(0x3f800000));
  const Vec tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
  return _mm256_andnot_ps(tiny, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)));
}

// The low bits of each lane as an exponent.
EFFKERN_INLINE Vec as_exponent(Vec x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }

// The same lanes in float64.
struct Wide {
  __m256d low, high;
};
EFFKERN_INLINE Wide widen(Vec x) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
EFFKERN_INLINE Vec narrow(Wide x) { return _mm256_set_m128(_mm256_cvtpd_ps(x.high), _mm256_cvtpd_ps(x.low)); }
EFFKERN_INLINE Wide wide_set(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
EFFKERN_INLINE Wide wide_load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
EFFKERN_INLINE void wide_store(double* p, Wide x) { _mm256_storeu_pd(p, x.low), _mm256_storeu_pd(p + 4, x.high); }
EFFKERN_INLINE Wide wide_add(Wide a, Wide b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
EFFKERN_INLINE Wide wide_sub(Wide a, Wide b) { return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)}; }
EFFKERN_INLINE Wide wide_mul(Wide a, Wide b) { return {_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)}; }
EFFKERN_INLINE Wide wide_min(Wide a, Wide b) { return {_mm256_min_pd(a.low, b.low), _mm256_min_pd(a.high, b.high)}; }
EFFKERN_INLINE Wide wide_fma(Wide a, Wide b, Wide c) {
  return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}

// 32-bit words, one a lane.
using Words = __m256i;
EFFKERN_INLINE Words words_set(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
EFFKERN_INLINE Words words_load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
EFFKERN_INLINE Words words_add(Words a, Words b) { return _mm256_add_epi32(a, b); }
EFFKERN_INLINE Words words_xor(Words a, Words b) { return _mm256_xor_si256(a, b); }
// The low halves of the 64-bit products; the high ones go to *high.
EFFKERN_INLINE Words words_multiply(Words a, Words b, Words* high) {
  const Words even = _mm256_mul_epu32(a, b);
  const Words odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
// x in lanes whose word is at least `limit` (unsigned), else 0.
EFFKERN_INLINE Vec keep_at_least(Words word, Words limit, Vec x) {
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(word, limit), word)), x);
}
// x in lanes whose word has its top bit set, else minus infinity.
EFFKERN_INLINE Vec keep_top_bit(Words word, Vec x) {
  return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, _mm256_castsi256_ps(word));
}

EFFKERN_INLINE Vec load_full(const float* p) { return _mm256_loadu_ps(p); }
EFFKERN_INLINE Vec load_full(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
EFFKERN_INLINE Vec load_full(const Fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

EFFKERN_INLINE void store_full(float* p, Vec x) { _mm256_storeu_ps(p, x); }
EFFKERN_INLINE void store_full(Bf16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i halves = _mm256_srli_epi32(rounded, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
EFFKERN_INLINE void store_full(Fp16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// In place: row r, lane c becomes row c, lane r.
EFFKERN_INLINE void transpose(Vec r[8]) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  Vec u[8];
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
