// Fourier transforms for convolution, in the vector vocabulary of simd.h.
//
// A block of n numbers is a polynomial modulo x^n - e^(2 pi i phase). With m = n / R,
//
//   x^n - e^(2 pi i phase)  is the product over p of  x^m - e^(2 pi i (phase + p) / R),
//
// so one pass takes the block to its R remainders: column j of remainder p is sum_q a[j + q m] t^q e^(2 pi i p q / R)
// with t = e^(2 pi i phase / R). Factors depend on the block alone, not on the column. Passes go on until the blocks
// are single numbers; products of two spectra are products of the polynomials, and going back needs no reordering.
// Starting from phase 1/4, x^n = i: the product of two real polynomials then has its first n coefficients in the real
// part and the others in the imaginary part, so a causal convolution needs neither zero padding nor real transforms.
//
// Complex arrays keep kLanes real parts and then kLanes imaginary parts, alternating. Sizes are counted in elements.
#pragma once

#include "core/cpu/fft_tables.h"

#define EFFKERN_UNROLL _Pragma("GCC unroll 16")

namespace effkern {
namespace EFFKERN_UNIT {

struct Complex {
  Vec re, im;
};

EFFKERN_INLINE Complex complex_load(const float* p) { return {vload(p), vload(p + kLanes)}; }
EFFKERN_INLINE void complex_store(float* p, Complex x) {
  vstore(p, x.re);
  vstore(p + kLanes, x.im);
}
EFFKERN_INLINE Complex complex_broadcast(const float* p) { return {vbroadcast(p), vbroadcast(p + 1)}; }
EFFKERN_INLINE Complex operator+(Complex a, Complex b) { return {vadd(a.re, b.re), vadd(a.im, b.im)}; }
EFFKERN_INLINE Complex operator-(Complex a, Complex b) { return {vsub(a.re, b.re), vsub(a.im, b.im)}; }

// a w, or a times the conjugate of w.
template <bool kConjugate>
EFFKERN_INLINE Complex times(Complex a, Complex w) {
  if (kConjugate) return {vfma(a.re, w.re, vmul(a.im, w.im)), vfms(a.im, w.re, vmul(a.re, w.im))};
  return {vfms(a.re, w.re, vmul(a.im, w.im)), vfma(a.re, w.im, vmul(a.im, w.re))};
}

// a + i b, or a - i b.
template <bool kMinus>
EFFKERN_INLINE Complex plus_i(Complex a, Complex b) {
  if (kMinus) return {vadd(a.re, b.im), vsub(a.im, b.re)};
  return {vsub(a.re, b.im), vadd(a.im, b.re)};
}

// e^(2 pi i k / 16), k from 0 to 7 in the first half of the circle.
constexpr float kCircleCos[8] = {1.0f, 0.923879533f,  0.707106781f,  0.382683432f,
                                 0.0f, -0.382683432f, -0.707106781f, -0.923879533f};
constexpr float kCircleSin[8] = {0.0f, 0.382683432f, 0.707106781f, 0.923879533f,
                                 1.0f, 0.923879533f, 0.707106781f, 0.382683432f};

// x[p] becomes sum_q x[q] e^(2 pi i p q / R); with a minus sign in the exponent where kInverse.
template <int R, bool kInverse>
struct Dft;

template <bool kInverse>
struct Dft<1, kInverse> {
  EFFKERN_INLINE void apply(Complex*) {}
};

template <bool kInverse>
struct Dft<2, kInverse> {
  EFFKERN_INLINE void apply(Complex* x) {
    const Complex a = x[0], b = x[1];
    x[0] = a + b;
    x[1] = a - b;
  }
};

template <bool kInverse>
struct Dft<4, kInverse> {
  EFFKERN_INLINE void apply(Complex* x) {
    const Complex even = x[0] + x[2], odd = x[1] + x[3], a = x[0] - x[2], b = x[1] - x[3];
    x[0] = even + odd;
    x[2] = even - odd;
    x[1] = plus_i<kInverse>(a, b);
    x[3] = plus_i<!kInverse>(a, b);
  }
};

template <bool kInverse>
struct Dft<3, kInverse> {
  EFFKERN_INLINE void apply(Complex* x) {
    const Vec half = vset(-0.5f), root = vset(0.866025404f);
    const Complex sum = x[1] + x[2], gap = x[1] - x[2];
    const Complex a = {vfma(half, sum.re, x[0].re), vfma(half, sum.im, x[0].im)};
    const Complex b = {vmul(root, gap.re), vmul(root, gap.im)};
    x[0] = x[0] + sum;
    x[1] = plus_i<kInverse>(a, b);
    x[2] = plus_i<!kInverse>(a, b);
  }
};

template <bool kInverse>
struct Dft<5, kInverse> {
  EFFKERN_INLINE void apply(Complex* x) {
    const Vec c1 = vset(0.309016994f), c2 = vset(-0.809016994f), s1 = vset(0.951056516f), s2 = vset(0.587785252f);
    const Complex near = x[1] + x[4], far = x[2] + x[3], near_gap = x[1] - x[4], far_gap = x[2] - x[3];
    const Complex a1 = {vfma(c1, near.re, vfma(c2, far.re, x[0].re)), vfma(c1, near.im, vfma(c2, far.im, x[0].im))};
    const Complex a2 = {vfma(c2, near.re, vfma(c1, far.re, x[0].re)), vfma(c2, near.im, vfma(c1, far.im, x[0].im))};
    const Complex b1 = {vfma(s1, near_gap.re, vmul(s2, far_gap.re)), vfma(s1, near_gap.im, vmul(s2, far_gap.im))};
    const Complex b2 = {vfms(s2, near_gap.re, vmul(s1, far_gap.re)), vfms(s2, near_gap.im, vmul(s1, far_gap.im))};
    x[0] = x[0] + (near + far);
    x[1] = plus_i<kInverse>(a1, b1);
    x[4] = plus_i<!kInverse>(a1, b1);
    x[2] = plus_i<kInverse>(a2, b2);
    x[3] = plus_i<!kInverse>(a2, b2);
  }
};

// x times e^(2 pi i k / 16).
template <bool kInverse, int k>
EFFKERN_INLINE Complex turned(Complex x) {
  if (k == 0) return x;
  if (k == 4) return kInverse ? Complex{x.im, vsub(vzero(), x.re)} : Complex{vsub(vzero(), x.im), x.re};
  if (k == 2) {
    const Vec root = vset(kCircleCos[2]);
    if (kInverse) return {vmul(root, vadd(x.re, x.im)), vmul(root, vsub(x.im, x.re))};
    return {vmul(root, vsub(x.re, x.im)), vmul(root, vadd(x.re, x.im))};
  }
  if (k == 9) return times<kInverse>(x, {vset(-kCircleCos[1]), vset(-kCircleSin[1])});
  return times<kInverse>(x, {vset(kCircleCos[k % 8]), vset(kCircleSin[k % 8])});
}

template <bool kInverse>
struct Dft<8, kInverse> {
  EFFKERN_INLINE void apply(Complex* x) {
    Complex even[4] = {x[0], x[2], x[4], x[6]}, odd[4] = {x[1], x[3], x[5], x[7]};
    Dft<4, kInverse>::apply(even);
    Dft<4, kInverse>::apply(odd);
    odd[1] = turned<kInverse, 2>(odd[1]);
    odd[3] = turned<kInverse, 6>(odd[3]);
    x[0] = even[0] + odd[0];
    x[4] = even[0] - odd[0];
    x[1] = even[1] + odd[1];
    x[5] = even[1] - odd[1];
    x[2] = plus_i<kInverse>(even[2], odd[2]);
    x[6] = plus_i<!kInverse>(even[2], odd[2]);
    x[3] = even[3] + odd[3];
    x[7] = even[3] - odd[3];
  }
};

template <bool kInverse>
struct Dft<16, kInverse> {
  template <int q>
  EFFKERN_INLINE void gather(const Complex* x, Complex* y) {  // the sums over every fourth input, turned
    Complex z[4] = {x[q], x[q + 4], x[q + 8], x[q + 12]};
    Dft<4, kInverse>::apply(z);
    y[q] = z[0];
    y[q + 4] = turned<kInverse, q>(z[1]);
    y[q + 8] = turned<kInverse, 2 * q>(z[2]);
    y[q + 12] = turned<kInverse, 3 * q>(z[3]);
  }
  EFFKERN_INLINE void apply(Complex* x) {
    Complex y[16];
    gather<0>(x, y);
    gather<1>(x, y);
    gather<2>(x, y);
    gather<3>(x, y);
    EFFKERN_UNROLL
    for (int p = 0; p < 4; ++p) {
      Complex z[4] = {y[4 * p], y[4 * p + 1], y[4 * p + 2], y[4 * p + 3]};
      Dft<4, kInverse>::apply(z);
      EFFKERN_UNROLL
      for (int r = 0; r < 4; ++r) x[p + 4 * r] = z[r];
    }
  }
};

// A block of R m numbers to its R remainders; `factors` are t, t^2, ... . The input may be real, or the output's place.
template <int R, bool kReal>
static void split_block(const float* in, float* out, int64_t m, const float* factors) {
  for (int64_t j = 0; j < m; j += kLanes) {
    Complex x[R];
    EFFKERN_UNROLL
    for (int q = 0; q < R; ++q) {
      const int64_t at = j + q * m;
      if (kReal) {
        const Vec value = vload(in + at);
        x[q] = {value, vzero()};
        if (q > 0) x[q] = {vmul(value, vbroadcast(factors + 2 * q - 2)), vmul(value, vbroadcast(factors + 2 * q - 1))};
      } else {
        x[q] = complex_load(in + 2 * at);
        if (q > 0) x[q] = times<false>(x[q], complex_broadcast(factors + 2 * q - 2));
      }
    }
    Dft<R, false>::apply(x);
    EFFKERN_UNROLL
    for (int p = 0; p < R; ++p) complex_store(out + 2 * (j + p * m), x[p]);
  }
}

// R times the block whose remainders are given. With kReal only its real part is written.
template <int R, bool kReal>
static void join_block(const float* in, float* out, int64_t m, const float* factors) {
  for (int64_t j = 0; j < m; j += kLanes) {
    Complex x[R];
    EFFKERN_UNROLL
    for (int p = 0; p < R; ++p) x[p] = complex_load(in + 2 * (j + p * m));
    Dft<R, true>::apply(x);
    EFFKERN_UNROLL
    for (int q = 0; q < R; ++q) {
      const int64_t at = j + q * m;
      const Complex t = q > 0 ? complex_broadcast(factors + 2 * q - 2) : Complex{vzero(), vzero()};
      if (kReal) {
        vstore(out + at, q > 0 ? vfma(x[q].re, t.re, vmul(x[q].im, t.im)) : x[q].re);
      } else {
        complex_store(out + 2 * at, q > 0 ? times<true>(x[q], t) : x[q]);
      }
    }
  }
}

template <bool kReal>
static void split(const FftLevel& level, int64_t block, const float* in, float* out) {
  const float* factors = level.factors + block * 2 * (level.radix - 1);
  switch (level.radix) {
    case 1: return split_block<1, kReal>(in, out, level.remainder, factors);
    case 2: return split_block<2, kReal>(in, out, level.remainder, factors);
    case 3: return split_block<3, kReal>(in, out, level.remainder, factors);
    case 4: return split_block<4, kReal>(in, out, level.remainder, factors);
    case 5: return split_block<5, kReal>(in, out, level.remainder, factors);
    default: return split_block<8, kReal>(in, out, level.remainder, factors);
  }
}

template <bool kReal>
static void join(const FftLevel& level, int64_t block, const float* in, float* out) {
  const float* factors = level.factors + block * 2 * (level.radix - 1);
  switch (level.radix) {
    case 1: return join_block<1, kReal>(in, out, level.remainder, factors);
    case 2: return join_block<2, kReal>(in, out, level.remainder, factors);
    case 3: return join_block<3, kReal>(in, out, level.remainder, factors);
    case 4: return join_block<4, kReal>(in, out, level.remainder, factors);
    case 5: return join_block<5, kReal>(in, out, level.remainder, factors);
    default: return join_block<8, kReal>(in, out, level.remainder, factors);
  }
}

// The last two passes, on kLanes vectors: across the vectors, then, transposed, across what were the lanes. Factors of
// the first pass are numbers, those of the second, which works on kLanes blocks at once, are vectors.
struct Leaf {
  Complex x[kLanes];
};

EFFKERN_INLINE void transpose(Leaf& leaf) {
  Vec part[kLanes];
  EFFKERN_UNROLL
  for (int i = 0; i < kLanes; ++i) part[i] = leaf.x[i].re;
  transpose(part);
  EFFKERN_UNROLL
  for (int i = 0; i < kLanes; ++i) leaf.x[i].re = part[i];
  EFFKERN_UNROLL
  for (int i = 0; i < kLanes; ++i) part[i] = leaf.x[i].im;
  transpose(part);
  EFFKERN_UNROLL
  for (int i = 0; i < kLanes; ++i) leaf.x[i].im = part[i];
}

EFFKERN_INLINE void leaf_split(const float* data, const float* factors, Leaf& leaf) {
  EFFKERN_UNROLL
  for (int q = 0; q < kLanes; ++q) {
    leaf.x[q] = complex_load(data + 2 * kLanes * q);
    if (q > 0) leaf.x[q] = times<false>(leaf.x[q], complex_broadcast(factors + 2 * q));
  }
  Dft<kLanes, false>::apply(leaf.x);
  transpose(leaf);
  EFFKERN_UNROLL
  for (int q = 1; q < kLanes; ++q) leaf.x[q] = times<false>(leaf.x[q], complex_load(factors + 2 * kLanes * q));
  Dft<kLanes, false>::apply(leaf.x);
}

EFFKERN_INLINE void leaf_join(Leaf& leaf, const float* factors, float* data) {
  Dft<kLanes, true>::apply(leaf.x);
  EFFKERN_UNROLL
  for (int q = 1; q < kLanes; ++q) leaf.x[q] = times<true>(leaf.x[q], complex_load(factors + 2 * kLanes * q));
  transpose(leaf);
  Dft<kLanes, true>::apply(leaf.x);
  EFFKERN_UNROLL
  for (int q = 0; q < kLanes; ++q) {
    if (q > 0) leaf.x[q] = times<true>(leaf.x[q], complex_broadcast(factors + 2 * q));
    complex_store(data + 2 * kLanes * q, leaf.x[q]);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
