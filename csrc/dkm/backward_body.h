// Differentiable k-means backwards, in the letters of dkm_backward in effkern/reference/dkm.py.
#pragma once

#include "dkm/body.h"

namespace effkern {
namespace EFFKERN_UNIT {

// cbar^T_j = sum_i a_ij g_i.
template <class T, int D>
static void collect_chunk(const dkm::Chunk& chunk, const float* before, float* sums) {
  const T* weight = static_cast<const T*>(chunk.weight);
  const T* grad = static_cast<const T*>(chunk.grad);
  float* powers = chunk.scratch;
  float* running = powers + 2 * chunk.clusters * kBlock;
  memset(running, 0, chunk.clusters * D * kLanes * sizeof(float));
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Vec w[D][kRows], g[D][kRows], inverse[kRows];
    load_block<D>(weight + at * D, live, w);
    load_block<D>(grad + at * D, live, g);  // zeros behind the live ones
    assign<D>(w, before, chunk.clusters, chunk.sharpness, powers, inverse);
    EFFKERN_PLANES EFFKERN_ROWS g[d][r] = vmul(g[d][r], inverse[r]);
    for (int64_t j = 0; j < chunk.clusters; ++j) EFFKERN_PLANES {
        float* mine = running + (j * D + d) * kLanes;
        Vec sum = vzero();
        EFFKERN_ROWS sum = vfma(vload(powers + slot(j, r)), g[d][r], sum);
        vstore(mine, vadd(vload(mine), sum));
      }
  }
  add_lanes(running, chunk.clusters * D, sums);
}

// h of one cluster and row: q (w - c), `counts` times, and g c where the output's gradient enters.
template <int D, bool kLast>
EFFKERN_INLINE Vec pulled(const dkm::Step& step, int64_t j, int r, const Vec (&w)[D][kRows], const Vec (&g)[D][kRows],
                          Vec counts) {
  Vec sum = vzero();
  EFFKERN_PLANES {
    const Vec gap = vsub(w[d][r], vbroadcast(step.after + j * D + d));
    sum = vfma(gap, vbroadcast(step.pull + j * D + d), sum);
  }
  sum = vmul(sum, counts);
  if (kLast) EFFKERN_PLANES sum = vfma(g[d][r], vbroadcast(step.after + j * D + d), sum);
  return sum;
}

// cbar^(t-1)_j = 2 / temperature sum_i a_ij (h_ij - H_i) (w_i - p_j).
template <class T, int D, bool kLast>
static void reverse_chunk(const dkm::Chunk& chunk, const dkm::Step& step, float* sums) {
  const T* weight = static_cast<const T*>(chunk.weight);
  const T* grad = static_cast<const T*>(chunk.grad);
  float* powers = chunk.scratch;
  float* pulls = powers + chunk.clusters * kBlock;
  float* running = pulls + chunk.clusters * kBlock;
  const Vec slope = vset(chunk.slope);
  memset(running, 0, chunk.clusters * D * kLanes * sizeof(float));
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Vec w[D][kRows], g[D][kRows], counts[kRows], inverse[kRows], mean[kRows];
    load_block<D>(weight + at * D, live, w);
    if (kLast) load_block<D>(grad + at * D, live, g);
    load_counts(chunk.counts, at, live, counts);
    assign<D>(w, step.before, chunk.clusters, chunk.sharpness, powers, inverse);
    EFFKERN_ROWS mean[r] = vzero();
    for (int64_t j = 0; j < chunk.clusters; ++j) EFFKERN_ROWS {
        const Vec h = pulled<D, kLast>(step, j, r, w, g, counts[r]);
        mean[r] = vfma(vload(powers + slot(j, r)), h, mean[r]);
        vstore(pulls + slot(j, r), h);
      }
    EFFKERN_ROWS mean[r] = vmul(mean[r], inverse[r]);
    EFFKERN_ROWS inverse[r] = vmul(inverse[r], slope);
    for (int64_t j = 0; j < chunk.clusters; ++j) {
      Vec moves[kRows];
      EFFKERN_ROWS {
        const Vec share = vmul(vload(powers + slot(j, r)), inverse[r]);
        moves[r] = vmul(share, vsub(vload(pulls + slot(j, r)), mean[r]));
      }
      EFFKERN_PLANES {
        float* mine = running + (j * D + d) * kLanes;
        const Vec centroid = vbroadcast(step.before + j * D + d);
        Vec sum = vzero();
        EFFKERN_ROWS sum = vfma(moves[r], vsub(w[d][r], centroid), sum);
        vstore(mine, vadd(vload(mine), sum));
      }
    }
  }
  add_lanes(running, chunk.clusters * D, sums);
}

// Adds the gradient of a block through one iteration: sum_j a_j q_j + 2 / temperature sum_j a_j (h_j - H) (p_j - P).
template <int D, bool kLast>
EFFKERN_INLINE void add_gradient(const dkm::Chunk& chunk, const dkm::Step& step, const Vec (&w)[D][kRows],
                                 const Vec (&g)[D][kRows], Vec (&out)[D][kRows]) {
  float* powers = chunk.scratch;
  float* pulls = powers + chunk.clusters * kBlock;
  Vec inverse[kRows], mean[kRows], centre[D][kRows];  // centre: w - P
  assign<D>(w, step.before, chunk.clusters, chunk.sharpness, powers, inverse);
  EFFKERN_ROWS mean[r] = vzero();
  EFFKERN_PLANES EFFKERN_ROWS centre[d][r] = vzero();
  for (int64_t j = 0; j < chunk.clusters; ++j) EFFKERN_ROWS {
      const Vec power = vload(powers + slot(j, r)), h = pulled<D, kLast>(step, j, r, w, g, vset(1.0f));
      mean[r] = vfma(power, h, mean[r]);
      EFFKERN_PLANES {
        const Vec gap = vsub(w[d][r], vbroadcast(step.before + j * D + d));
        centre[d][r] = vfma(power, gap, centre[d][r]);
      }
      vstore(pulls + slot(j, r), h);
    }
  EFFKERN_ROWS mean[r] = vmul(mean[r], inverse[r]);
  EFFKERN_PLANES EFFKERN_ROWS centre[d][r] = vmul(centre[d][r], inverse[r]);
  const Vec slope = vset(chunk.slope);
  for (int64_t j = 0; j < chunk.clusters; ++j) EFFKERN_ROWS {
      const Vec share = vmul(vload(powers + slot(j, r)), inverse[r]);
      const Vec lean = vmul(slope, vsub(vload(pulls + slot(j, r)), mean[r]));
      EFFKERN_PLANES {
        const Vec gap = vsub(w[d][r], vbroadcast(step.before + j * D + d));
        const Vec change = vfma(lean, vsub(centre[d][r], gap), vbroadcast(step.pull + j * D + d));
        out[d][r] = vfma(share, change, out[d][r]);
      }
    }
}

template <class T, int D>
static void gradient_chunk(const dkm::Chunk& chunk, const dkm::Step* steps, int64_t count, void* out) {
  const T* weight = static_cast<const T*>(chunk.weight);
  const T* grad = static_cast<const T*>(chunk.grad);
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Vec w[D][kRows], g[D][kRows], sums[D][kRows];
    load_block<D>(weight + at * D, live, w);
    load_block<D>(grad + at * D, live, g);
    EFFKERN_PLANES EFFKERN_ROWS sums[d][r] = vzero();
    for (int64_t t = 0; t < count; ++t) {
      if (steps[t].last)
        add_gradient<D, true>(chunk, steps[t], w, g, sums);
      else
        add_gradient<D, false>(chunk, steps[t], w, g, sums);
    }
    store_block<D>(sums, live, static_cast<T*>(out) + at * D);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
