// A block of vectors in registers, and the scratch of a chunk. Included by the bodies.
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

// Adds the lanes of each of `count` running sums, always in the same order.
template <class Number>
static void add_lanes(const Number* lanes, int64_t count, double* sums) {
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = 0;
    for (int lane = 0; lane < kLanes; ++lane) sums[i] += static_cast<double>(lanes[i * kLanes + lane]);
  }
}

// A chunk's scratch: the powers, the distances (the backward pass's h once they are used), and running sums.
struct Scratch {
  float* powers;
  double* distances;
  float* pulls;
  float* running;
};

static int64_t scratch_floats(int64_t clusters, int64_t dim) {
  return clusters * (3 * kBlock + 2 * (1 + dim) * kLanes);
}

EFFKERN_INLINE Scratch scratch_of(const dkm::Chunk& chunk) {
  float* room = chunk.scratch + chunk.clusters * kBlock;
  return {chunk.scratch, reinterpret_cast<double*>(room), room, room + 2 * chunk.clusters * kBlock};
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
