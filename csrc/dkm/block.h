// A block of vectors in registers, and their assignment to the centroids. Included by the bodies.
#pragma once

#include "core/cpu/simd.h"
#include "dkm/kernel.h"

namespace effkern {
namespace EFFKERN_UNIT {

// Several registers a plane: as many independent chains of operations, and one load of a centroid for all of them.
constexpr int kRows = 4;
constexpr int64_t kBlock = kRows * kLanes;

#define EFFKERN_ROWS _Pragma("GCC unroll 4") for (int r = 0; r < kRows; ++r)
#define EFFKERN_PLANES _Pragma("GCC unroll 4") for (int d = 0; d < D; ++d)

// `live` vectors of D numbers each, number d of all of them in plane d; zeros behind them.
template <int D, class T>
EFFKERN_INLINE void load_block(const T* from, int64_t live, Vec (&to)[D][kRows]) {
  if (D == 1) {
    EFFKERN_ROWS to[0][r] = load_some(from + r * kLanes, live - r * kLanes);
    return;
  }
  float line[D * kBlock], planes[D * kBlock];
  for (int64_t i = 0; i < D * kBlock; i += kLanes) vstore(line + i, load_some(from + i, D * live - i));
  for (int64_t i = 0; i < kBlock; ++i)
    for (int d = 0; d < D; ++d) planes[d * kBlock + i] = line[i * D + d];
  EFFKERN_PLANES EFFKERN_ROWS to[d][r] = vload(planes + d * kBlock + r * kLanes);
}

template <int D, class T>
EFFKERN_INLINE void store_block(const Vec (&from)[D][kRows], int64_t live, T* to) {
  if (D == 1) {
    EFFKERN_ROWS store_some(to + r * kLanes, from[0][r], live - r * kLanes);
    return;
  }
  float line[D * kBlock], planes[D * kBlock];
  EFFKERN_PLANES EFFKERN_ROWS vstore(planes + d * kBlock + r * kLanes, from[d][r]);
  for (int64_t i = 0; i < kBlock; ++i)
    for (int d = 0; d < D; ++d) line[i * D + d] = planes[d * kBlock + i];
  for (int64_t i = 0; i < D * kBlock; i += kLanes) store_some(to + i, vload(line + i), D * live - i);
}

// How many vectors each lane stands for: none behind the live ones.
EFFKERN_INLINE void load_counts(const float* counts, int64_t at, int64_t live, Vec (&to)[kRows]) {
  if (counts) {
    EFFKERN_ROWS to[r] = load_some(counts + at + r * kLanes, live - r * kLanes);
  } else if (live == kBlock) {
    EFFKERN_ROWS to[r] = vset(1.0f);
  } else {
    float ones[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) ones[i] = i < live ? 1.0f : 0.0f;
    EFFKERN_ROWS to[r] = vload(ones + r * kLanes);
  }
}

// Where cluster j's numbers for row r stand in a (clusters, kBlock) table.
EFFKERN_INLINE int64_t slot(int64_t j, int r) { return (j * kRows + r) * kLanes; }

// a_j is powers[j] times inverse. The nearest centroid's power is 1, so the sum is never 0.
template <int D>
EFFKERN_INLINE void assign(const Vec (&w)[D][kRows], const float* centroids, int64_t clusters, float sharpness,
                           float* powers, Vec (&inverse)[kRows]) {
  const Vec sharp = vset(sharpness);
  Vec nearest[kRows], total[kRows];
  EFFKERN_ROWS nearest[r] = vset(INFINITY);
  EFFKERN_ROWS total[r] = vzero();
  for (int64_t j = 0; j < clusters; ++j) {
    EFFKERN_ROWS {
      Vec square = vzero();
      EFFKERN_PLANES {
        const Vec gap = vsub(w[d][r], vbroadcast(centroids + j * D + d));
        square = d == 0 ? vmul(gap, gap) : vfma(gap, gap, square);
      }
      const Vec distance = vmul(square, sharp);
      nearest[r] = vmin(distance, nearest[r]);
      vstore(powers + slot(j, r), distance);
    }
  }
  for (int64_t j = 0; j < clusters; ++j) {
    EFFKERN_ROWS {
      const Vec power = vexp2(vsub(nearest[r], vload(powers + slot(j, r))));
      total[r] = vadd(total[r], power);
      vstore(powers + slot(j, r), power);
    }
  }
  EFFKERN_ROWS inverse[r] = vdiv(vset(1.0f), total[r]);
}

// Adds the lanes of each of `count` running sums, always in the same order.
static void add_lanes(const float* lanes, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(lanes[i * kLanes + lane]);
    sums[i] = static_cast<float>(sum);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
