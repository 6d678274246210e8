// Direct convolution of lines: fp32 numbers that lie adjacent in a cache, lanes along time.
//
//   out[i] = start + sum_w weight[w] line[i + w]
//
// A line for `count` outputs has taps - 1 earlier numbers in front and kDirectBlock readable ones behind. Nothing here
// knows where the numbers come from or what becomes of the sums, so that any convolution with few taps can use it.
#pragma once

#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

// Sums are made in blocks of this many outputs; with any number of taps so many vectors hide the latency of an FMA.
constexpr int kDirectVectors = 8;
constexpr int64_t kDirectBlock = kDirectVectors * kLanes;
// Taps whose gradients are summed in one pass over a line.
constexpr int kTapGroup = 8;

EFFKERN_INLINE void widen_line(const float* from, int64_t count, float* to) { memcpy(to, from, count * sizeof(float)); }

// May write up to a vector more than `count` numbers.
template <class T>
EFFKERN_INLINE void widen_line(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) vstore(to + i, load_full(from + i));
  if (i < count) vstore(to + i, load_some(from + i, count - i));
}

// Calls finish(i, sums, width) for every vector of outputs; width is less than kLanes in the last one only. kTaps is
// the number of taps where it is known when compiling, else 0.
template <int kTaps, class Finish>
EFFKERN_INLINE void direct_convolve(const float* line, const float* weight, int64_t taps, Vec start, int64_t count,
                                    const Finish& finish) {
  constexpr int kVectors = kTaps > 0 ? 2 : kDirectVectors;
  Vec known[kTaps > 0 ? kTaps : 1];
  for (int w = 0; w < kTaps; ++w) known[w] = vbroadcast(weight + w);
  for (int64_t i = 0; i < count; i += kVectors * kLanes) {
    Vec sums[kVectors];
    for (int k = 0; k < kVectors; ++k) sums[k] = start;
    if constexpr (kTaps > 0) {
      for (int w = 0; w < kTaps; ++w)
        for (int k = 0; k < kVectors; ++k) sums[k] = vfma(known[w], vload(line + i + k * kLanes + w), sums[k]);
    } else {
      for (int64_t w = 0; w < taps; ++w) {
        const Vec tap = vbroadcast(weight + w);
        for (int k = 0; k < kVectors; ++k) sums[k] = vfma(tap, vload(line + i + k * kLanes + w), sums[k]);
      }
    }
    if (i + kVectors * kLanes <= count) {
      for (int k = 0; k < kVectors; ++k) finish(i + k * kLanes, sums[k], int64_t{kLanes});
    } else {
      for (int k = 0; k < kVectors && i + k * kLanes < count; ++k)
        finish(i + k * kLanes, sums[k], min64(kLanes, count - i - k * kLanes));
    }
  }
}

// sums[w] += sum_i grad[i] line[i + w], one vector of partial sums a tap, for round_up(taps, kTapGroup) taps. The last
// vector of grad is filled up with zeros.
EFFKERN_INLINE void direct_tap_sums(const float* line, const float* grad, int64_t taps, int64_t count, float* sums) {
  for (int64_t first = 0; first < taps; first += kTapGroup) {
    Vec group[kTapGroup];
    for (int w = 0; w < kTapGroup; ++w) group[w] = vzero();
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec g = vload(grad + i);
      for (int w = 0; w < kTapGroup; ++w) group[w] = vfma(g, vload(line + i + first + w), group[w]);
    }
    for (int w = 0; w < kTapGroup; ++w) {
      float* sum = sums + (first + w) * kLanes;
      vstore(sum, vadd(vload(sum), group[w]));
    }
  }
}

EFFKERN_INLINE float sum_of_lanes(const float* lanes) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// The logistic function of x and of -x, each without cancellation.
struct Logistic {
  Vec of, of_minus;
};

EFFKERN_INLINE Logistic logistic(Vec x) {
  const Vec magnitude = vmax(vsub(vzero(), x), x);
  const Vec power = vexp2(vmul(magnitude, vset(-1.44269504088896341f)));
  const Vec large = vdiv(vset(1.0f), vadd(power, vset(1.0f))), small = vmul(power, large);
  return {select_greater(vzero(), x, small, large), select_greater(vzero(), x, large, small)};
}

EFFKERN_INLINE Vec silu(Vec x) { return vmul(x, logistic(x).of); }

EFFKERN_INLINE Vec silu_slope(Vec x) {
  const Logistic s = logistic(x);
  return vmul(s.of, vfma(x, s.of_minus, vset(1.0f)));
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
