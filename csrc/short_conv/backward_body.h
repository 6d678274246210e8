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

// Everything about one vector of outputs in one go, for a number of taps that fits the registers.
template <int kTaps, bool kSilu>
struct FewTaps {
  Vec known[kTaps], sums[kTaps], start, bias_sum;

  EFFKERN_MEMBER FewTaps(const float* weight, float bias) : start(vset(bias)), bias_sum(vzero()) {
    for (int w = 0; w < kTaps; ++w) {
      known[w] = vbroadcast(weight + w);
      sums[w] = vzero();
    }
  }
  EFFKERN_MEMBER Vec gradient(const float* line, Vec grad_out) const {
    if (!kSilu) return grad_out;
    Vec sum = start;
    for (int w = 0; w < kTaps; ++w) sum = vfma(known[w], vload(line + w), sum);
    return vmul(grad_out, silu_slope(sum));
  }
  EFFKERN_MEMBER void add(const float* line, Vec g) {
    for (int w = 0; w < kTaps; ++w) sums[w] = vfma(g, vload(line + w), sums[w]);
    bias_sum = vadd(bias_sum, g);
  }
  EFFKERN_MEMBER void store(const BackwardRoom& room) const {
    for (int w = 0; w < kTaps; ++w) vstore(room.sums + w * kLanes, vadd(vload(room.sums + w * kLanes), sums[w]));
    vstore(room.bias_sum, vadd(vload(room.bias_sum), bias_sum));
  }
};

template <class T, int kTaps, bool kSilu>
EFFKERN_INLINE void few_taps_backward(const T* grad_out, const float* weight, float bias, int64_t count,
                                      const BackwardRoom& room, float* grads) {
  FewTaps<kTaps, kSilu> all(weight, bias);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec g = all.gradient(room.line + i, load_full(grad_out + i));
    vstore(grads + i, g);
    all.add(room.line + i, g);
  }
  if (i < count) {
    vstore(grads + i, all.gradient(room.line + i, load_some(grad_out + i, count - i)));
    memset(grads + count, 0, kLanes * sizeof(float));
    all.add(room.line + i, vload(grads + i));
  }
  all.store(room);
}

template <class T>
struct StoreGradient {
  const T* grad_out;
  float* grads;
  EFFKERN_MEMBER void operator()(int64_t i, Vec sum, int64_t width) const {
    vstore(grads + i, vmul(load_some(grad_out + i, width), silu_slope(sum)));
  }
};

template <class T>
EFFKERN_INLINE void many_taps_backward(const T* grad_out, const float* weight, int64_t taps, float bias, bool with_silu,
                                       bool need_sums, int64_t count, const BackwardRoom& room, float* grads) {
  if (with_silu)
    direct_convolve<0>(room.line, weight, taps, vset(bias), count, StoreGradient<T>{grad_out, grads});
  else
    widen_line(grad_out, count, grads);
  memset(grads + count, 0, kLanes * sizeof(float));
  if (!need_sums) return;
  direct_tap_sums(room.line, grads, taps, count, room.sums);
  Vec bias_sum = vload(room.bias_sum);
  for (int64_t i = 0; i < count; i += kLanes) bias_sum = vadd(bias_sum, vload(grads + i));
  vstore(room.bias_sum, bias_sum);
}

// The gradients of `count` sums, zeros behind them to the end of the vector; adds to the sums of the taps and the bias.
template <class T, int kTaps>
EFFKERN_INLINE void grads_of_sums(const T* grad_out, const float* weight, int64_t taps, float bias, bool with_silu,
                                  bool need_sums, int64_t count, const BackwardRoom& room, float* grads) {
  if constexpr (kTaps == 0)
    many_taps_backward(grad_out, weight, taps, bias, with_silu, need_sums, count, room, grads);
  else if (with_silu)
    few_taps_backward<T, kTaps, true>(grad_out, weight, bias, count, room, grads);
  else
    few_taps_backward<T, kTaps, false>(grad_out, weight, bias, count, room, grads);
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

// Gradients of inputs, those from..until of the ones that the line of gradients reaches.
template <int kTaps, class Target>
EFFKERN_INLINE void reversed_convolve(const BackwardRoom& room, int64_t taps, int64_t from, int64_t until, Target* to) {
  direct_convolve<kTaps>(room.grads + from, room.reversed, taps, vzero(), until - from, StoreSums<Target>{to});
}

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
    if (to.grad_past && t.in.past_fp32)
      reversed_convolve<kTaps>(room, row.taps, 0, of_past, static_cast<float*>(to.grad_past) + begin);
    else if (to.grad_past)
      reversed_convolve<kTaps>(room, row.taps, 0, of_past, static_cast<T*>(to.grad_past) + begin);
    if (to.grad_x) reversed_convolve<kTaps>(room, row.taps, of_past, made, to.grad_x + begin + of_past - reach);
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
