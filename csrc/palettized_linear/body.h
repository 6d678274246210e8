// Products with a palettised weight. A few tokens: indices are unpacked, looked up and multiplied in registers. More:
// some rows at a time are looked up into a block that stays in the cache, and multiplied as any matrix. Included last.
#pragma once

#include "core/cpu/gemm_vector.h"
#include "core/cpu/pack.h"
#include "palettized_linear/decode.h"
#include "palettized_linear/kernel.h"

namespace effkern {
namespace EFFKERN_UNIT {

using palettized_linear::Few;
using palettized_linear::kSlack;
using palettized_linear::Rows;

EFFKERN_INLINE float sum_of(Vec x) {
  float lanes[kLanes], total = 0.0f;
  vstore(lanes, x);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// Adds to sums what indices [begin, end) of a row give for kTokens tokens; begin is that of a block.
template <int kBits, bool kShort, int kTokens>
EFFKERN_INLINE void dot_row(const Few& t, int64_t row, int64_t token, int64_t begin, int64_t end, float* sums) {
  const Packed& w = t.weight;
  constexpr int64_t kBlock = kBlockLanes * Layout<kBits>::kFields;
  constexpr int kChains = BlockLookup<kBits, kShort>::kChains /
                          kTokens;  // as many products at a time as two units with four cycles each take
  Vec sum[kTokens][kChains];
  for (int k = 0; k < kTokens; ++k)
    for (int c = 0; c < kChains; ++c) sum[k][c] = vzero();
  const int64_t token_stride = w.dim * w.count;
  for (int64_t place = 0; place < w.dim; ++place) {
    const float* entries = table_of(w, row, place);
    const BlockLookup<kBits, kShort> lookup(entries);
    const float* x = t.x + (token * w.dim + place) * w.count;
    for_blocks<kBits>(w, row, begin, end,
                      [&](int64_t first, int64_t lanes, const uint32_t* words) __attribute__((always_inline)) {
                        if (first + kBlock <= w.count) {
                          int chain = 0;
                          lookup(words, [&](Vec value, int64_t at) __attribute__((always_inline)) {
                            for (int k = 0; k < kTokens; ++k)
                              sum[k][chain] = vfma(value, vload(x + k * token_stride + first + at), sum[k][chain]);
                            chain = (chain + 1) % kChains;
                          });
                        } else {
                          decode_block<kBits>(words, lanes, Table<kBits>(entries), t.scratch);
                          for (int64_t i = first; i < w.count; i += kLanes) {
                            const int64_t width = min64(kLanes, w.count - i);
                            const Vec value = load_some(t.scratch + i - first, width);
                            for (int k = 0; k < kTokens; ++k)
                              sum[k][0] = vfma(value, load_some(x + k * token_stride + i, width), sum[k][0]);
                          }
                        }
                      });
  }
  for (int k = 0; k < kTokens; ++k) {
    Vec total = sum[k][0];
    for (int c = 1; c < kChains; ++c) total = vadd(total, sum[k][c]);
    sums[k] += sum_of(total);
  }
}

template <class T>
EFFKERN_INLINE void store_one(T* p, float x) {
  store_some(p, vset(x), 1);
}

constexpr int64_t kFewRows = 16, kFewFloats = 4096;  // of x that a piece of rows is multiplied by: half the L1 cache

// sums[row][token] of rows [first, last), at most kFewRows, and kTokens tokens.
template <int kBits, bool kShort, int kTokens>
static void few_rows(const Few& t, int64_t first, int64_t last, int64_t token, float (*sums)[4]) {
  constexpr int64_t kBlock = kBlockLanes * Layout<kBits>::kFields;
  const Packed& w = t.weight;
  const int64_t piece = max64(kBlock, kFewFloats / (kTokens * w.dim) / kBlock * kBlock);
  for (int64_t begin = 0; begin < w.count; begin += piece)
    for (int64_t row = first; row < last; ++row)
      dot_row<kBits, kShort, kTokens>(t, row, token, begin, min64(w.count, begin + piece), sums[row - first]);
}

template <int kBits, bool kShort = false>
static int64_t few_tokens(const Few& t, int64_t first, int64_t last, int64_t token, float (*sums)[4]) {
  if constexpr (!kShort && BlockLookup<kBits, true>::kShortToo)
    if (t.weight.bf16_entries) return few_tokens<kBits, true>(t, first, last, token, sums);
  if (t.tokens - token >= 4) return few_rows<kBits, kShort, 4>(t, first, last, token, sums), 4;
  if (t.tokens - token >= 2) return few_rows<kBits, kShort, 2>(t, first, last, token, sums), 2;
  return few_rows<kBits, kShort, 1>(t, first, last, token, sums), 1;
}

template <class T>
static void few(const Few& t) {
  T* out = static_cast<T*>(t.out);
  const int64_t rows = t.weight.rows;
  for (int64_t first = t.first; first < t.last; first += kFewRows) {
    const int64_t last = min64(t.last, first + kFewRows);
    for (int64_t token = 0, done = 0; token < t.tokens; token += done) {
      float sums[kFewRows][4] = {};
#define EFFKERN_CALL(kBits) done = few_tokens<kBits>(t, first, last, token, sums)
      EFFKERN_BY_BITS(t.weight.bits, EFFKERN_CALL)
#undef EFFKERN_CALL
      for (int64_t k = token; k < token + done; ++k)
        for (int64_t row = first; row < last; ++row)
          store_one(out + k * rows + row, sums[row - first][k - token] + (t.bias ? t.bias[row] : 0.0f));
    }
  }
}

static const uint16_t* order(const Packed& w) {
#define EFFKERN_CALL(kBits) \
  return w.bf16_entries ? BlockLookup<kBits, true>::order() : BlockLookup<kBits, false>::order()
  EFFKERN_BY_BITS(w.bits, EFFKERN_CALL)
#undef EFFKERN_CALL
}

static void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                     const float* b, int64_t ldb, float* c, int64_t ldc) {
  gemm_vector<Fp32Product, true>(rows, columns, depth, {a, a_row, a_depth}, b, ldb, c, ldc);
}

constexpr int64_t kRowBlock = 2 * kMicroVectors * kLanes, kDepth = 256;

static int64_t many_scratch(const Packed& w, int64_t tokens) {
  return kSlack + kRowBlock * (w.count * w.dim + kDepth + tokens) + 64;
}

// Rows [first, last), at most kRowBlock, for all tokens.
template <class T>
static void many(const Rows& t) {
  const Packed& w = t.weight;
  const int64_t columns = w.count * w.dim, rows = t.last - t.first, lanes = round_up(rows, kLanes);
  float* dense = t.scratch + kSlack;
  float* turned = dense + kRowBlock * columns;  // (kDepth, lanes)
  float* sums = turned + kRowBlock * kDepth;    // (tokens, lanes)
  for (int64_t r = 0; r < rows; ++r) decode(w, t.first + r, t.scratch, dense + r * columns);
  memset(sums, 0, t.tokens * lanes * sizeof(float));
  for (int64_t d = 0; d < columns; d += kDepth) {
    const int64_t depth = min64(kDepth, columns - d);
    pack_transposed(dense + d, columns, rows, depth, lanes, false, turned, lanes);
    multiply(t.tokens, lanes, depth, t.x + d, t.stride, 1, turned, lanes, sums, lanes);
  }
  T* out = static_cast<T*>(t.out);
  for (int64_t token = 0; token < t.tokens; ++token)
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t width = min64(kLanes, rows - r);
      const Vec bias = t.bias ? load_some(t.bias + t.first + r, width) : vzero();
      store_some(out + token * w.rows + t.first + r, vadd(vload(sums + token * lanes + r), bias), width);
    }
}

template <class T>
struct KernelTable {
  static constexpr palettized_linear::Kernels value = {"palettized_linear:cpu/" EFFKERN_UNIT_NAME,
                                                       "palettized_linear_backward:cpu/" EFFKERN_UNIT_NAME,
                                                       kLanes,
                                                       kRowBlock,
                                                       many_scratch,
                                                       few<T>,
                                                       order,
                                                       many<T>,
                                                       decode<float>,
                                                       multiply};
};

static const palettized_linear::Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return KernelTable<Bf16>::value;
    case Dtype::fp16: return KernelTable<Fp16>::value;
    default: return KernelTable<float>::value;
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
