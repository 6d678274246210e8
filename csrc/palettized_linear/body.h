// Products with a palettised weight. A few tokens: indices are unpacked, looked up and multiplied in registers. More:
// some rows at a time are looked up into a block that stays in the cache, and multiplied as any matrix. Included last.
#pragma once

#include "core/cpu/gemm_vector.h"
#include "core/cpu/pack.h"
#include "palettized_linear/kernel.h"
#include "palettized_linear/lookup.h"

namespace effkern {
namespace EFFKERN_UNIT {

using palettized_linear::Few;
using palettized_linear::kEntries;
using palettized_linear::kSlack;
using palettized_linear::Packed;
using palettized_linear::Rows;

EFFKERN_INLINE const float* table_of(const Packed& w, int64_t row, int64_t place) {
  return w.tables + (row / (w.rows / w.groups) * w.dim + place) * kEntries;
}

// Calls body(first index, lanes, words) for every block of a row; `words` are whole blocks.
template <int kBits, class Body>
EFFKERN_INLINE void for_blocks(const Packed& w, int64_t row, const Body& body) {
  constexpr int64_t kFields = Layout<kBits>::kFields, kBlock = kBlockLanes * kFields;
  constexpr int64_t kBytes = Layout<kBits>::kWords * kBlockLanes * 4;
  const uint8_t* p = w.indices + row * w.row_bytes;
  int64_t i = 0;
  for (; i + kBlock <= w.count; i += kBlock, p += kBytes) body(i, kBlockLanes, reinterpret_cast<const uint32_t*>(p));
  if (i == w.count) return;
  uint32_t words[3 * kBlockLanes];
  const int64_t lanes = (w.count - i + kFields - 1) / kFields;
  widen_block<kBits>(p, lanes, words);
  body(i, lanes, words);
}

EFFKERN_INLINE float sum_of(Vec x) {
  float lanes[kLanes], total = 0.0f;
  vstore(lanes, x);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// One row and kTokens tokens.
template <int kBits, int kTokens>
EFFKERN_INLINE void dot_row(const Few& t, int64_t row, int64_t token, float* sums) {
  const Packed& w = t.weight;
  constexpr int kFields = Layout<kBits>::kFields, kChains = kTokens == 1 ? 4 : 2;
  Vec sum[kTokens][kChains];
  for (int k = 0; k < kTokens; ++k)
    for (int c = 0; c < kChains; ++c) sum[k][c] = vzero();
  for (int64_t place = 0; place < w.dim; ++place) {
    const Table<kBits> table(table_of(w, row, place));
    const float* x = t.x + (token * w.dim + place) * w.count;
    const int64_t token_stride = w.dim * w.count;
    for_blocks<kBits>(w, row, [&](int64_t first, int64_t lanes, const uint32_t* words) __attribute__((always_inline)) {
      if (first + kBlockLanes * kFields <= w.count) {
        for (int part = 0; part < kParts; ++part) {
          Words word[3];
          load_words<kBits>(words, part, word);
#pragma GCC unroll 32
          for (int f = 0; f < kFields; ++f) {
            const Vec value = table(field_of<kBits>(word, f));
            for (int k = 0; k < kTokens; ++k)
              sum[k][f % kChains] = vfma(value, vload(x + k * token_stride + first + f * kBlockLanes + part * kLanes),
                                         sum[k][f % kChains]);
          }
        }
      } else {
        decode_block<kBits>(words, lanes, table, t.scratch);
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
    sums[k] = sum_of(total);
  }
}

template <class T>
EFFKERN_INLINE void store_one(T* p, float x) {
  store_some(p, vset(x), 1);
}

template <class T, int kBits>
static void few_of(const Few& t) {
  T* out = static_cast<T*>(t.out);
  for (int64_t row = t.first; row < t.last; ++row) {
    float sums[4];
    for (int64_t token = 0; token < t.tokens;) {
      const int64_t left = t.tokens - token, step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (step == 4)
        dot_row<kBits, 4>(t, row, token, sums);
      else if (step == 2)
        dot_row<kBits, 2>(t, row, token, sums);
      else
        dot_row<kBits, 1>(t, row, token, sums);
      for (int64_t k = 0; k < step; ++k)
        store_one(out + (token + k) * t.weight.rows + row, sums[k] + (t.bias ? t.bias[row] : 0.0f));
      token += step;
    }
  }
}

template <int kBits>
static void decode_of(const Packed& w, int64_t row, float* scratch, float* out) {
  for (int64_t place = 0; place < w.dim; ++place) {
    const Table<kBits> table(table_of(w, row, place));
    for_blocks<kBits>(w, row, [&](int64_t first, int64_t lanes, const uint32_t* words) __attribute__((always_inline)) {
      decode_block<kBits>(words, lanes, table, scratch);
      const int64_t count = min64(lanes * Layout<kBits>::kFields, w.count - first);
      if (w.dim == 1) {
        memcpy(out + first, scratch, count * sizeof(float));
      } else {
        for (int64_t i = 0; i < count; ++i) out[(first + i) * w.dim + place] = scratch[i];
      }
    });
  }
}

#define EFFKERN_BY_BITS(bits, call) \
  switch (bits) {                   \
    case 1: call(1); break;         \
    case 2: call(2); break;         \
    case 3: call(3); break;         \
    case 4: call(4); break;         \
    case 6: call(6); break;         \
    default: call(8);               \
  }

template <class T>
static void few(const Few& t) {
#define EFFKERN_CALL(kBits) few_of<T, kBits>(t)
  EFFKERN_BY_BITS(t.weight.bits, EFFKERN_CALL)
#undef EFFKERN_CALL
}

static void decode(const Packed& w, int64_t row, float* scratch, float* out) {
#define EFFKERN_CALL(kBits) decode_of<kBits>(w, row, scratch, out)
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
                                                       many<T>,
                                                       decode,
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
