// A factor times a handful of tokens: bound by reading the weights, so each is read once, in place, in its own dtype,
// along its rows. Included inside an ISA unit after simd.h.
#pragma once

#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

constexpr int64_t kDotTokens = 4;  // with more, tokens across the lanes win

// sums[row * row_step + token * token_step] = w[row] . x[token] for kTokens tokens. As many sums as lanes are in
// flight, so that one transposition adds them all up.
template <class T, int kTokens>
EFFKERN_INLINE void dot_rows(const T* w, int64_t rows, int64_t depth, const float* x, int64_t x_stride, float* sums,
                             int64_t row_step, int64_t token_step) {
  constexpr int kRows = kLanes / kTokens;
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const T* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = w + min64(begin + r, rows - 1) * depth;
    Vec sum[kLanes];
    for (int i = 0; i < kLanes; ++i) sum[i] = vzero();
    int64_t d = 0;
    for (; d + kLanes <= depth; d += kLanes)
      for (int t = 0; t < kTokens; ++t) {
        const Vec value = vload(x + t * x_stride + d);
        for (int r = 0; r < kRows; ++r) {
          // Rows are short streams, which hardware does not see coming: the same place of the next rows.
          if (t == 0) __builtin_prefetch(row[r] + d + kRows * depth);
          sum[r * kTokens + t] = vfma(load_full(row[r] + d), value, sum[r * kTokens + t]);
        }
      }
    if (d < depth)
      for (int t = 0; t < kTokens; ++t) {
        const Vec value = load_some(x + t * x_stride + d, depth - d);
        for (int r = 0; r < kRows; ++r)
          sum[r * kTokens + t] = vfma(load_some(row[r] + d, depth - d), value, sum[r * kTokens + t]);
      }
    transpose(sum);
    Vec total = sum[0];
    for (int i = 1; i < kLanes; ++i) total = vadd(total, sum[i]);
    float totals[kLanes];
    vstore(totals, total);
    for (int r = 0; r < kRows && begin + r < rows; ++r)
      for (int t = 0; t < kTokens; ++t) sums[(begin + r) * row_step + t * token_step] = totals[r * kTokens + t];
  }
}

template <class T>
static void dot_block(const T* w, int64_t rows, int64_t depth, const float* x, int64_t x_stride, int64_t tokens,
                      float* sums, int64_t row_step, int64_t token_step) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    dot_rows<T, 4>(w, rows, depth, x + t * x_stride, x_stride, sums + t * token_step, row_step, token_step);
  for (; t + 2 <= tokens; t += 2)
    dot_rows<T, 2>(w, rows, depth, x + t * x_stride, x_stride, sums + t * token_step, row_step, token_step);
  if (t < tokens)
    dot_rows<T, 1>(w, rows, depth, x + t * x_stride, x_stride, sums + t * token_step, row_step, token_step);
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
