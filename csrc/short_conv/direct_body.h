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

// kVectors vectors of sums from `line` on. `known` are the broadcast taps where their number is known when compiling.
template <int kTaps, int kVectors>
EFFKERN_INLINE void direct_block(const float* line, const float* weight, const Vec* known, int64_t taps, Vec start,
                                 Vec* sums) {
  for (int k = 0; k < kVectors; ++k) sums[k] = start;
  if constexpr (kTaps > 0) {
    for (int w = 0; w < kTaps; ++w)
      for (int k = 0; k < kVectors; ++k) sums[k] = vfma(known[w], vload(line + k * kLanes + w), sums[k]);
  } else {
    for (int64_t w = 0; w < taps; ++w) {
      const Vec tap = vbroadcast(weight + w);
      for (int k = 0; k < kVectors; ++k) sums[k] = vfma(tap, vload(line + k * kLanes + w), sums[k]);
    }
  }
}

// Calls finish(i, sums, width) for every vector of outputs; width is less than kLanes in the last one only. kTaps is
// the number of taps where it is known when compiling, else 0.
template <int kTaps, class Finish>
EFFKERN_INLINE void direct_convolve(const float* line, const float* weight, int64_t taps, Vec start, int64_t count,
                                    const Finish& finish) {
  constexpr int kVectors = kTaps > 0 ? 2 : kDirectVectors;
  Vec known[kTaps > 0 ? kTaps : 1], sums[kVectors];
  for (int w = 0; w < kTaps; ++w) known[w] = vbroadcast(weight + w);
  int64_t i = 0;
  if constexpr (kTaps > 0) {
    for (; i + kVectors * kLanes <= count; i += kVectors * kLanes) {
      direct_block<kTaps, kVectors>(line + i, weight, known, taps, start, sums);
      for (int k = 0; k < kVectors; ++k) finish(i + k * kLanes, sums[k], int64_t{kLanes});
    }
  }
  // Through memory: sums that are chosen when running would not stay in registers while they are made. Beside many taps
  // that costs nothing, with few of them only the last block gets here.
  float block[kVectors * kLanes];
  while (i < count) {
    direct_block<kTaps, kVectors>(line + i, weight, known, taps, start, sums);
    for (int k = 0; k < kVectors; ++k) vstore(block + k * kLanes, sums[k]);
    const int64_t end = min64(count, i + kVectors * kLanes);
    for (const float* sum = block; i < end; i += kLanes, sum += kLanes) finish(i, vload(sum), min64(kLanes, end - i));
  }
}

template <class T>
struct StoreSums {
  T* to;
  EFFKERN_MEMBER void operator()(int64_t i, Vec sum, int64_t width) const { store_some(to + i, sum, width); }
};

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

EFFKERN_INLINE Vec exp_of_minus_magnitude(Vec x) {
  return vexp2(vmul(vmin(vsub(vzero(), x), x), vset(1.44269504088896341f)));
}

// x / (1 + e^-x), with a power that never overflows.
EFFKERN_INLINE Vec silu(Vec x) {
  const Vec power = exp_of_minus_magnitude(x);
  return vdiv(select_greater(vzero(), x, vmul(x, power), x), vadd(power, vset(1.0f)));
}

// s + x s (1 - s), s the logistic function of x.
EFFKERN_INLINE Vec silu_slope(Vec x) {
  const Vec power = exp_of_minus_magnitude(x);
  const Vec large = vdiv(vset(1.0f), vadd(power, vset(1.0f))), small = vmul(power, large);
  const Vec s = select_greater(vzero(), x, small, large), rest = select_greater(vzero(), x, large, small);
  return vmul(s, vfma(x, rest, vset(1.0f)));
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
