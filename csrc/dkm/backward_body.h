// Differentiable k-means backwards, in the letters of dkm_backward in effkern/reference/dkm.py.
#pragma once

#include "dkm/body.h"

namespace effkern {
namespace EFFKERN_UNIT {

// cbar^T_j = sum_i a_ij g_i.
template <class T, class Block>
static void collect_chunk(const dkm::Chunk& chunk, const dkm::Centroids& before, double* sums) {
  constexpr int D = Block::D;
  const T* grad = static_cast<const T*>(chunk.grad);
  const Scratch scratch = scratch_of(chunk);
  float *powers = scratch.powers, *running = scratch.running;
  memset(running, 0, chunk.clusters * D * kLanes * sizeof(float));
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Block block;
    Vec g[D][kRows], inverse[kRows];
    block.template load<T>(chunk, at, live);
    load_block<D>(grad + at * D, live, g);  // zeros behind the live ones
    block.assign(chunk, before, scratch, inverse);
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

// h of one cluster and row: q (w - c), and g (c - w) where the output's gradient enters. That is g c but for a number
// that all clusters share, and only differences between clusters matter: without it, they keep their digits.
template <int D, bool kLast>
EFFKERN_INLINE Vec pulled(const dkm::Step& step, int64_t j, int r, const Vec (&w)[D][kRows], const Vec (&g)[D][kRows]) {
  Vec sum = vzero();
  EFFKERN_PLANES {
    const Vec gap = gap_to(step.after, j * D + d, w[d][r]), pull = vbroadcast(step.pull + j * D + d);
    const Vec force = kLast ? vsub(pull, g[d][r]) : pull;
    sum = d == 0 ? vmul(gap, force) : vfma(gap, force, sum);
  }
  return sum;
}

// One iteration of a block from behind. With kSums adds to `running` what reaches c^(t-1) from so many vectors a lane,
//   cbar^(t-1)_j = 2 / temperature sum_i a_ij (h_ij - H_i) (w_i - p_j),
// and with kGradient to `out` the gradient of every vector; with both, counts are 1 and 0. Adds
//   sum_j a_j q_j + 2 / temperature sum_j a_j (h_j - H) (p_j - P).
template <bool kLast, bool kSums, bool kGradient, class Block, int D>
EFFKERN_INLINE void step_back(const dkm::Chunk& chunk, const dkm::Step& step, const Block& block,
                              const Vec (&g)[D][kRows], const Vec* counts, Vec (&out)[D][kRows]) {
  const auto& w = block.w;
  const Scratch scratch = scratch_of(chunk);
  float *powers = scratch.powers, *pulls = scratch.pulls;
  Vec inverse[kRows], mean[kRows], rest[kRows], centre[D][kRows], pull[D][kRows];  // centre: w - P
  block.assign(chunk, step.before, scratch, inverse);
  EFFKERN_ROWS mean[r] = vzero();
  EFFKERN_PLANES EFFKERN_ROWS centre[d][r] = pull[d][r] = vzero();
  for (int64_t j = 0; j < chunk.clusters; ++j) EFFKERN_ROWS {
      const Vec power = vload(powers + slot(j, r)), h = pulled<D, kLast>(step, j, r, w, g);
      mean[r] = vfma(power, h, mean[r]);
      vstore(pulls + slot(j, r), h);
      if (kGradient) EFFKERN_PLANES {
          centre[d][r] = vfma(power, gap_to(step.before, j * D + d, w[d][r]), centre[d][r]);
          pull[d][r] = vfma(power, vbroadcast(step.pull + j * D + d), pull[d][r]);
        }
    }
  EFFKERN_ROWS mean[r] = vmul(mean[r], inverse[r]);
  EFFKERN_PLANES EFFKERN_ROWS centre[d][r] = vmul(centre[d][r], inverse[r]);
  if (kGradient) EFFKERN_PLANES EFFKERN_ROWS out[d][r] = vfma(pull[d][r], inverse[r], out[d][r]);
  // sum_j a_ij (h_ij - H_i) is 0, and what it is instead is the error of H_i: next to nothing beside h, but not
  // beside the difference from H of a centroid that has nearly all of the weight.
  EFFKERN_ROWS rest[r] = vzero();
  if (kSums)
    for (int64_t j = 0; j < chunk.clusters; ++j) EFFKERN_ROWS {
        rest[r] = vfma(vload(powers + slot(j, r)), vsub(vload(pulls + slot(j, r)), mean[r]), rest[r]);
      }
  EFFKERN_ROWS rest[r] = vmul(rest[r], inverse[r]);
  EFFKERN_ROWS inverse[r] = vmul(inverse[r], vset(chunk.slope));
  if (kSums) EFFKERN_ROWS inverse[r] = vmul(inverse[r], counts[r]);
  for (int64_t j = 0; j < chunk.clusters; ++j) {
    Vec moves[kRows];
    EFFKERN_ROWS {
      const Vec lean = vsub(vsub(vload(pulls + slot(j, r)), mean[r]), rest[r]);
      moves[r] = vmul(vmul(vload(powers + slot(j, r)), inverse[r]), lean);
    }
    EFFKERN_PLANES {
      Vec sum = vzero();
      EFFKERN_ROWS {
        const Vec gap = gap_to(step.before, j * D + d, w[d][r]);
        if (kSums) sum = vfma(moves[r], gap, sum);
        if (kGradient) out[d][r] = vfma(moves[r], vsub(centre[d][r], gap), out[d][r]);
      }
      float* mine = scratch.running + (j * D + d) * kLanes;
      if (kSums) vstore(mine, vadd(vload(mine), sum));
    }
  }
}

// What reaches c^(t-1). With kFused also the iteration's part of the gradient, which the last one begins and the others
// add to.
template <class T, class Block, bool kLast, bool kFused>
static void reverse_chunk(const dkm::Chunk& chunk, const dkm::Step& step, T* out, double* sums) {
  constexpr int D = Block::D;
  const T* grad = static_cast<const T*>(chunk.grad);
  float* running = scratch_of(chunk).running;
  memset(running, 0, chunk.clusters * D * kLanes * sizeof(float));
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Block block;
    Vec g[D][kRows], counts[kRows], made[D][kRows];
    block.template load<T>(chunk, at, live);
    load_counts(chunk.counts, at, live, counts);
    if (kLast) {
      load_block<D>(grad + at * D, live, g);
      // Of equal vectors h is that of one, with the mean of their gradients.
      if (chunk.counts) EFFKERN_PLANES EFFKERN_ROWS g[d][r] = vdiv(g[d][r], vmax(counts[r], vset(1.0f)));
      EFFKERN_PLANES EFFKERN_ROWS made[d][r] = vzero();
    } else if (kFused) {
      load_block<D>(out + at * D, live, made);
    }
    step_back<kLast, true, kFused>(chunk, step, block, g, counts, made);
    if (kFused) store_block<D>(made, live, out + at * D);
  }
  add_lanes(running, chunk.clusters * D, sums);
}

// The gradient through `steps`; it is added to `out` unless the last iteration is one of them.
template <class T, class Block>
static void gradient_chunk(const dkm::Chunk& chunk, const dkm::Step* steps, int64_t count, void* out) {
  constexpr int D = Block::D;
  const T* grad = static_cast<const T*>(chunk.grad);
  T* to = static_cast<T*>(out);
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const int64_t live = min64(kBlock, chunk.end - at);
    Block block;
    Vec g[D][kRows], sums[D][kRows];
    block.template load<T>(chunk, at, live);
    if (steps[count - 1].last) {
      load_block<D>(grad + at * D, live, g);
      EFFKERN_PLANES EFFKERN_ROWS sums[d][r] = vzero();
    } else {
      load_block<D>(to + at * D, live, sums);
    }
    for (int64_t t = 0; t < count; ++t) {
      if (steps[t].last)
        step_back<true, false, true>(chunk, steps[t], block, g, nullptr, sums);
      else
        step_back<false, false, true>(chunk, steps[t], block, g, nullptr, sums);
    }
    store_block<D>(sums, live, to + at * D);
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
