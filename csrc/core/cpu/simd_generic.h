// The vector vocabulary in portable form: four fp32 lanes of the compiler's own vector type, which every 64-bit
// CPU has (SSE2, NEON). Included inside an ISA unit's namespace.

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int VecInt __attribute__((vector_size(16)));

EFFKERN_INLINE Vec vzero() { return Vec{0, 0, 0, 0}; }
EFFKERN_INLINE Vec vset(float x) { return Vec{x, x, x, x}; }
EFFKERN_INLINE Vec vload(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
EFFKERN_INLINE void vstore(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
EFFKERN_INLINE Vec vbroadcast(const float* p) { return vset(*p); }
EFFKERN_INLINE Vec vadd(Vec a, Vec b) { return a + b; }
EFFKERN_INLINE Vec vsub(Vec a, Vec b) { return a - b; }
EFFKERN_INLINE Vec vmul(Vec a, Vec b) { return a * b; }
EFFKERN_INLINE Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }
EFFKERN_INLINE Vec vfms(Vec a, Vec b, Vec c) { return a * b - c; }
EFFKERN_INLINE Vec vselect(VecInt mask, Vec yes, Vec no) { return (Vec)((mask & (VecInt)yes) | (~mask & (VecInt)no)); }
// Where either is NaN both return the second argument: keep a running maximum second.
EFFKERN_INLINE Vec vmax(Vec a, Vec b) { return vselect(a > b, a, b); }
EFFKERN_INLINE Vec vmin(Vec a, Vec b) { return vselect(a < b, a, b); }
EFFKERN_INLINE Vec vdiv(Vec a, Vec b) { return a / b; }
// To the nearest whole number, ties to even; zeros keep their sign.
EFFKERN_INLINE Vec vround(Vec x) {
  const Vec magnitude = (Vec)((VecInt)x & 0x7fffffff), shifter = vset(8388608.0f);  // 2^23: what is as large is whole
  const Vec rounded = vselect(magnitude < shifter, (magnitude + shifter) - shifter, magnitude);
  return (Vec)((VecInt)rounded | ((VecInt)x & ~0x7fffffff));
}

EFFKERN_INLINE bool any_greater(Vec a, Vec b) {
  const VecInt m = a > b;
  return (m[0] | m[1] | m[2] | m[3]) != 0;
}

// yes in lanes where a > b, else no.
EFFKERN_INLINE Vec select_greater(Vec a, Vec b, Vec yes, Vec no) { return vselect(a > b, yes, no); }

// b where a is minus infinity, else a.
EFFKERN_INLINE Vec replace_minus_infinity(Vec a, Vec b) { return vselect(a == vset(-INFINITY), b, a); }

// 2^x for x <= 127, relative error below 2e-7; exactly 0 below -126, NaN stays NaN.
EFFKERN_INLINE Vec vexp2(Vec x) {
  const Vec shifter = vset(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const Vec shifted = x + shifter;
  const Vec f = x - (shifted - shifter);
  Vec p = vset(kExp2Coefficients[0]);
  for (int i = 1; i < kExp2Terms; ++i) p = p * f + vset(kExp2Coefficients[i]);
  typedef unsigned VecUnsigned __attribute__((vector_size(16)));
  const VecUnsigned exponent = ((VecUnsigned)shifted << 23) + 0x3f800000u;
  return vselect(x < vset(-126.0f), vzero(), p * (Vec)exponent);
}

// The low bits of each lane as an exponent.
EFFKERN_INLINE Vec as_exponent(Vec x) {
  typedef unsigned VecUnsigned __attribute__((vector_size(16)));
  return (Vec)((VecUnsigned)x << 23);
}

// The same lanes in float64.
typedef double Pair __attribute__((vector_size(16)));
struct Wide {
  Pair low, high;
};
EFFKERN_INLINE Wide widen(Vec x) { return {Pair{x[0], x[1]}, Pair{x[2], x[3]}}; }
EFFKERN_INLINE Vec narrow(Wide x) {
  return Vec{static_cast<float>(x.low[0]), static_cast<float>(x.low[1]), static_cast<float>(x.high[0]),
             static_cast<float>(x.high[1])};
}
EFFKERN_INLINE Wide wide_set(double x) { return {Pair{x, x}, Pair{x, x}}; }
EFFKERN_INLINE Wide wide_load(const double* p) { return {Pair{p[0], p[1]}, Pair{p[2], p[3]}}; }
EFFKERN_INLINE void wide_store(double* p, Wide x) { __builtin_memcpy(p, &x, sizeof x); }
EFFKERN_INLINE Wide wide_add(Wide a, Wide b) { return {a.low + b.low, a.high + b.high}; }
EFFKERN_INLINE Wide wide_sub(Wide a, Wide b) { return {a.low - b.low, a.high - b.high}; }
EFFKERN_INLINE Wide wide_mul(Wide a, Wide b) { return {a.low * b.low, a.high * b.high}; }
EFFKERN_INLINE Pair pair_min(Pair a, Pair b) { return Pair{a[0] < b[0] ? a[0] : b[0], a[1] < b[1] ? a[1] : b[1]}; }
EFFKERN_INLINE Wide wide_min(Wide a, Wide b) { return {pair_min(a.low, b.low), pair_min(a.high, b.high)}; }
EFFKERN_INLINE Wide wide_fma(Wide a, Wide b, Wide c) { return wide_add(wide_mul(a, b), c); }

// 32-bit words, one a lane.
typedef uint32_t Words __attribute__((vector_size(16)));
EFFKERN_INLINE Words words_set(uint32_t x) { return Words{x, x, x, x}; }
EFFKERN_INLINE Words words_load(const uint32_t* p) {
  Words x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
EFFKERN_INLINE Words words_add(Words a, Words b) { return a + b; }
EFFKERN_INLINE Words words_xor(Words a, Words b) { return a ^ b; }
// The low halves of the 64-bit products; the high ones go to *high.
EFFKERN_INLINE Words words_multiply(Words a, Words b, Words* high) {
  for (int i = 0; i < kLanes; ++i) (*high)[i] = static_cast<uint32_t>((static_cast<uint64_t>(a[i]) * b[i]) >> 32);
  return a * b;
}
// x in lanes whose word is at least `limit` (unsigned), else 0.
EFFKERN_INLINE Vec keep_at_least(Words word, Words limit, Vec x) { return vselect(word >= limit, x, vzero()); }
// x in lanes whose word has its top bit set, else minus infinity.
EFFKERN_INLINE Vec keep_top_bit(Words word, Vec x) { return vselect((VecInt)word < 0, x, vset(-INFINITY)); }

EFFKERN_INLINE float widen(float x) { return x; }
EFFKERN_INLINE float widen(Bf16 x) {
  const unsigned bits = static_cast<unsigned>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}
EFFKERN_INLINE float widen(Fp16 x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 0x3ffu;
  unsigned bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    __builtin_memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

EFFKERN_INLINE void narrow(float x, float* p) { *p = x; }
EFFKERN_INLINE void narrow(float x, Bf16* p) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  p->bits = static_cast<unsigned short>(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
EFFKERN_INLINE void narrow(float x, Fp16* p) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const unsigned sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 aligns the mantissa, the FPU rounds
    float shifted;
    __builtin_memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    __builtin_memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<unsigned short>(sign | half);
}

template <class T>
EFFKERN_INLINE Vec load_full(const T* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
EFFKERN_INLINE void store_full(T* p, Vec x) {
  for (int i = 0; i < 4; ++i) narrow(x[i], p + i);
}

// In place: row r, lane c becomes row c, lane r.
EFFKERN_INLINE void transpose(Vec r[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = i + 1; j < 4; ++j) {
      const float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
}
