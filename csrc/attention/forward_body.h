// Attention forward for one query tile: online softmax over its list of key tiles. One body for every ISA unit; the
// engine supplies the products and the layouts.
#pragma once

#include "attention/kernel.h"
#include "attention/mask_body.h"
#include "attention/terms_body.h"
#include "core/cpu/pack.h"
#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

using attention::ForwardTile;
using attention::KeyRun;
using attention::Problem;
using attention::Rows;

constexpr float kLog2e = 1.44269504088896341f;

// Scores are |scale| log2(e) S, on a query tile whose sign carries that of the scale: then larger S means larger
// weight, and the maximum can be taken before scaling. A zero scale keeps a factor whose product with any score
// vanishes but whose product with minus infinity does not become NaN.
EFFKERN_INLINE float exponent_factor(float scale) {
  const float magnitude = fabsf(scale) * kLog2e;
  return magnitude > 1e-37f ? magnitude : 1e-37f;
}

EFFKERN_INLINE void fill_rows(float* s, int64_t lanes, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin * lanes; i < end * lanes; i += kLanes) vstore(s + i, vset(value));
}

// Running state of the online softmax: a reference score, and the sum of 2^(factor (score - reference)).
// The reference trails the true maximum by up to 2^kSlack in weight, so that most tiles need no rescaling of the
// output; sums grow by at most 2^kSlack, far from the end of the fp32 range.
struct SoftmaxState {
  float reference[kMaxQueryTile];
  float sum[kMaxQueryTile];
};
constexpr float kSlack = 8.0f;

// Beyond this, half an ulp of factor * reference is no longer small against 1, and a fused multiply-add would not
// give the best key exactly weight 1. Decided lane by lane: no row's bits depend on its neighbours.
constexpr float kFusedLimit = 1 << 18;

template <bool kFused>
EFFKERN_INLINE Vec exponent(Vec score, Vec factor, Vec reference, Vec offset, Vec size) {
  const Vec fused = vfma(score, factor, offset);
  if (kFused) return fused;
  return select_greater(size, vset(kFusedLimit), vmul(vsub(score, reference), factor), fused);
}

// One vector of lanes, all keys: scores to weights. Returns their sum, to which dropped weights still belong.
template <class Engine, bool kFused, bool kDropout>
EFFKERN_INLINE Vec weigh_keys(const float* s, const float* keep, typename Engine::Packed* probabilities, int64_t padded,
                              int64_t lanes, int64_t lane, Vec factor, Vec reference) {
  const Vec offset = vsub(vzero(), vmul(factor, reference)), size = vmax(offset, vsub(vzero(), offset));
  Vec sum0 = vzero(), sum1 = vzero();
  for (int64_t key = 0; key < padded; key += 2) {
    const Vec s0 = vload(s + key * lanes + lane), s1 = vload(s + (key + 1) * lanes + lane);
    Vec even = vexp2(exponent<kFused>(s0, factor, reference, offset, size));
    Vec odd = vexp2(exponent<kFused>(s1, factor, reference, offset, size));
    sum0 = vadd(sum0, even);
    sum1 = vadd(sum1, odd);
    if (kDropout) {
      even = vmul(even, vload(keep + key * lanes + lane));
      odd = vmul(odd, vload(keep + (key + 1) * lanes + lane));
    }
    Engine::store_pair(probabilities, lanes, key, lane, even, odd);
  }
  return vadd(sum0, sum1);
}

// `keep` holds the dropout factors of the tile and is null without dropout.
template <class Engine>
static void softmax_tile(float* s, const float* keep, typename Engine::Packed* probabilities, int64_t count,
                         int64_t padded, int64_t lanes, Vec factor, bool first, int64_t value_dim, float* o,
                         SoftmaxState* state) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    Vec top0 = vset(-INFINITY), top1 = top0;
    int64_t key = 0;
    for (; key + 1 < count; key += 2) {
      top0 = vmax(vload(s + key * lanes + lane), top0);
      top1 = vmax(vload(s + (key + 1) * lanes + lane), top1);
    }
    if (key < count) top0 = vmax(vload(s + key * lanes + lane), top0);
    const Vec top = vmax(top0, top1);

    Vec reference = vload(state->reference + lane), sum = vload(state->sum + lane);
    const Vec rise = vmul(vsub(top, reference), factor);
    if (any_greater(rise, vset(kSlack))) {
      const Vec raised = select_greater(rise, vset(kSlack), top, reference);
      const Vec keep = select_greater(rise, vset(kSlack), vexp2(vmul(vsub(reference, raised), factor)), vset(1.0f));
      reference = raised;
      sum = vmul(sum, keep);
      vstore(state->reference + lane, reference);
      if (!first)
        for (int64_t d = 0; d < value_dim; ++d) vstore(o + d * lanes + lane, vmul(vload(o + d * lanes + lane), keep));
    }
    const Vec base = replace_minus_infinity(reference, vzero());  // a row that has seen no key yet
    const Vec scaled = vmul(base, factor);
    const bool fused = !any_greater(vmax(scaled, vsub(vzero(), scaled)), vset(kFusedLimit));
    Vec added;
    if (keep)
      added = weigh_keys<Engine, false, true>(s, keep, probabilities, padded, lanes, lane, factor, base);
    else if (fused)
      added = weigh_keys<Engine, true, false>(s, keep, probabilities, padded, lanes, lane, factor, base);
    else
      added = weigh_keys<Engine, false, false>(s, keep, probabilities, padded, lanes, lane, factor, base);
    vstore(state->sum + lane, vadd(sum, added));
  }
}

struct ForwardScratch {
  float *scores, *output, *bias, *keep;
  void *query, *probabilities;
};

template <class Engine>
static int64_t forward_layout(const Problem& p, char* base, ForwardScratch* scratch) {
  constexpr int64_t kAlign = 64;
  const int64_t lanes = Engine::kMostQueries, tile = (Engine::kKeyTile + Engine::kKeyMultiple) * lanes * 4;
  const int64_t sizes[6] = {tile,
                            Engine::padded_dim(p.value_dim) * lanes * 4,
                            Engine::query_operand_bytes(p.head_dim, lanes),
                            Engine::probability_bytes(Engine::kKeyTile, lanes),
                            p.terms ? tile : 0,
                            p.terms ? tile : 0};
  int64_t offsets[7] = {0};
  for (int i = 0; i < 6; ++i) offsets[i + 1] = round_up(offsets[i] + sizes[i], kAlign);
  if (scratch) {
    base = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(base), kAlign));
    scratch->scores = reinterpret_cast<float*>(base + offsets[0]);
    scratch->output = reinterpret_cast<float*>(base + offsets[1]);
    scratch->query = base + offsets[2];
    scratch->probabilities = base + offsets[3];
    scratch->bias = reinterpret_cast<float*>(base + offsets[4]);
    scratch->keep = reinterpret_cast<float*>(base + offsets[5]);
  }
  return offsets[6] + kAlign;
}

template <class Engine>
static int64_t forward_scratch_bytes(const Problem& p) {
  return forward_layout<Engine>(p, nullptr, nullptr);
}

// Divides by the sums, writes the rows of the tile and their log-sum-exp. A row without keys gets 0. `unit` is the size
// of a score in the state, in natural units. A sink is one more logit: it only enters here.
template <class Engine>
static void finish_forward(const ForwardTile& t, int64_t lanes, const float* o, const SoftmaxState& state, float unit) {
  float inverse[kMaxQueryTile];
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const bool empty = state.sum[lane] == 0.0f;
    const float sink = t.terms->has_sink ? t.terms->sink : -INFINITY;
    const float reference = state.reference[lane] == -INFINITY ? 0.0f : state.reference[lane] * unit;
    float lse = empty ? sink : reference + logf(state.sum[lane]);
    inverse[lane] = empty ? 0.0f : 1.0f / state.sum[lane];
    if (!empty && sink != -INFINITY) {
      // Relative to the larger of the two, so that neither overflows.
      const float top = sink > lse ? sink : lse, share = expf(lse - top), total = share + expf(sink - top);
      inverse[lane] *= share / total;
      lse = top + logf(total);
    }
    if (lane < t.queries) t.lse[lane] = lse;
  }
  unpack_transposed(o, lanes, inverse, 1.0f, t.queries, t.problem.value_dim,
                    static_cast<typename Engine::Element*>(t.out), t.problem.value_dim);
}

template <class Engine>
static void forward_tile(const ForwardTile& t) {
  typename Engine::Session session;
  (void)session;
  const Problem& p = t.problem;
  ForwardScratch scratch;
  forward_layout<Engine>(p, static_cast<char*>(t.scratch), &scratch);
  const int64_t lanes = round_up(t.queries, Engine::kLaneMultiple);
  const Mask& mask = *t.mask;
  const Terms& terms = *t.terms;
  // Shaped scores are in natural units already.
  const Vec factor = vset(terms.shaped ? kLog2e : exponent_factor(p.scale));
  const typename Engine::Keys keys(p, t.k, t.v, t.packed_keys, mask.keys);
  Engine::pack_query_operand(t.q, t.queries, p.head_dim, lanes, p.scale < 0, scratch.query);

  SoftmaxState state;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    state.reference[lane] = -INFINITY;
    state.sum[lane] = 0.0f;
  }
  if (t.run_count == 0) fill_rows(scratch.output, lanes, 0, Engine::padded_dim(p.value_dim), 0.0f);

  float* s = scratch.scores;
  const float* keep = terms.keep != 0.0f ? scratch.keep : nullptr;
  typename Engine::Packed* probabilities = Engine::probabilities(s, scratch.probabilities);
  bool first = true;
  for (int64_t i = 0; i < t.run_count; ++i) {
    const KeyRun& run = t.runs[i];
    for (int64_t begin = run.begin, end; begin < run.end; begin = end, first = false) {
      end = min64(run.end, (begin / Engine::kKeyTile + 1) * Engine::kKeyTile);
      const int64_t count = end - begin, padded = round_up(count, Engine::kKeyMultiple);
      const TilePlace place = {t.first_query, t.queries, mask.shift, begin, count, lanes};
      Engine::scores(p, keys, begin, count, scratch.query, lanes, s);
      if (terms.shaped) shape_scores(terms, place, p.scale, s, scratch.bias, nullptr);
      if (run.partial) mask_scores(s, lanes, mask, t.first_query, t.queries, begin, count);
      fill_rows(s, lanes, count, padded, -INFINITY);
      if (keep) dropout_factors(terms, {t.first_query, t.queries, mask.shift, begin, padded, lanes}, scratch.keep);
      softmax_tile<Engine>(s, keep, probabilities, count, padded, lanes, factor, first, p.value_dim, scratch.output,
                           &state);
      if (first)
        Engine::template add_values<false>(p, keys, begin, count, probabilities, lanes, scratch.output);
      else
        Engine::template add_values<true>(p, keys, begin, count, probabilities, lanes, scratch.output);
    }
  }
  finish_forward<Engine>(t, lanes, scratch.output, state, terms.shaped ? 1.0f : fabsf(p.scale));
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
