// Conversions and transpositions between the caller's matrices and what the products read. Included inside an ISA
// unit after simd.h.
#pragma once

#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

template <class T>
static inline void convert_row(const T* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) vstore(target + i, load_full(source + i));
  if (i < count) store_some(target + i, load_some(source + i, count - i), count - i);
}

// target[d][row] = (negate ? -1 : 1) * source[row][d] for row < rows, d < columns; lanes from `rows` to `lanes` (a
// multiple of kLanes) are zero. `target` has room for `columns` rows only.
template <class T>
static void pack_transposed(const T* source, int64_t stride, int64_t rows, int64_t columns, int64_t lanes, bool negate,
                            float* target, int64_t target_stride) {
  const Vec sign = vset(negate ? -1.0f : 1.0f);
  for (int64_t row = 0; row < lanes; row += kLanes) {
    for (int64_t d = 0; d < columns; d += kLanes) {
      Vec block[kLanes];
      const int64_t width = min64(kLanes, columns - d);
      for (int r = 0; r < kLanes; ++r)
        block[r] = row + r < rows ? vmul(sign, load_some(source + (row + r) * stride + d, width)) : vzero();
      transpose(block);
      for (int64_t c = 0; c < width; ++c) vstore(target + (d + c) * target_stride + row, block[c]);
    }
  }
}

// target[row][d] = factor[row] * source[d][row]: back from lanes to the caller's rows. `source` has its rows padded
// to a multiple of kLanes; `factor` may be null for 1.
template <class T>
static void unpack_transposed(const float* source, int64_t source_stride, const float* factor, float scale,
                              int64_t rows, int64_t columns, T* target, int64_t stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    const Vec lane_factor = factor ? vload(factor + row) : vset(scale);
    for (int64_t d = 0; d < columns; d += kLanes) {
      Vec block[kLanes];
      for (int c = 0; c < kLanes; ++c) block[c] = vmul(lane_factor, vload(source + (d + c) * source_stride + row));
      transpose(block);
      for (int64_t r = 0; r < min64(kLanes, rows - row); ++r)
        store_some(target + (row + r) * stride + d, block[r], columns - d);
    }
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
