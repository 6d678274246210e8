// Products of many bf16 tokens with a palettised weight: some rows at a time are looked up as bf16 and multiplied on
// tiles or by dot products of pairs. Included last.
#pragma once

#include "core/cpu/gemm_bf16.h"
#include "core/cpu/pack_bf16.h"
#include "palettized_linear/decode.h"
#include "palettized_linear/kernel.h"

namespace effkern {
namespace EFFKERN_UNIT {

using palettized_linear::kSlack;
using palettized_linear::PairRows;

// A piece of the looked up rows and one of the tokens stay in the L2 cache together.
constexpr int64_t kPairRows = 64, kPairTokens = 256, kPairDepth = 1024;

static int64_t pair_scratch(const Packed& w, int64_t depth) {
  return kSlack + w.count * w.dim + kPairRows * depth / 2 + kPairRows * kPairTokens + 64;
}

static void pack_tokens(const void* x, int64_t tokens, int64_t columns, int64_t first, int64_t count, int64_t lanes,
                        void* pairs) {
  transpose_pairs(static_cast<const Bf16*>(x) + first, columns, tokens, count, lanes, round_up(count, 32), false,
                  static_cast<Bf16*>(pairs) + first * lanes);
}

// Rows of the weight to (height, depth), zeros behind them.
static void look_up_rows(const PairRows& t, int64_t height, float* line, Bf16* dense) {
  const Packed& w = t.weight;
  const int64_t columns = w.count * w.dim;
  for (int64_t r = 0; r < height; ++r) {
    Bf16* row = dense + r * t.depth;
    int64_t filled = 0;
    if (t.first + r < t.last) {
      filled = columns;
      if (w.dim == 1) {
        decode(w, t.first + r, t.scratch, row);
      } else {
        decode(w, t.first + r, t.scratch, line);
        for (int64_t i = 0; i < columns; i += kLanes) store_some(row + i, vload(line + i), columns - i);
      }
    }
    memset(row + filled, 0, (t.depth - filled) * sizeof(Bf16));
  }
}

// sums (height, width), turned, to columns of out from `token` on.
template <class T>
static void emit_tokens(const PairRows& t, const float* sums, int64_t height, int64_t width, int64_t token) {
  const int64_t rows = t.last - t.first;
  T* out = static_cast<T*>(t.out) + t.first;
  for (int64_t r = 0; r < height; r += kLanes) {
    const Vec bias = t.bias ? load_some(t.bias + t.first + r, rows - r) : vzero();
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) block[i] = vload(sums + (r + i) * width + c);
      transpose(block);
      for (int64_t i = 0; i < min64(kLanes, t.tokens - token - c); ++i)
        store_some(out + (token + c + i) * t.weight.rows + r, vadd(block[i], bias), rows - r);
    }
  }
}

template <class T>
static void many_pairs(const PairRows& t) {
  const ProductSession session;
  const int64_t height = round_up(t.last - t.first, 16);
  float* line = t.scratch + kSlack;
  float* sums = line + round_up(t.weight.count * t.weight.dim, 16);
  Bf16* dense = reinterpret_cast<Bf16*>(sums + kPairRows * kPairTokens);
  look_up_rows(t, height, line, dense);
  const Bf16* pairs = static_cast<const Bf16*>(t.pairs);
  for (int64_t token = 0; token < t.lanes; token += kPairTokens) {
    const int64_t width = min64(kPairTokens, t.lanes - token);
    const Bf16* b = pairs + token * 2;
    gemm_bf16<false>(height, width, min64(kPairDepth, t.depth), dense, t.depth, b, t.lanes, sums, width);
    for (int64_t d = kPairDepth; d < t.depth; d += kPairDepth)
      gemm_bf16<true>(height, width, min64(kPairDepth, t.depth - d), dense + d, t.depth, b + d * t.lanes, t.lanes, sums,
                      width);
    emit_tokens<T>(t, sums, height, width, token);
  }
}

template <class T>
struct PairTable {
  static constexpr palettized_linear::PairKernels value = {"palettized_linear:cpu/" EFFKERN_UNIT_NAME, kPairRows,
                                                           pair_scratch, pack_tokens, many_pairs<T>};
};

// `out` is bf16, or fp32 for the low-rank correction that is added to it.
static const palettized_linear::PairKernels& pair_kernels_for(Dtype out) {
  return out == Dtype::bf16 ? PairTable<Bf16>::value : PairTable<float>::value;
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
