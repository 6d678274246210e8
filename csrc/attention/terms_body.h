// The terms of a score beside q.k, a tile at a time: softcap, bias, ALiBi, and dropout of the weights. Tiles are
// (keys, lanes), lanes being queries.
#pragma once

#include "attention/mask.h"
#include "core/cpu/pack.h"
#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

using attention::Terms;

// Where a tile of scores stands in the call.
struct TilePlace {
  int64_t first_query, queries, shift;  // queries: valid lanes; shift: position of query 0
  int64_t first_key, keys, lanes;
};

template <class T>
static void load_bias_as(const Terms& terms, const TilePlace& at, float* target) {
  const T* source = static_cast<const T*>(terms.bias) + at.first_query * terms.bias_row;
  if (terms.bias_column != 0) {
    pack_transposed(source + at.first_key, terms.bias_row, at.queries, at.keys, at.lanes, false, target, at.lanes);
    return;
  }
  pack_transposed(source, terms.bias_row, at.queries, 1, at.lanes, false, target, at.lanes);
  for (int64_t key = 1; key < at.keys; ++key) memcpy(target + key * at.lanes, target, at.lanes * sizeof(float));
}

// target[key][lane] = bias[query][key], 0 in lanes without a query.
static void load_bias(const Terms& terms, const TilePlace& at, float* target) {
  switch (terms.bias_dtype) {
    case Dtype::bf16: return load_bias_as<Bf16>(terms, at, target);
    case Dtype::fp16: return load_bias_as<Fp16>(terms, at, target);
    default: return load_bias_as<float>(terms, at, target);
  }
}

// q.k to z in natural units. `bias` is room for a tile; `slope_of_cap`, where it is not null, gets dz / d(scale q.k).
static void shape_scores(const Terms& terms, const TilePlace& at, float scale, float* s, float* bias,
                         float* slope_of_cap) {
  if (terms.bias) load_bias(terms, at, bias);
  const Vec factor = vset(fabsf(scale)), cap = vset(terms.softcap);
  const Vec inverse_cap = vset(terms.softcap != 0.0f ? 1.0f / terms.softcap : 0.0f);
  float ramp[kLanes];
  for (int i = 0; i < kLanes; ++i) ramp[i] = static_cast<float>(i);
  for (int64_t lane = 0; lane < at.lanes; lane += kLanes) {
    // Position minus key, counted from a point near both, so that fp32 holds it exactly.
    const Vec distance = vadd(vset(static_cast<float>(at.first_query + at.shift - at.first_key + lane)), vload(ramp));
    for (int64_t key = 0; key < at.keys; ++key) {
      const int64_t i = key * at.lanes + lane;
      Vec z = vmul(vload(s + i), factor);
      if (terms.softcap != 0.0f) {
        const Vec t = vtanh(vmul(z, inverse_cap));
        z = vmul(cap, t);
        if (slope_of_cap) vstore(slope_of_cap + i, vsub(vset(1.0f), vmul(t, t)));
      }
      if (terms.bias) z = vadd(z, vload(bias + i));
      if (terms.slope != 0.0f) {
        const Vec d = vsub(distance, vset(static_cast<float>(key)));
        z = vsub(z, vmul(vset(terms.slope), vmax(vsub(vzero(), d), d)));
      }
      vstore(s + i, z);
    }
  }
}

// Philox4x32-10 (Salmon et al. 2011): four random words for the counter (quad, row, row >> 32, 0).
EFFKERN_INLINE void philox(uint64_t seed, Words quad, Words row, Words row_high, Words out[4]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const Words factor0 = words_set(0xD2511F53u), factor1 = words_set(0xCD9E8D57u);
  Words c0 = quad, c1 = row, c2 = row_high, c3 = words_set(0);
  for (int round = 0; round < 10; ++round) {
    Words high0, high1;
    const Words low0 = words_multiply(c0, factor0, &high0), low1 = words_multiply(c2, factor1, &high1);
    c0 = words_xor(words_xor(high1, c1), words_set(key0));
    c2 = words_xor(words_xor(high0, c3), words_set(key1));
    c1 = low1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// keep[key][lane] = 0 where dropout drops the weight, else 1 / (1 - p). Keys are counted from a multiple of four; the
// tile has room for the keys up to the next.
static void dropout_factors(const Terms& terms, const TilePlace& at, float* keep) {
  uint32_t low[kLanes], high[kLanes];
  for (int64_t lane = 0; lane < at.lanes; lane += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t row = terms.first_row + static_cast<uint64_t>(at.first_query + lane + i);
      low[i] = static_cast<uint32_t>(row);
      high[i] = static_cast<uint32_t>(row >> 32);
    }
    for (int64_t key = 0; key < at.keys; key += 4) {
      Words words[4];
      const uint32_t quad = static_cast<uint32_t>((at.first_key + key) >> 2);
      philox(terms.seed, words_set(quad), words_load(low), words_load(high), words);
      for (int64_t i = 0; i < 4; ++i)
        vstore(keep + (key + i) * at.lanes + lane,
               keep_at_least(words[i], words_set(terms.threshold), vset(terms.keep)));
    }
  }
}

// target[query][key] += tile[key][lane]; where the bias has one row for all queries, their sum.
static void add_to_bias_gradient(const Terms& terms, const TilePlace& at, const float* tile) {
  float* target = terms.grad_bias + at.first_key;
  if (terms.grad_bias_row == 0) {
    for (int64_t key = 0; key < at.keys; ++key) {
      float sum = 0.0f;
      for (int64_t lane = 0; lane < at.queries; ++lane) sum += tile[key * at.lanes + lane];
      target[key] += sum;
    }
    return;
  }
  for (int64_t lane = 0; lane < at.queries; lane += kLanes) {
    for (int64_t key = 0; key < at.keys; key += kLanes) {
      const int64_t width = min64(kLanes, at.keys - key);
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) block[i] = i < width ? vload(tile + (key + i) * at.lanes + lane) : vzero();
      transpose(block);
      for (int64_t i = 0; i < min64(kLanes, at.queries - lane); ++i) {
        float* row = target + (at.first_query + lane + i) * terms.grad_bias_row + key;
        store_some(row, vadd(load_some(row, width), block[i]), width);
      }
    }
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
