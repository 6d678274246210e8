// A linear recurrence across the lanes of a vector, one channel a lane, in blocks that keep the products in registers:
//
//   x[l] = input[l] + sum_m taps[m] x[l - 1 - m],  0 <= m < order
//
// Rows are vectors of one number a channel. Included inside an ISA unit after simd.h.
#pragma once

#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

// Outputs a block, and terms a step: 8 sums and 4 values fit 16 registers, and 15 loads feed 32 products.
constexpr int kBlock = 8, kStep = 4;

// sum[r] += sum_j taps[j + r] * values[kDirection * j], 0 <= j < count, a multiple of kStep. From the largest j down:
// with kDirection -1 the newest values come last, so that a block starts before the one before it has ended.
template <int kDirection>
EFFKERN_INLINE void multiply_toeplitz(Vec sum[kBlock], const float* taps, const float* values, int64_t count) {
  for (int64_t j = count - kStep; j >= 0; j -= kStep) {
    // Taps of the step before are loaded again: if the compiler kept them, sums would have to leave their registers.
    asm volatile("" : : : "memory");
    Vec value[kStep];
#pragma GCC unroll 4
    for (int q = 0; q < kStep; ++q) value[q] = vload(values + kDirection * (j + q) * kLanes);
#pragma GCC unroll 11
    for (int s = 0; s < kBlock + kStep - 1; ++s) {
      const Vec tap = vload(taps + (j + s) * kLanes);
#pragma GCC unroll 4
      for (int q = 0; q < kStep; ++q)
        if (s >= q && s - q < kBlock) sum[s - q] = vfma(tap, value[q], sum[s - q]);
    }
  }
}

// Runs the recurrence over `count` rows (a multiple of kBlock) that hold their inputs and get the outputs. Before them
// stand `order` rows of history, rounded up to kStep; `taps` has kBlock + kStep rows of zeros behind those.
static void run_recurrence(float* rows, int64_t count, const float* taps, int64_t order) {
  const int64_t history = round_up(order, kStep);
  for (int64_t l = 0; l < count; l += kBlock) {
    float* block = rows + l * kLanes;
    Vec x[kBlock];
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) x[r] = vload(block + r * kLanes);
    multiply_toeplitz<-1>(x, taps, block - kLanes, history);
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      vstore(block + r * kLanes, x[r]);
#pragma GCC unroll 8
      for (int s = r + 1; s < kBlock; ++s) x[s] = vfma(vload(taps + (s - r - 1) * kLanes), x[r], x[s]);
    }
  }
}

// out[p] += sum_j taps[j + p] * values[kDirection * j] for `count` rows, rounded up to kBlock; j as above.
template <int kDirection>
static void add_toeplitz(float* out, int64_t count, const float* taps, const float* values, int64_t terms) {
  for (int64_t p = 0; p < count; p += kBlock) {
    Vec sum[kBlock];
    for (int r = 0; r < kBlock; ++r) sum[r] = vzero();
    multiply_toeplitz<kDirection>(sum, taps + p * kLanes, values, terms);
    for (int r = 0; r < kBlock; ++r) {
      float* row = out + (p + r) * kLanes;
      vstore(row, vadd(vload(row), sum[r]));
    }
  }
}

// Rows from `lanes` arrays `stride` apart, kReversed: the last number first. Lanes without an array are zero.
template <bool kReversed>
static void to_rows(const float* arrays, int64_t stride, int64_t lanes, int64_t count, float* rows) {
  int64_t i = 0;
  if (lanes == kLanes) {
    for (; i + kLanes <= count; i += kLanes) {
      Vec block[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) block[lane] = vload(arrays + lane * stride + i);
      transpose(block);
      for (int k = 0; k < kLanes; ++k) vstore(rows + (kReversed ? count - 1 - i - k : i + k) * kLanes, block[k]);
    }
  }
  for (; i < count; ++i) {
    float* row = rows + (kReversed ? count - 1 - i : i) * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) row[lane] = lane < lanes ? arrays[lane * stride + i] : 0.0f;
  }
}

static void from_rows(const float* rows, int64_t lanes, int64_t count, float* arrays, int64_t stride) {
  int64_t i = 0;
  if (lanes == kLanes) {
    for (; i + kLanes <= count; i += kLanes) {
      Vec block[kLanes];
      for (int k = 0; k < kLanes; ++k) block[k] = vload(rows + (i + k) * kLanes);
      transpose(block);
      for (int lane = 0; lane < kLanes; ++lane) vstore(arrays + lane * stride + i, block[lane]);
    }
  }
  for (; i < count; ++i)
    for (int64_t lane = 0; lane < lanes; ++lane) arrays[lane * stride + i] = rows[i * kLanes + lane];
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
