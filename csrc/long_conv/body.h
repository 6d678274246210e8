// Convolution of a channel, forward. Block i of the outputs starts at position i * size; F being the product with the
// taps in the ring, whose imaginary part is what spills into the next block, the outputs of a block are the real part
// of F(x_i - i x_(i-1)): the block before rides along in the imaginary part.
#pragma once

#include "long_conv/ring_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

using long_conv::Signal;
using long_conv::Taps;

// One sequence of a batch, or none.
template <class T>
struct Sequence {
  T* data;

  EFFKERN_MEMBER Sequence(const Signal& signal, int64_t batch)
      : data(signal.data ? static_cast<T*>(signal.data) + batch * signal.batch_stride : nullptr) {}

  // Numbers from position n on; zero outside [0, length).
  EFFKERN_MEMBER Vec read(int64_t n, int64_t length) const {
    if (n >= 0 && n + kLanes <= length) return load_full(data + n);
    if (n <= -kLanes || n >= length) return vzero();
    if (n >= 0) return load_some(data + n, length - n);
    T some[kLanes];
    memset(some, 0, sizeof some);
    memcpy(some - n, data, min64(kLanes + n, length) * sizeof(T));
    return load_full(some);
  }

  EFFKERN_MEMBER void write(int64_t n, int64_t length, Vec x) const {
    if (n >= 0) return store_some(data + n, x, length - n);
    if (n <= -kLanes) return;
    T some[kLanes];
    store_full(some, x);
    memcpy(data, some - n, min64(kLanes + n, length) * sizeof(T));
  }
};

// What a channel is convolved with: u, times the gate where there is one.
template <class T>
struct Gated {
  Sequence<T> u, gate;
  int64_t length;

  EFFKERN_MEMBER Vec read(int64_t n) const {
    const Vec x = u.read(n, length);
    return gate.data ? vmul(x, gate.read(n, length)) : x;
  }
};

struct Nothing {
  EFFKERN_MEMBER Vec operator()(int64_t) const { return vzero(); }
};

static int64_t scratch_floats(const Plan& plan, bool backward) {
  // The rows of one or two sequences, the spectrum, its gradient, a tile; each starts on a cache line.
  const int64_t line = 16;
  return (backward ? 2 : 1) * round_up(rows_floats(plan), line) + (backward ? 2 : 1) * round_up(2 * plan.size, line) +
         round_up(tile_floats(plan), line);
}

struct Scratch {
  float *a, *b, *k, *d, *tile;

  Scratch(const Plan& plan, bool backward, void* memory) {
    float* next = static_cast<float*>(memory);
    const auto take = [&](bool wanted, int64_t floats) {
      float* taken = wanted ? next : nullptr;
      if (wanted) next += round_up(floats, 16);
      return taken;
    };
    a = take(true, rows_floats(plan));
    k = take(true, 2 * plan.size);
    tile = take(true, tile_floats(plan));
    b = take(backward, rows_floats(plan));
    d = take(backward, 2 * plan.size);
  }
};

// Taps that look ahead stand at the negative powers of x: x^-j = -i x^(size - j).
static void make_spectrum(const Plan& plan, const Taps& taps, float* target, float* rows, float* tile) {
  const Vec scale = vset(1.0f / static_cast<float>(plan.size));
  const auto causal = [&](int64_t n) { return vmul(scale, load_some(taps.causal + n, taps.count - n)); };
  if (!taps.anti) {
    load_rows<false>(plan, [&](int64_t n) { return n < taps.count ? causal(n) : vzero(); }, Nothing{}, rows, tile);
  } else {
    const auto element = [&](int64_t n) {
      const int64_t j = plan.size - n;
      return n > 0 && j < taps.count ? taps.anti[j] : 0.0f;
    };
    const auto ahead = [&](int64_t n) {
      float some[kLanes];
      for (int c = 0; c < kLanes; ++c) some[c] = -element(n + c);
      return vmul(scale, load_full(some));
    };
    const auto both = [&](int64_t n) {
      const Vec x = n < taps.count ? causal(n) : vzero();
      float first[kLanes] = {};
      first[0] = taps.anti[0];
      return n == 0 ? vfma(scale, load_full(first), x) : x;
    };
    load_rows<true>(plan, both, ahead, rows, tile);
  }
  work_on_rows<Step::spectrum>(plan, {rows, nullptr, nullptr, target});
}

static void spectrum(const Plan& plan, const Taps& taps, float* target, void* memory) {
  const Scratch scratch(plan, false, memory);
  make_spectrum(plan, taps, target, scratch.a, scratch.tile);
}

// Calls write(t, y_t) for the convolution, without skip, of every position of one block.
template <class T, class Write>
EFFKERN_INLINE void convolve_block(const Plan& plan, const Gated<T>& x, int64_t begin, int64_t end, const float* k,
                                   const Scratch& scratch, const Write& write) {
  const auto now = [&](int64_t n) { return x.read(begin + n); };
  const auto before = [&](int64_t n) { return vsub(vzero(), x.read(begin - plan.size + n)); };
  if (begin > 0) {
    load_rows<true>(plan, now, before, scratch.a, scratch.tile);
  } else {
    load_rows<false>(plan, now, Nothing{}, scratch.a, scratch.tile);
  }
  work_on_rows<Step::convolve>(plan, {scratch.a, nullptr, k, nullptr});
  store_rows(plan, scratch.a, end - begin, scratch.tile, write);
}

template <class T>
static void forward(const long_conv::Forward& t) {
  const Plan& plan = *t.plan;
  const Scratch scratch(plan, false, t.scratch);
  const float* k = t.spectrum;
  if (!k) {
    make_spectrum(plan, t.taps, scratch.k, scratch.a, scratch.tile);
    k = scratch.k;
  }
  const Vec skip = vset(t.skip);
  for (int64_t batch = t.batch_begin; batch < t.batch_end; ++batch) {
    const Gated<T> x{{t.u, batch}, {t.pre_gate, batch}, t.history + t.length};
    const Sequence<T> post(t.post_gate, batch), out(t.out, batch);
    for (int64_t block = 0; block < t.length; block += plan.size) {
      const int64_t begin = t.history + block, end = t.history + min64(t.length, block + plan.size);
      convolve_block(plan, x, begin, end, k, scratch, [&](int64_t n, Vec y) {
        if (t.skip != 0.0f) y = vfma(skip, x.read(begin + n), y);
        if (post.data) y = vmul(y, post.read(block + n, t.length));
        out.write(block + n, t.length, y);
      });
    }
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
