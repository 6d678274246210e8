// A block and its assignment to the centroids, in two kinds of arithmetic. The bodies take either.
#pragma once

#include "dkm/block.h"

namespace effkern {
namespace EFFKERN_UNIT {

// w - c_j.
EFFKERN_INLINE Vec gap_to(const dkm::Centroids& centroids, int64_t at, Vec w) {
  return vsub(vsub(w, vbroadcast(centroids.high + at)), vbroadcast(centroids.low + at));
}

// Distances and their sums in float64: right for all temperatures.
template <int kDim>
struct Sharp {
  static constexpr int D = kDim;
  Vec w[D][kRows];
  double scaled[D][kBlock];

  template <class T>
  EFFKERN_MEMBER void load(const dkm::Chunk& chunk, int64_t at, int64_t live) {
    load_block<D>(static_cast<const T*>(chunk.weight) + at * D, live, w);
    const Wide scale = wide_set(chunk.scale);
    EFFKERN_PLANES EFFKERN_ROWS wide_store(scaled[d] + r * kLanes, wide_mul(widen(w[d][r]), scale));
  }

  // a_j is scratch's power j times inverse. The nearest centroid's power is 1, so the sum is never 0.
  EFFKERN_MEMBER void assign(const dkm::Chunk& chunk, const dkm::Centroids& before, const Scratch& scratch,
                             Vec (&inverse)[kRows]) const {
    Wide nearest[kRows];
    Vec total[kRows];
    EFFKERN_ROWS nearest[r] = wide_set(static_cast<double>(INFINITY));
    EFFKERN_ROWS total[r] = vzero();
    for (int64_t j = 0; j < chunk.clusters; ++j) {
      EFFKERN_ROWS {
        Wide square = wide_set(0.0);
        EFFKERN_PLANES {
          const Wide gap = wide_sub(wide_load(scaled[d] + r * kLanes), wide_set(before.scaled[j * D + d]));
          square = d == 0 ? wide_mul(gap, gap) : wide_fma(gap, gap, square);
        }
        nearest[r] = wide_min(square, nearest[r]);
        wide_store(scratch.distances + slot(j, r), square);
      }
    }
    for (int64_t j = 0; j < chunk.clusters; ++j) {
      Vec power[kRows];
      EFFKERN_ROWS power[r] = narrow(wide_sub(nearest[r], wide_load(scratch.distances + slot(j, r))));
      vexp2_below_one(power);
      EFFKERN_ROWS total[r] = vadd(total[r], power[r]);
      EFFKERN_ROWS vstore(scratch.powers + slot(j, r), power[r]);
    }
    EFFKERN_ROWS inverse[r] = vdiv(vset(1.0f), total[r]);
  }

  // Adds the distances from number d of centroid j, `shares` times. What is lost here moves the boundary between two
  // clusters at every later iteration.
  EFFKERN_MEMBER Wide add_gaps(const dkm::Centroids& before, int64_t j, int d, const Vec (&shares)[kRows],
                               Wide sum) const {
    const Wide centroid = wide_set(before.scaled[j * D + d]);
    EFFKERN_ROWS sum = wide_fma(widen(shares[r]), wide_sub(wide_load(scaled[d] + r * kLanes), centroid), sum);
    return sum;
  }
  static EFFKERN_MEMBER double unit(const dkm::Chunk& chunk) { return 1 / chunk.scale; }  // of these sums
};

// Single numbers in float32, where the group has found that this is enough. No centroid is looked for that is the
// nearest: a number between two centroids is at most kMild from it, which the exponent has room for, and for others the
// distance to the outermost one is taken off.
struct Mild {
  static constexpr int D = 1;
  Vec w[D][kRows];

  template <class T>
  EFFKERN_MEMBER void load(const dkm::Chunk& chunk, int64_t at, int64_t live) {
    load_block<D>(static_cast<const T*>(chunk.weight) + at, live, w);
  }

  EFFKERN_MEMBER void assign(const dkm::Chunk& chunk, const dkm::Centroids& before, const Scratch& scratch,
                             Vec (&inverse)[kRows]) const {
    const Vec steep = vset(-chunk.steep);
    Vec base[kRows], total[kRows];
    EFFKERN_ROWS {
      const Vec above = gap_to(before, before.most, w[0][r]), below = gap_to(before, before.least, w[0][r]);
      const Vec beyond = vmax(vmax(above, vsub(vzero(), below)), vzero());
      base[r] = vsub(vzero(), vmul(beyond, vmul(beyond, steep)));
      total[r] = vzero();
    }
    for (int64_t j = 0; j < chunk.clusters; ++j) {
      Vec power[kRows];
      EFFKERN_ROWS power[r] = gap_to(before, j, w[0][r]);
      EFFKERN_ROWS power[r] = vfma(power[r], vmul(power[r], steep), base[r]);
      vexp2_below_one(power);
      EFFKERN_ROWS total[r] = vadd(total[r], power[r]);
      EFFKERN_ROWS vstore(scratch.powers + slot(j, r), power[r]);
    }
    EFFKERN_ROWS inverse[r] = vdiv(vset(1.0f), total[r]);
  }

  EFFKERN_MEMBER Wide add_gaps(const dkm::Centroids& before, int64_t j, int, const Vec (&shares)[kRows],
                               Wide sum) const {
    Vec block = vzero();
    EFFKERN_ROWS block = vfma(shares[r], gap_to(before, j, w[0][r]), block);
    return wide_add(sum, widen(block));
  }
  static EFFKERN_MEMBER double unit(const dkm::Chunk&) { return 1; }
};

}  // namespace EFFKERN_UNIT
}  // namespace effkern
