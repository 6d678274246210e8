// The short convolution forward: a row goes in stretches that stay in L1, or straight from memory where it is fp32.
#pragma once

#include "short_conv/direct_body.h"
#include "short_conv/kernel.h"

namespace effkern {
namespace EFFKERN_UNIT {

using short_conv::Backward;
using short_conv::Forward;
using short_conv::Inputs;

constexpr int64_t kStretch = 1024;

template <class T>
constexpr bool kIsFloat = sizeof(T) == sizeof(float);

// One row of x with the inputs before it.
template <class T>
struct Row {
  const T* x;
  const void* past;  // taps - 1 numbers, null for zeros
  bool past_fp32;
  int64_t length, taps;

  EFFKERN_MEMBER Row(const Inputs& in, int64_t b, int64_t h)
      : x(static_cast<const T*>(in.x.data) + b * in.x.batch + h * in.x.channel),
        past(nullptr),
        past_fp32(in.past_fp32),
        length(in.shape.length),
        taps(in.shape.taps) {
    const int64_t size = (taps - 1) * static_cast<int64_t>(past_fp32 ? sizeof(float) : sizeof(T));
    if (in.past) past = static_cast<const char*>(in.past) + (b * in.shape.channels + h) * size;
  }

  // The inputs that outputs begin .. begin + count need, and zeros behind them.
  EFFKERN_MEMBER void fill(int64_t begin, int64_t count, float* line) const {
    const int64_t before = max64(0, taps - 1 - begin), first = max64(0, begin - (taps - 1));
    if (before > 0) {
      if (!past)
        memset(line, 0, before * sizeof(float));
      else if (past_fp32)
        widen_line(static_cast<const float*>(past) + begin, before, line);
      else
        widen_line(static_cast<const T*>(past) + begin, before, line);
    }
    widen_line(x + first, begin + count - first, line + before);
    memset(line + taps - 1 + count, 0, kDirectBlock * sizeof(float));
  }
};

template <class T>
struct StoreSilu {
  T* to;
  EFFKERN_MEMBER void operator()(int64_t i, Vec sum, int64_t width) const { store_some(to + i, silu(sum), width); }
};

template <class T, int kTaps>
static void forward_row(const Row<T>& row, const float* weight, float bias, bool with_silu, T* out, float* line) {
  const int64_t reach = row.taps - 1;
  for (int64_t t = 0; t < row.length;) {
    const float* source = line;
    int64_t count = min64(kStretch, row.length - t);
    if constexpr (kIsFloat<T>) {
      const int64_t whole = (row.length - t) / kDirectBlock * kDirectBlock;
      if (t >= reach && whole > 0) {
        source = row.x + t - reach;  // whole blocks read nothing behind the row
        count = whole;
      } else if (t < reach) {
        count = min64(count, round_up(reach, kDirectBlock));
      }
    }
    if (source == line) row.fill(t, count, line);
    if (with_silu)
      direct_convolve<kTaps>(source, weight, row.taps, vset(bias), count, StoreSilu<T>{out + t});
    else
      direct_convolve<kTaps>(source, weight, row.taps, vset(bias), count, StoreSums<T>{out + t});
    t += count;
  }
}

// a . b + start
EFFKERN_INLINE float dot(const float* a, const float* b, int64_t count, float start) {
  int64_t i = 0;
  if (count >= kLanes) {
    Vec sum = vzero();
    for (; i + kLanes <= count; i += kLanes) sum = vfma(vload(a + i), vload(b + i), sum);
    float lanes[kLanes];
    vstore(lanes, sum);
    start += sum_of_lanes(lanes);
  }
  for (; i < count; ++i) start += a[i] * b[i];
  return start;
}

// Few positions of `rows` neighbouring channels. past: rows `past_stride` apart.
template <int kTaps>
EFFKERN_INLINE void few_sums(const float* past, int64_t past_stride, const float* x, const float* weight,
                             const float* bias, int64_t taps, int64_t length, int64_t rows, float* sums) {
  for (int64_t r = 0; r < rows; ++r, past += past_stride, x += length, weight += taps, sums += length) {
    const float start = bias ? bias[r] : 0.0f;
    if (kTaps > 0 && length == 1) {
      float sum = start;
      for (int w = 0; w < kTaps - 1; ++w) sum += weight[w] * past[w];
      sums[0] = sum + weight[kTaps - 1] * x[0];
      continue;
    }
    for (int64_t t = 0; t < length; ++t) {
      const int64_t before = max64(0, taps - 1 - t);
      sums[t] = dot(x + max64(0, t - (taps - 1)), weight + before, taps - before, dot(past + t, weight, before, start));
    }
  }
}

template <class T>
EFFKERN_INLINE const float* widened(const T* from, int64_t count, float* room) {
  if constexpr (kIsFloat<T>) return from;
  widen_line(from, count, room);
  return room;
}

// Many rows of few positions: their numbers are widened and their sums stored together.
template <class T, int kTaps>
static void forward_few(const Forward& t) {
  const Inputs& in = t.in;
  const int64_t length = in.shape.length, reach = in.shape.taps - 1, channels = in.shape.channels;
  const int64_t most = max64(1, kStretch / max64(reach, length)), room = kStretch + kDirectBlock;
  float *past_room = t.scratch, *x_room = past_room + room, *sums = x_room + room;
  if (!in.past) memset(past_room, 0, reach * sizeof(float));
  for (int64_t row = t.begin; row < t.end;) {
    const int64_t h = row % channels, rows = min64(most, min64(t.end - row, channels - h));
    const float* past = past_room;
    if (in.past && in.past_fp32)
      past = static_cast<const float*>(in.past) + row * reach;
    else if (in.past)
      past = widened(static_cast<const T*>(in.past) + row * reach, rows * reach, past_room);
    const float* x = widened(static_cast<const T*>(in.x.data) + row * length, rows * length, x_room);
    few_sums<kTaps>(past, in.past ? reach : 0, x, in.weight + h * in.shape.taps, in.bias ? in.bias + h : nullptr,
                    in.shape.taps, length, rows, sums);
    T* out = static_cast<T*>(t.out) + row * length;
    for (int64_t i = 0; i < rows * length; i += kLanes) {
      const Vec sum = vload(sums + i);
      store_some(out + i, in.silu ? silu(sum) : sum, rows * length - i);
    }
    row += rows;
  }
}

template <class T, int kTaps>
static void forward_taps(const Forward& t) {
  const Inputs& in = t.in;
  if (in.shape.length <= short_conv::kFewPositions) return forward_few<T, kTaps>(t);
  for (int64_t row = t.begin; row < t.end; ++row) {
    const int64_t b = row / in.shape.channels, h = row % in.shape.channels;
    forward_row<T, kTaps>(Row<T>(in, b, h), in.weight + h * in.shape.taps, in.bias ? in.bias[h] : 0.0f, in.silu,
                          static_cast<T*>(t.out) + row * in.shape.length, t.scratch);
  }
}

template <class T>
static void forward(const Forward& t) {
  switch (t.in.shape.taps) {
    case 2: return forward_taps<T, 2>(t);
    case 3: return forward_taps<T, 3>(t);
    case 4: return forward_taps<T, 4>(t);
    default: return forward_taps<T, 0>(t);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
