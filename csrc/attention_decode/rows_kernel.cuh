// The softmax of decoding: logits and weights of a tile of keys in registers, and what a finished row becomes. All in
// base 2.
#pragma once

#include <bit>
#include <cmath>

#include "attention_decode/split_launch.h"
#include "core/cuda/tile/mma.cuh"
#include "core/cuda/tile/reduce.cuh"

namespace effkern::attention_decode {

// Running maximum of the logits and sum of the weights of one warp's rows; the sum is this lane's share until the end.
template <int kRowBlocks>
struct RowState {
  float top[kRowBlocks][2], total[kRowBlocks][2];

  EFFKERN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) top[i][half] = -INFINITY, total[i][half] = 0.f;
  }
};

// A polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel, and that elsewhere.
EFFKERN_DEVICE float tanh_fast(float x) {
  const float square = x * x;
  float poly = -5.70498872745e-3f * square + 2.06390887954e-2f;
  poly = poly * square - 5.37397155531e-2f;
  poly = poly * square + 1.33314422036e-1f;
  poly = poly * square - 3.33332819422e-1f;
  const float far = 1.f - 2.f * cuda::reciprocal_fast(cuda::exp2_fast(fabsf(x) * 2.88539008f) + 1.f);
  return fabsf(x) > 0.625f ? copysignf(far, x) : poly * square * x + x;
}

// Products of queries and keys become logits.
template <int kRowBlocks, int kKeyBlocks>
EFFKERN_DEVICE void to_logits(cuda::Accumulator<kRowBlocks, kKeyBlocks>& scores, const SplitParams& p) {
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores.block[i][j][e] *= p.factor;
  if (p.cap_log2 == 0.f) return;
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores.block[i][j][e] = p.cap_log2 * tanh_fast(scores.block[i][j][e]);
}

// Hides what a row may not see. `first_row` counts the (head, query) pairs of the kv head, `first_key` the sequence's.
template <int kRowBlocks, int kKeyBlocks>
EFFKERN_DEVICE void mask_logits(cuda::Accumulator<kRowBlocks, kKeyBlocks>& scores, const SplitParams& p, int length,
                                int first_row, int first_key) {
  const cuda::Coordinate own = cuda::accumulator_coordinate<kRowBlocks>(cuda::thread_index() % 32, 0);
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + i * 16 + half * 8 + own.row;
      const int query = row - p.query_divisor.divide(row) * p.queries;
      const uint32_t seen = seen_from(length - p.queries + query, p.bands, first_key) >> own.column;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (!(seen >> (j * 8 + e) & 1)) scores.block[i][j][2 * half + e] = -INFINITY;
    }
}

// Turns logits into weights in place and brings total and output to the new maximum.
template <int kRowBlocks, int kKeyBlocks, int kValueBlocks>
EFFKERN_DEVICE void weigh(cuda::Accumulator<kRowBlocks, kKeyBlocks>& scores, RowState<kRowBlocks>& state,
                          cuda::Accumulator<kRowBlocks, kValueBlocks>& out) {
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.top[i][half];
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j)
        top = fmaxf(top, fmaxf(scores.block[i][j][2 * half], scores.block[i][j][2 * half + 1]));
      top = cuda::quad_max(top);
      const float origin = top == -INFINITY ? 0.f : top;  // no key yet: exponents must be -inf, not -inf + inf
      shrink[half] = cuda::exp2_fast(state.top[i][half] - origin);
      state.top[i][half] = top;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores.block[i][j][2 * half + e];
          score = cuda::exp2_fast(score - origin);
          sum += score;
        }
      state.total[i][half] = state.total[i][half] * shrink[half] + sum;
    }
    if (shrink[0] == 1.f && shrink[1] == 1.f) continue;  // after a few tiles maxima rarely rise
#pragma unroll
    for (int j = 0; j < kValueBlocks; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out.block[i][j][e] *= shrink[e / 2];
  }
}

// What a row's values, summed relative to its top, are multiplied with, and its lse.
struct Finish {
  float factor, lse;
};

EFFKERN_DEVICE Finish finish(float top, float total, float sink) {
  const float largest = fmaxf(top, sink), origin = largest == -INFINITY ? 0.f : largest;
  const float share = cuda::exp2_fast(top - origin);
  const float all = total * share + cuda::exp2_fast(sink - origin);
  if (all == 0.f) return {0.f, -INFINITY};  // no key and no sink; a total of NaN goes on
  return {share * cuda::reciprocal_fast(all), (origin + cuda::log2_fast(all)) * 0.693147181f};
}

EFFKERN_DEVICE float to_float(uint16_t bits, cuda::Bf16) { return std::bit_cast<float>(uint32_t{bits} << 16); }

EFFKERN_DEVICE float to_float(uint16_t bits, cuda::Fp16) {
  const uint32_t sign = (bits & 0x8000u) << 16, size = (bits & 0x7fffu) << 13;
  if (size >= 0x0f800000u) return std::bit_cast<float>(sign | size | 0x7f800000u);  // infinite or NaN
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(size) * 0x1p112f));
}

// The sink of a query head in base 2, or nothing.
template <class Element>
EFFKERN_DEVICE float sink_of(const SplitParams& p, int head) {
  if (p.sinks == nullptr) return -INFINITY;
  const float sink = p.sinks_fp32 ? static_cast<const float*>(p.sinks)[head]
                                  : to_float(static_cast<const uint16_t*>(p.sinks)[head], Element{});
  return sink * 1.44269504f;
}

}  // namespace effkern::attention_decode
