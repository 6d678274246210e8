// Differentiable k-means: one iteration over a chunk, and the output of the last one. `Block` is the arithmetic.
#pragma once

#include "dkm/arithmetic.h"

namespace effkern {
namespace EFFKERN_UNIT {

template <class T>
static void range_chunk(const dkm::Chunk& chunk, double* extremes) {
  const T* weight = static_cast<const T*>(chunk.weight);
  Vec least = vset(INFINITY), most = vset(-INFINITY);
  for (int64_t at = chunk.begin; at < chunk.end; at += kLanes) {
    T numbers[kLanes];  // behind the last, the first ones again
    const bool whole = at + kLanes <= chunk.end;
    if (!whole)
      for (int64_t i = 0; i < kLanes; ++i) numbers[i] = weight[at + i < chunk.end ? at + i : at];
    const Vec w = load_full(whole ? weight + at : numbers);
    least = vmin(w, least), most = vmax(w, most);
  }
  float lanes[2 * kLanes];
  vstore(lanes, least), vstore(lanes + kLanes, most);
  for (int i = 1; i < kLanes; ++i) {
    if (lanes[i] < lanes[0]) lanes[0] = lanes[i];
    if (lanes[kLanes + i] > lanes[kLanes]) lanes[kLanes] = lanes[kLanes + i];
  }
  extremes[0] = static_cast<double>(lanes[0]), extremes[1] = static_cast<double>(lanes[kLanes]);
}

template <class T, class Block>
static void accumulate_chunk(const dkm::Chunk& chunk, const dkm::Centroids& before, double* sums) {
  constexpr int D = Block::D, kSums = 1 + D;
  const Scratch scratch = scratch_of(chunk);
  double* running = reinterpret_cast<double*>(scratch.running);
  memset(running, 0, chunk.clusters * kSums * kLanes * sizeof(double));
  Vec poison = vzero();
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Block block;
    Vec counts[kRows], inverse[kRows];
    block.template load<T>(chunk, at, live);
    load_counts(chunk.counts, at, live, counts);
    EFFKERN_PLANES EFFKERN_ROWS poison = vfma(block.w[d][r], vzero(), poison);
    block.assign(chunk, before, scratch, inverse);
    EFFKERN_ROWS inverse[r] = vmul(inverse[r], counts[r]);
    for (int64_t j = 0; j < chunk.clusters; ++j) {
      double* mine = running + j * kSums * kLanes;
      Vec shares[kRows];
      EFFKERN_ROWS shares[r] = vmul(vload(scratch.powers + slot(j, r)), inverse[r]);
      const Vec count = vadd(vadd(shares[0], shares[1]), vadd(shares[2], shares[3]));
      wide_store(mine, wide_add(wide_load(mine), widen(count)));
      EFFKERN_PLANES {
        double* gaps = mine + (1 + d) * kLanes;
        wide_store(gaps, block.add_gaps(before, j, d, shares, wide_load(gaps)));
      }
    }
  }
  add_lanes(running, chunk.clusters * kSums, sums);
  for (int64_t i = 0; i < chunk.clusters * kSums; ++i)
    if (i % kSums) sums[i] *= Block::unit(chunk);
  float lanes[kLanes];
  vstore(lanes, poison);
  add_lanes(lanes, 1, sums + chunk.clusters * kSums);
}

template <class T, class Block>
static void emit_chunk(const dkm::Chunk& chunk, const dkm::Centroids& before, const float* after, void* out) {
  constexpr int D = Block::D;
  const Scratch scratch = scratch_of(chunk);
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Block block;
    Vec sums[D][kRows], inverse[kRows];
    block.template load<T>(chunk, at, live);
    block.assign(chunk, before, scratch, inverse);
    EFFKERN_PLANES EFFKERN_ROWS sums[d][r] = vzero();
    for (int64_t j = 0; j < chunk.clusters; ++j) EFFKERN_ROWS {
        const Vec power = vload(scratch.powers + slot(j, r));
        EFFKERN_PLANES sums[d][r] = vfma(power, vbroadcast(after + j * D + d), sums[d][r]);
      }
    EFFKERN_PLANES EFFKERN_ROWS sums[d][r] = vmul(sums[d][r], inverse[r]);
    store_block<D>(sums, live, static_cast<T*>(out) + at * D);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
