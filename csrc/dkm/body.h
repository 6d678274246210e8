// Differentiable k-means: one iteration over a chunk, and the output of the last one.
#pragma once

#include "dkm/block.h"

namespace effkern {
namespace EFFKERN_UNIT {

// The powers, the backward pass's h, and running sums lane by lane.
static int64_t scratch_floats(int64_t clusters, int64_t dim) { return clusters * (2 * kBlock + (1 + dim) * kLanes); }

template <class T, int D>
static void accumulate_chunk(const dkm::Chunk& chunk, const float* before, float* sums) {
  constexpr int kSums = 1 + D;
  const T* weight = static_cast<const T*>(chunk.weight);
  float* powers = chunk.scratch;
  float* running = powers + 2 * chunk.clusters * kBlock;
  memset(running, 0, chunk.clusters * kSums * kLanes * sizeof(float));
  Vec poison = vzero();
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Vec w[D][kRows], counts[kRows], inverse[kRows];
    load_block<D>(weight + at * D, live, w);
    load_counts(chunk.counts, at, live, counts);
    EFFKERN_PLANES EFFKERN_ROWS poison = vfma(w[d][r], vzero(), poison);
    assign<D>(w, before, chunk.clusters, chunk.sharpness, powers, inverse);
    EFFKERN_ROWS inverse[r] = vmul(inverse[r], counts[r]);
    for (int64_t j = 0; j < chunk.clusters; ++j) {
      float* mine = running + j * kSums * kLanes;
      Vec shares[kRows];
      EFFKERN_ROWS shares[r] = vmul(vload(powers + slot(j, r)), inverse[r]);
      vstore(mine, vadd(vload(mine), vadd(vadd(shares[0], shares[1]), vadd(shares[2], shares[3]))));
      EFFKERN_PLANES {
        const Vec centroid = vbroadcast(before + j * D + d);
        Vec sum = vzero();
        EFFKERN_ROWS sum = vfma(shares[r], vsub(w[d][r], centroid), sum);
        vstore(mine + (1 + d) * kLanes, vadd(vload(mine + (1 + d) * kLanes), sum));
      }
    }
  }
  add_lanes(running, chunk.clusters * kSums, sums);
  float lanes[kLanes];
  vstore(lanes, poison);
  add_lanes(lanes, 1, sums + chunk.clusters * kSums);
}

template <class T, int D>
static void emit_chunk(const dkm::Chunk& chunk, const float* before, const float* after, void* out) {
  const T* weight = static_cast<const T*>(chunk.weight);
  float* powers = chunk.scratch;
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Vec w[D][kRows], sums[D][kRows], inverse[kRows];
    load_block<D>(weight + at * D, live, w);
    assign<D>(w, before, chunk.clusters, chunk.sharpness, powers, inverse);
    EFFKERN_PLANES EFFKERN_ROWS sums[d][r] = vzero();
    for (int64_t j = 0; j < chunk.clusters; ++j) EFFKERN_ROWS {
        const Vec power = vload(powers + slot(j, r));
        EFFKERN_PLANES sums[d][r] = vfma(power, vbroadcast(after + j * D + d), sums[d][r]);
      }
    EFFKERN_PLANES EFFKERN_ROWS sums[d][r] = vmul(sums[d][r], inverse[r]);
    store_block<D>(sums, live, static_cast<T*>(out) + at * D);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
