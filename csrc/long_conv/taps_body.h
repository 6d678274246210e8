// A handful of taps: the direct convolution of short_conv/direct_body.h, stretch by stretch.
#pragma once

#include "long_conv/backward_body.h"
#include "short_conv/direct_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

constexpr int64_t kTapStretch = 1024;  // outputs at a time: they and what they read stay in L1

static int64_t taps_line_floats(int64_t taps) { return round_up(kTapStretch + taps + kDirectBlock, 16); }

static int64_t taps_scratch_floats(const Plan*, const Taps& taps, bool, int64_t) {
  return 2 * taps_line_floats(taps.count) + round_up(taps.count, 16) + round_up(taps.count, kTapGroup) * kLanes;
}

struct TapsScratch {
  float *line, *grad_line, *reversed, *sums;  // sums: a vector for every tap, counted from the last

  TapsScratch(const Taps& taps, void* memory) {
    line = static_cast<float*>(memory);
    grad_line = line + taps_line_floats(taps.count);
    reversed = grad_line + taps_line_floats(taps.count);
    sums = reversed + round_up(taps.count, 16);
    for (int64_t i = 0; i < taps.count; ++i) reversed[i] = taps.causal[taps.count - 1 - i];
    memset(sums, 0, round_up(taps.count, kTapGroup) * kLanes * sizeof(float));
  }
};

// Inputs begin to begin + count and those that the taps reach before them.
template <class T>
static void read_stretch(const Gated<T>& x, int64_t begin, const Taps& taps, int64_t count,
                         const TapsScratch& scratch) {
  const int64_t reach = taps.count - 1;
  x.copy(begin - reach, round_up(reach + count, kLanes), 1.0f, scratch.line, kLanes);
  memset(scratch.line + reach + count, 0, kDirectBlock * sizeof(float));
}

// Calls finish(n, y) for vectors of outputs begin to begin + count, of which the line holds the inputs; y is without
// skip and gate.
template <class Finish>
EFFKERN_INLINE void convolve_stretch(const Taps& taps, int64_t begin, int64_t count, const TapsScratch& scratch,
                                     const Finish& finish) {
  direct_convolve<0>(scratch.line, scratch.reversed, taps.count, vzero(), count,
                     [&](int64_t i, Vec sum, int64_t) { finish(begin + i, sum); });
}

template <class T>
static void taps_forward(const long_conv::Forward& t) {
  const TapsScratch scratch(t.taps, t.scratch);
  const Vec skip = vset(t.skip);
  for (int64_t batch = t.batch_begin; batch < t.batch_end; ++batch) {
    const int64_t total = t.history + t.length;
    const Gated<T> x{{t.u, batch, total}, {t.pre_gate, batch, total}};
    const Sequence<T> post(t.post_gate, batch, t.length), out(t.out, batch, t.length);
    for (int64_t begin = 0; begin < t.length; begin += kTapStretch) {
      const int64_t count = min64(kTapStretch, t.length - begin);
      read_stretch(x, t.history + begin, t.taps, count, scratch);
      convolve_stretch(t.taps, begin, count, scratch, [&](int64_t n, Vec y) {
        if (t.skip != 0.0f) y = vfma(skip, x.read(t.history + n), y);
        if (post.data) y = vmul(y, post.read(n));
        out.write(n, y);
      });
    }
  }
}

// Gradients of the taps, summed, and of the gate behind: both need the inputs of a stretch.
template <class T>
static void taps_backward_outputs(const long_conv::Backward& t, const Gated<T>& x, const Gated<T>& g,
                                  const Sequence<T>& grad_post, const TapsScratch& scratch) {
  for (int64_t begin = 0; begin < t.length; begin += kTapStretch) {
    const int64_t count = min64(kTapStretch, t.length - begin);
    read_stretch(x, t.history + begin, t.taps, count, scratch);
    if (grad_post.data)
      convolve_stretch(t.taps, begin, count, scratch, [&](int64_t n, Vec y) {
        if (t.skip != 0.0f) y = vfma(vset(t.skip), x.read(t.history + n), y);
        grad_post.write(n, vmul(y, g.signal.read(n)));
      });
    if (!t.grad_causal) continue;
    g.copy(begin, round_up(count, kLanes), 1.0f, scratch.grad_line, kLanes);
    // In short runs: a sum of sums rounds less.
    for (int64_t i = 0; i < count; i += 256)
      direct_tap_sums(scratch.line + i, scratch.grad_line + i, t.taps.count, min64(256, count - i), scratch.sums);
  }
}

template <class T>
static void taps_backward_inputs(const long_conv::Backward& t, int64_t batch, const Gated<T>& x, const Gated<T>& g,
                                 const TapsScratch& scratch) {
  const int64_t total = t.history + t.length;
  const Sequence<T> grad_u(t.grad_u, batch, total), grad_pre(t.grad_pre, batch, total);
  const Vec skip = vset(t.skip);
  for (int64_t begin = 0; begin < total; begin += kTapStretch) {
    const int64_t count = min64(kTapStretch, total - begin), read = t.taps.count - 1 + count;
    g.copy(begin - t.history, round_up(read, kLanes), 1.0f, scratch.grad_line, kLanes);
    memset(scratch.grad_line + read, 0, kDirectBlock * sizeof(float));
    direct_convolve<0>(scratch.grad_line, t.taps.causal, t.taps.count, vzero(), count,
                       [&](int64_t i, Vec grad_x, int64_t) {
                         const int64_t n = begin + i;
                         if (t.skip != 0.0f) grad_x = vfma(skip, g.read(n - t.history), grad_x);
                         if (grad_pre.data) grad_pre.write(n, vmul(grad_x, x.signal.read(n)));
                         if (!grad_u.data) return;
                         if (x.gate.data) grad_x = vmul(grad_x, x.gate.read(n));
                         grad_u.write(n, grad_x);
                       });
  }
}

template <class T>
static void taps_backward(const long_conv::Backward& t) {
  const TapsScratch scratch(t.taps, t.scratch);
  double skip = 0.0;
  for (int64_t batch = t.batch_begin; batch < t.batch_end; ++batch) {
    const int64_t total = t.history + t.length;
    const Gated<T> x{{t.u, batch, total}, {t.pre_gate, batch, total}};
    const Gated<T> g{{t.grad_out, batch, t.length}, {t.post_gate, batch, t.length}};
    if (t.grad_skip) skip += inner_product(*t.team, g, x, t.history);
    if (t.grad_causal || t.grad_post.data)
      taps_backward_outputs(t, x, g, Sequence<T>(t.grad_post, batch, t.length), scratch);
    if (t.grad_u.data || t.grad_pre.data) taps_backward_inputs(t, batch, x, g, scratch);
  }
  if (t.grad_skip) *t.grad_skip = static_cast<float>(skip);
  if (!t.grad_causal) return;
  for (int64_t i = 0; i < t.taps.count; ++i)
    t.grad_causal[i] = sum_of_lanes(scratch.sums + (t.taps.count - 1 - i) * kLanes);
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
