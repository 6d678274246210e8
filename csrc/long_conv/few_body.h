// A handful of outputs, such as one more token: sums of products, taps and inputs read once each. The taps are turned
// round first, so that both run the same way: output t is the sum over i of reversed[i] x[offset + t + i], where
// reversed[i] is tap count - 1 - i and offset is history - count + 1.
#pragma once

#include "long_conv/backward_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

static int64_t few_scratch_floats(const Plan*, const Taps& taps, bool, int64_t) {
  return 2 * round_up(taps.count + kLanes, 16);
}

struct FewScratch {
  float *reversed, *grad;

  // `grad` starts from zero.
  FewScratch(const Taps& taps, void* memory)
      : reversed(static_cast<float*>(memory)),
        grad(reversed + round_up(taps.count + kLanes, 16)) {
    for (int64_t i = 0; i < taps.count; ++i) reversed[i] = taps.causal[taps.count - 1 - i];
    memset(reversed + taps.count, 0, kLanes * sizeof(float));
    memset(grad, 0, (taps.count + kLanes) * sizeof(float));
  }
};

template <class T>
EFFKERN_INLINE float at(const Gated<T>& x, int64_t n) {
  float lanes[kLanes];
  vstore(lanes, x.read(n));
  return lanes[0];
}

// In float32 over runs of 512, and in float64 over those: a sum of a million products then rounds no more than an FFT.
template <class T>
static float dot(const float* reversed, int64_t count, const Gated<T>& x, int64_t offset) {
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += 512) {
    Vec sums[4] = {vzero(), vzero(), vzero(), vzero()};
    const int64_t end = min64(count, begin + 512);
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int v = 0; v < 4; ++v)
        sums[v] = vfma(vload(reversed + i + v * kLanes), x.read(offset + i + v * kLanes), sums[v]);
    for (; i < end; i += kLanes) {
      // Inputs behind the last tap may be infinite: zero taps would make NaN of them.
      float inputs[kLanes];
      vstore(inputs, x.read(offset + i));
      sums[0] = vfma(load_some(reversed + i, end - i), load_some(inputs, end - i), sums[0]);
    }
    float lanes[kLanes];
    vstore(lanes, vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])));
    for (int c = 0; c < kLanes; ++c) total += lanes[c];
  }
  return static_cast<float>(total);
}

template <class T>
static void few_forward(const long_conv::Forward& t) {
  const FewScratch scratch(t.taps, t.scratch);
  const int64_t total = t.history + t.length, offset = t.history - t.taps.count + 1;
  for (int64_t batch = t.batch_begin; batch < t.batch_end; ++batch) {
    const Gated<T> x{{t.u, batch, total}, {t.pre_gate, batch, total}};
    const Gated<T> post{{t.post_gate, batch, t.length}, {{nullptr, 0}, 0, 0}};
    const Sequence<T> out(t.out, batch, t.length);
    for (int64_t n = 0; n < t.length; n += kLanes) {
      float numbers[kLanes] = {};
      const int64_t count = min64(kLanes, t.length - n);
      for (int64_t c = 0; c < count; ++c) numbers[c] = dot(scratch.reversed, t.taps.count, x, offset + n + c);
      Vec y = vload(numbers);
      if (t.skip != 0.0f) y = vfma(vset(t.skip), x.read(t.history + n), y);
      if (t.post_gate.data) y = vmul(y, post.read(n));
      out.write(n, y);
    }
  }
}

// The gradients of one sequence.
template <class T>
static void few_backward_sequence(const long_conv::Backward& t, int64_t batch, const FewScratch& scratch) {
  const int64_t total = t.history + t.length, count = t.taps.count, offset = t.history - count + 1;
  const Gated<T> x{{t.u, batch, total}, {t.pre_gate, batch, total}};
  const Gated<T> g{{t.grad_out, batch, t.length}, {t.post_gate, batch, t.length}};
  const Sequence<T> grad_u(t.grad_u, batch, total), grad_pre(t.grad_pre, batch, total);
  const Sequence<T> grad_post(t.grad_post, batch, t.length);
  const Vec skip = vset(t.skip);
  if (t.grad_causal)
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec sum = vload(scratch.grad + i);
      for (int64_t n = 0; n < t.length; ++n) sum = vfma(vset(at(g, n)), x.read(offset + n + i), sum);
      vstore(scratch.grad + i, sum);
    }
  if (t.grad_post.data)
    for (int64_t n = 0; n < t.length; n += kLanes) {
      float numbers[kLanes] = {};
      for (int64_t c = 0; c < min64(kLanes, t.length - n); ++c)
        numbers[c] = dot(scratch.reversed, count, x, offset + n + c);
      Vec y = vload(numbers);
      if (t.skip != 0.0f) y = vfma(skip, x.read(t.history + n), y);
      grad_post.write(n, vmul(y, g.signal.read(n)));
    }
  if (!grad_u.data && !grad_pre.data) return;
  const Gated<float> reversed{{{scratch.reversed, 0}, 0, count}, {{nullptr, 0}, 0, 0}};
  for (int64_t m = 0; m < total; m += kLanes) {
    Vec grad_x = t.skip != 0.0f ? vmul(skip, g.read(m - t.history)) : vzero();
    for (int64_t n = 0; n < t.length; ++n) grad_x = vfma(vset(at(g, n)), reversed.read(m - offset - n), grad_x);
    if (grad_pre.data) grad_pre.write(m, vmul(grad_x, x.signal.read(m)));
    if (!grad_u.data) continue;
    if (x.gate.data) grad_x = vmul(grad_x, x.gate.read(m));
    grad_u.write(m, grad_x);
  }
}

template <class T>
static void few_backward(const long_conv::Backward& t) {
  const FewScratch scratch(t.taps, t.scratch);
  double skip = 0.0;
  for (int64_t batch = t.batch_begin; batch < t.batch_end; ++batch) {
    if (t.grad_skip)
      skip +=
          inner_product<T>(*t.team, {{t.grad_out, batch, t.length}, {t.post_gate, batch, t.length}},
                           {{t.u, batch, t.history + t.length}, {t.pre_gate, batch, t.history + t.length}}, t.history);
    few_backward_sequence<T>(t, batch, scratch);
  }
  if (t.grad_skip) *t.grad_skip = static_cast<float>(skip);
  if (!t.grad_causal) return;
  for (int64_t i = 0; i < t.taps.count; ++i) t.grad_causal[i] = scratch.grad[t.taps.count - 1 - i];
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
