// The short convolution backward, in one pass over x and grad_out. With g the gradient of the sums, before SiLU:
//   grad_weight[w] = sum_t g[t] x[t - (W-1) + w],  grad_bias = sum_t g[t],  grad_x[t] = sum_w weight[w] g[t + (W-1) -
//   w]
// The last is the same convolution with the taps reversed, W-1 positions behind: what it gives before position 0
// belongs to the past.
#pragma once

#include "short_conv/forward_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

// Working memory of a row: parts of one scratch.
struct BackwardRoom {
  float *line, *grads, *reversed, *sums, *bias_sum;

  EFFKERN_MEMBER BackwardRoom(float* scratch, int64_t taps) {
    line = scratch;
    grads = line + (taps - 1) + kStretch + kDirectBlock;
    reversed = grads + 2 * (taps - 1) + kStretch + kDirectBlock;
    sums = reversed + taps;
    bias_sum = sums + round_up(taps, kTapGroup) * kLanes;
  }
};

// Enough for either direction.
static int64_t scratch_floats(int64_t taps) {
  const BackwardRoom room(nullptr, taps);
  return max64(room.bias_sum - room.line + kLanes, 3 * (kStretch + kDirectBlock));
}

// g for `count` outputs and zeros behind them to the end of the vector; adds to the sums of the taps and the bias.
template <class T, int kTaps>
EFFKERN_INLINE void grads_of_sums(const T* grad_out, const float* weight, int64_t taps, float bias, bool with_silu,
                                  bool need_sums, int64_t count, const BackwardRoom& room, float* grads) {
  const auto stored = [&](int64_t i, Vec g, int64_t width) {
    vstore(grads + i, g);
    if (width >= kLanes) return g;
    memset(grads + i + width, 0, (kLanes - width) * sizeof(float));
    return vload(grads + i);
  };
  Vec bias_sum = vzero();
  if constexpr (kTaps > 0) {
    Vec known[kTaps], sums[kTaps];
    for (int w = 0; w < kTaps; ++w) {
      known[w] = vbroadcast(weight + w);
      sums[w] = vzero();
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec inputs[kTaps], sum = vset(bias);
      for (int w = 0; w < kTaps; ++w) inputs[w] = vload(room.line + i + w);
      Vec g = load_some(grad_out + i, count - i);
      if (with_silu) {
        for (int w = 0; w < kTaps; ++w) sum = vfma(known[w], inputs[w], sum);
        g = vmul(g, silu_slope(sum));
      }
      g = stored(i, g, count - i);
      for (int w = 0; w < kTaps; ++w) sums[w] = vfma(g, inputs[w], sums[w]);
      bias_sum = vadd(bias_sum, g);
    }
    for (int w = 0; w < kTaps; ++w) vstore(room.sums + w * kLanes, vadd(vload(room.sums + w * kLanes), sums[w]));
  } else {
    const auto finish = [&](int64_t i, Vec sum, int64_t width) {
      const Vec g = load_some(grad_out + i, width);
      bias_sum = vadd(bias_sum, stored(i, with_silu ? vmul(g, silu_slope(sum)) : g, width));
    };
    if (with_silu)
      direct_convolve<0>(room.line, weight, taps, vset(bias), count, finish);
    else
      for (int64_t i = 0; i < count; i += kLanes) finish(i, vzero(), min64(kLanes, count - i));
    if (need_sums) direct_tap_sums(room.line, grads, taps, count, room.sums);
  }
  vstore(room.bias_sum, vadd(vload(room.bias_sum), bias_sum));
}

template <class T>
struct RowGradients {
  const T* grad_out;
  T* grad_x;  // null where neither it nor the past's is wanted
  void* grad_past;

  EFFKERN_MEMBER RowGradients(const Backward& t, int64_t b) : grad_past(nullptr) {
    const int64_t row = b * t.in.shape.channels + t.channel;
    grad_out = static_cast<const T*>(t.grad_out.data) + b * t.grad_out.batch + t.channel * t.grad_out.channel;
    grad_x = t.grad_x ? static_cast<T*>(t.grad_x) + row * t.in.shape.length : nullptr;
    const int64_t size = (t.in.shape.taps - 1) * static_cast<int64_t>(t.in.past_fp32 ? sizeof(float) : sizeof(T));
    if (t.grad_past) grad_past = static_cast<char*>(t.grad_past) + row * size;
  }
};

template <class T, int kTaps>
static void backward_row(const Backward& t, const Row<T>& row, const RowGradients<T>& to, const BackwardRoom& room) {
  const float* weight = t.in.weight + t.channel * row.taps;
  const float bias = t.in.bias ? t.in.bias[t.channel] : 0.0f;
  const int64_t reach = row.taps - 1;
  float* grads = room.grads + reach;  // behind those of the taps - 1 outputs before
  memset(room.grads, 0, reach * sizeof(float));
  for (int64_t begin = 0; begin < row.length; begin += kStretch) {
    const int64_t count = min64(kStretch, row.length - begin);
    row.fill(begin, count, room.line);
    grads_of_sums<T, kTaps>(to.grad_out + begin, weight, row.taps, bias, t.in.silu, t.sums != nullptr, count, room,
                            grads);
    if (!to.grad_x && !to.grad_past) continue;
    const int64_t behind = begin + count == row.length ? reach : 0;
    memset(grads + count, 0, (behind + kDirectBlock) * sizeof(float));
    // Gradients of the positions begin - reach .. begin - reach + made.
    const int64_t made = count + behind, of_past = min64(max64(0, reach - begin), made);
    const auto convolve = [&](auto* target, int64_t from, int64_t until) {
      direct_convolve<kTaps>(room.grads + from, room.reversed, row.taps, vzero(), until - from,
                             [&](int64_t i, Vec sum, int64_t width) { store_some(target + i, sum, width); });
    };
    if (to.grad_past && t.in.past_fp32)
      convolve(static_cast<float*>(to.grad_past) + begin, 0, of_past);
    else if (to.grad_past)
      convolve(static_cast<T*>(to.grad_past) + begin, 0, of_past);
    if (to.grad_x) convolve(to.grad_x + begin + of_past - reach, of_past, made);
    memmove(room.grads, room.grads + count, reach * sizeof(float));
  }
}

template <class T, int kTaps>
static void backward_taps(const Backward& t) {
  const int64_t taps = t.in.shape.taps;
  const BackwardRoom room(t.scratch, taps);
  for (int64_t w = 0; w < taps; ++w) room.reversed[w] = t.in.weight[t.channel * taps + taps - 1 - w];
  memset(room.sums, 0, (round_up(taps, kTapGroup) + 1) * kLanes * sizeof(float));
  for (int64_t b = t.begin; b < t.end; ++b)
    backward_row<T, kTaps>(t, Row<T>(t.in, b, t.channel), RowGradients<T>(t, b), room);
  if (!t.sums) return;
  for (int64_t w = 0; w < taps; ++w) t.sums[w] = sum_of_lanes(room.sums + w * kLanes);
  t.sums[taps] = sum_of_lanes(room.bias_sum);
}

template <class T>
static void backward(const Backward& t) {
  switch (t.in.shape.taps) {
    case 2: return backward_taps<T, 2>(t);
    case 3: return backward_taps<T, 3>(t);
    case 4: return backward_taps<T, 4>(t);
    default: return backward_taps<T, 0>(t);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
