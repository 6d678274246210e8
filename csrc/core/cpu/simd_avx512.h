// The vector vocabulary on AVX-512 F/BW/DQ/VL: sixteen fp32 lanes. Included inside an ISA unit's namespace.

constexpr int kLanes = 16;
using Vec = __m512;

EFFKERN_INLINE Vec vzero() { return _mm512_setzero_ps(); }
EFFKERN_INLINE Vec vset(float x) { return _mm512_set1_ps(x); }
EFFKERN_INLINE Vec vload(const float* p) { return _mm512_loadu_ps(p); }
EFFKERN_INLINE void vstore(float* p, Vec x) { _mm512_storeu_ps(p, x); }
EFFKERN_INLINE Vec vbroadcast(const float* p) { return _mm512_set1_ps(*p); }
EFFKERN_INLINE Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
EFFKERN_INLINE Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
EFFKERN_INLINE Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
EFFKERN_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
EFFKERN_INLINE Vec vfms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }  // a b - c
// Where either is NaN both return the second argument: keep a running maximum second.
EFFKERN_INLINE Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
EFFKERN_INLINE Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
EFFKERN_INLINE Vec vdiv(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// To the nearest whole number, ties to even; zeros keep their sign.
EFFKERN_INLINE Vec vround(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

EFFKERN_INLINE bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

// yes in lanes where a > b, else no.
EFFKERN_INLINE Vec select_greater(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}

// b where a is minus infinity, else a.
EFFKERN_INLINE Vec replace_minus_infinity(Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ), a, b);
}

// 2^x for x <= 127, relative error below 2e-7; exactly 0 far below -126, NaN stays NaN.
EFFKERN_INLINE Vec vexp2(Vec x) {
  const Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // Minus infinity: the difference is NaN, so bound the argument first; scalef then underflows to 0.
  const Vec f = _mm512_sub_ps(x, whole);
  Vec p = _mm512_set1_ps(kExp2Coefficients[0]);
  for (int i = 1; i < kExp2Terms; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2Coefficients[i]));
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(tiny, _mm512_scalef_ps(p, whole), _mm512_setzero_ps());
}

// The low bits of each lane as an exponent.
EFFKERN_INLINE Vec as_exponent(Vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }

// The same lanes in float64.
struct Wide {
  __m512d low, high;
};
EFFKERN_INLINE Wide widen(Vec x) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(high)};
}
EFFKERN_INLINE Vec narrow(Wide x) {
  const __m512d low = _mm512_castps_pd(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.low)));
  return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(_mm512_cvtpd_ps(x.high)), 1));
}
EFFKERN_INLINE Wide wide_set(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
EFFKERN_INLINE Wide wide_load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
EFFKERN_INLINE void wide_store(double* p, Wide x) { _mm512_storeu_pd(p, x.low), _mm512_storeu_pd(p + 8, x.high); }
EFFKERN_INLINE Wide wide_add(Wide a, Wide b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }
EFFKERN_INLINE Wide wide_sub(Wide a, Wide b) { return {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)}; }
EFFKERN_INLINE Wide wide_mul(Wide a, Wide b) { return {_mm512_mul_pd(a.low, b.low), _mm512_mul_pd(a.high, b.high)}; }
EFFKERN_INLINE Wide wide_min(Wide a, Wide b) { return {_mm512_min_pd(a.low, b.low), _mm512_min_pd(a.high, b.high)}; }
EFFKERN_INLINE Wide wide_fma(Wide a, Wide b, Wide c) {
  return {_mm512_fmadd_pd(a.low, b.low, c.low), _mm512_fmadd_pd(a.high, b.high, c.high)};
}

// 32-bit words, one a lane.
using Words = __m512i;
EFFKERN_INLINE Words words_set(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
EFFKERN_INLINE Words words_load(const uint32_t* p) { return _mm512_loadu_si512(p); }
EFFKERN_INLINE Words words_add(Words a, Words b) { return _mm512_add_epi32(a, b); }
EFFKERN_INLINE Words words_xor(Words a, Words b) { return _mm512_xor_si512(a, b); }
// The low halves of the 64-bit products; the high ones go to *high.
EFFKERN_INLINE Words words_multiply(Words a, Words b, Words* high) {
  const Words even = _mm512_mul_epu32(a, b);
  const Words odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
// x in lanes whose word is at least `limit` (unsigned), else 0.
EFFKERN_INLINE Vec keep_at_least(Words word, Words limit, Vec x) {
  return _mm512_mask_blend_ps(_mm512_cmpge_epu32_mask(word, limit), _mm512_setzero_ps(), x);
}
// x in lanes whose word has its top bit set, else minus infinity.
EFFKERN_INLINE Vec keep_top_bit(Words word, Vec x) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(word), _mm512_set1_ps(-INFINITY), x);
}

EFFKERN_INLINE Vec load_full(const float* p) { return _mm512_loadu_ps(p); }
EFFKERN_INLINE Vec load_full(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
EFFKERN_INLINE Vec load_full(const Fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Sixteen fp32 values rounded to nearest even.
EFFKERN_INLINE __m256i to_bf16(Vec x) {
#if defined(EFFKERN_UNIT_BF16)
  return native_to_bf16(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
#endif
}

EFFKERN_INLINE void store_full(float* p, Vec x) { _mm512_storeu_ps(p, x); }
EFFKERN_INLINE void store_full(Bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x)); }
EFFKERN_INLINE void store_full(Fp16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// In place: row r, lane c becomes row c, lane r.
EFFKERN_INLINE void transpose(Vec r[16]) {
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
