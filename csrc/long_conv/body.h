// Convolution of a channel, forward. Block i of the outputs starts at position i * size; F being the product with the
// taps in the ring, whose imaginary part is what spills into the next block, the outputs of a block are the real part
// of F(x_i - i x_(i-1)): the block before rides along in the imaginary part.
#pragma once

#include "long_conv/ring_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

using long_conv::Signal;

// One sequence of a batch, or none. Positions may lie outside [0, length): zeros are read there and nothing is written.
template <class T>
struct Sequence {
  T* data;
  int64_t length;

  EFFKERN_MEMBER Sequence(const Signal& signal, int64_t batch, int64_t length_in)
      : data(signal.data ? static_cast<T*>(signal.data) + batch * signal.batch_stride : nullptr),
        length(length_in) {}

  EFFKERN_MEMBER bool holds(int64_t n, int64_t count) const { return n >= 0 && n + count <= length; }

  EFFKERN_MEMBER Vec read(int64_t n) const {
    if (holds(n, kLanes)) return load_full(data + n);
    if (n <= -kLanes || n >= length) return vzero();
    if (n >= 0) return load_some(data + n, length - n);
    T some[kLanes];
    memset(some, 0, sizeof some);
    memcpy(some - n, data, min64(kLanes + n, length) * sizeof(T));
    return load_full(some);
  }

  EFFKERN_MEMBER void write(int64_t n, Vec x) const {
    if (n >= 0) {
      if (n < length) store_some(data + n, x, length - n);
      return;
    }
    if (n <= -kLanes) return;
    T some[kLanes];
    store_full(some, x);
    memcpy(data, some - n, min64(kLanes + n, length) * sizeof(T));
  }
};

// A sequence times its gate, where it has one.
template <class T>
struct Gated {
  Sequence<T> signal, gate;

  EFFKERN_MEMBER Vec read(int64_t n) const {
    const Vec x = signal.read(n);
    return gate.data ? vmul(x, gate.read(n)) : x;
  }

  // Positions n to n + count, `sign` times, every `step` floats a vector.
  EFFKERN_MEMBER void copy(int64_t n, int64_t count, float sign, float* out, int64_t step) const {
    const Vec factor = vset(sign);
    if (!signal.holds(n, count)) {
      for (int64_t c = 0; c < count; c += kLanes, out += step) vstore(out, vmul(factor, read(n + c)));
    } else if (!gate.data) {
      const T* x = signal.data + n;
      for (int64_t c = 0; c < count; c += kLanes, out += step) vstore(out, vmul(factor, load_full(x + c)));
    } else {
      const T *x = signal.data + n, *g = gate.data + n;
      for (int64_t c = 0; c < count; c += kLanes, out += step)
        vstore(out, vmul(factor, vmul(load_full(x + c), load_full(g + c))));
    }
  }
};

// Loads x_n + i sign x_(n + shift), n counted from `begin`; without the imaginary part where sign is 0.
template <class T>
static void load_sequence(const Scratch& scratch, const Gated<T>& x, int64_t begin, float sign, int64_t shift,
                          float* rows) {
  if (sign == 0.0f) {
    load_rows<false>(
        scratch, [&](int64_t n, int64_t count, float* out) { x.copy(begin + n, count, 1.0f, out, kLanes); }, rows);
    return;
  }
  const auto fill = [&](int64_t n, int64_t count, float* out) {
    x.copy(begin + n, count, 1.0f, out, 2 * kLanes);
    x.copy(begin + shift + n, count, sign, out + kLanes, 2 * kLanes);
  };
  load_rows<true>(scratch, fill, rows);
}

// Taps that look ahead stand at the negative powers of x: x^-j = -i x^(size - j).
static void make_spectrum(const Scratch& scratch, const Taps& taps, float* target) {
  const Plan& plan = scratch.plan;
  const float scale = 1.0f / static_cast<float>(plan.size);
  const Gated<float> causal{{{const_cast<float*>(taps.causal), 0}, 0, taps.count}, {{nullptr, 0}, 0, 0}};
  if (!taps.anti) {
    load_rows<false>(
        scratch, [&](int64_t n, int64_t count, float* out) { causal.copy(n, count, scale, out, kLanes); }, scratch.a);
  } else {
    const auto fill = [&](int64_t n, int64_t count, float* out) {
      causal.copy(n, count, scale, out, 2 * kLanes);
      if (n == 0) out[0] += scale * taps.anti[0];
      for (int64_t c = 0; c < count; ++c) {
        const int64_t lag = plan.size - n - c;
        out[c / kLanes * 2 * kLanes + kLanes + c % kLanes] = lag < taps.count ? -scale * taps.anti[lag] : 0.0f;
      }
    };
    load_rows<true>(scratch, fill, scratch.a);
  }
  work_on_rows<Step::spectrum>(scratch, {scratch.a, nullptr, nullptr, target, true});
}

static void spectrum(const Plan& plan, const Team& team, const Taps& taps, float* target, void* memory) {
  make_spectrum(Scratch(plan, team, false, memory), taps, target);
}

// A block of outputs, without skip and gate, from position `begin` of x on; take(n, count, numbers) gets them.
template <class T, class Take>
EFFKERN_INLINE void convolve_block(const Scratch& scratch, const Gated<T>& x, int64_t begin, int64_t count,
                                   const float* k, const Take& take) {
  load_sequence(scratch, x, begin, begin > 0 ? -1.0f : 0.0f, -scratch.plan.size, scratch.a);
  work_on_rows<Step::convolve>(scratch, {scratch.a, nullptr, k, nullptr, false});
  store_rows(scratch, scratch.a, count, take);
}

template <class T>
static void forward(const long_conv::Forward& t) {
  const Plan& plan = *t.plan;
  const Scratch scratch(plan, *t.team, false, t.scratch);
  const float* k = t.spectrum;
  if (!k) {
    make_spectrum(scratch, t.taps, scratch.k);
    k = scratch.k;
  }
  const bool skips = t.skip != 0.0f;
  const Vec skip = vset(t.skip);
  for (int64_t batch = t.batch_begin; batch < t.batch_end; ++batch) {
    const int64_t total = t.history + t.length;
    const Gated<T> x{{t.u, batch, total}, {t.pre_gate, batch, total}};
    const Sequence<T> post(t.post_gate, batch, t.length), out(t.out, batch, t.length);
    for (int64_t block = 0; block < t.length; block += plan.size) {
      const int64_t begin = t.history + block;
      convolve_block(scratch, x, begin, min64(plan.size, t.length - block), k,
                     [&](int64_t n, int64_t count, const float* numbers) {
                       if (!skips && !post.data && out.holds(block + n, count)) {
                         T* target = out.data + block + n;
                         for (int64_t c = 0; c < count; c += kLanes) store_full(target + c, vload(numbers + c));
                         return;
                       }
                       for (int64_t c = n; c < n + count; c += kLanes, numbers += kLanes) {
                         Vec y = vload(numbers);
                         if (skips) y = vfma(skip, x.read(begin + c), y);
                         if (post.data) y = vmul(y, post.read(block + c));
                         out.write(block + c, y);
                       }
                     });
    }
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
