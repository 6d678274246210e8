// Passes over 16-bit weights whose codes select from tables.
#pragma once

#include "dkm/block.h"

namespace effkern {
namespace EFFKERN_UNIT {

template <class T>
static void sum_by_code(const uint16_t* codes, const void* grad, int64_t begin, int64_t end, const uint16_t* index,
                        double* sums) {
  const T* from = static_cast<const T*>(grad);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t live = min64(kBlock, end - at);
    float line[kBlock];
    EFFKERN_ROWS vstore(line + r * kLanes, load_some(from + at + r * kLanes, live - r * kLanes));
    for (int64_t i = 0; i < live; ++i) sums[index[codes[at + i]]] += static_cast<double>(line[i]);
  }
}

template <class T>
static void gradient_by_code(const uint16_t* codes, const void* grad, int64_t begin, int64_t end, const float* slopes,
                             const float* offsets, void* out) {
  const T* from = static_cast<const T*>(grad);
  T* to = static_cast<T*>(out);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t live = min64(kBlock, end - at);
    float slope[kBlock], offset[kBlock];
    for (int64_t i = 0; i < live; ++i) {
      slope[i] = slopes[codes[at + i]];
      offset[i] = offsets[codes[at + i]];
    }
    for (int64_t i = live; i < kBlock; ++i) slope[i] = offset[i] = 0;
    EFFKERN_ROWS {
      const Vec g = load_some(from + at + r * kLanes, live - r * kLanes);
      store_some(to + at + r * kLanes, vfma(g, vload(slope + r * kLanes), vload(offset + r * kLanes)),
                 live - r * kLanes);
    }
  }
}

template <class T>
static void widen_numbers(const void* from, int64_t count, float* to) {
  const T* source = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; i += kLanes) store_some(to + i, load_some(source + i, count - i), count - i);
}

template <class T>
static void narrow_numbers(const float* from, int64_t count, void* to) {
  T* target = static_cast<T*>(to);
  for (int64_t i = 0; i < count; i += kLanes) store_some(target + i, load_some(from + i, count - i), count - i);
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
