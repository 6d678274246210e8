// Tile-sized matrix product on vectors: the block that kernels without tile registers are made of.
//
//   C[r][j] (+)= sum_d A(r, d) * B[d][j]        fp32 accumulation
//
// The lanes run along j, so B and C are read and written as whole vectors, and A is broadcast one 32-bit word at a
// time through free strides: a transposed A costs nothing. A word is one fp32 value, or in the bf16 units a pair of
// neighbours along the depth. Included inside an ISA unit after simd.h.
#pragma once

#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

// Rows x vectors of accumulators per micro-tile. AVX2 has 16 registers: 4 x 3 sums + 3 B + 1 A. AVX-512 has 32: two
// FMA ports of latency 4 want at least 8 sums in flight, and 8 x 3 leaves the load ports half idle.
#if defined(EFFKERN_UNIT_AVX512)
constexpr int kMicroRows = 8, kMicroVectors = 3;
#else
constexpr int kMicroRows = 4, kMicroVectors = 3;
#endif

struct Strided {  // A(r, d) = data[r * row + d * depth], strides in words
  const float* data;
  int64_t row, depth;
};

struct Fp32Product {
  static inline __attribute__((always_inline)) Vec multiply_add(Vec a, Vec b, Vec c) { return vfma(a, b, c); }
};

struct EvenRows {  // C[r] = data + r * stride
  float* data;
  int64_t stride;
  EFFKERN_MEMBER float* operator()(int64_t r) const { return data + r * stride; }
};

template <class Product, int kRows, int kVectors, bool kAccumulate, class Target>
EFFKERN_INLINE void gemm_micro(int64_t depth, Strided a, const float* b, int64_t ldb, const Target& c, int64_t first,
                               int64_t column) {
  Vec sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = vzero();
  const float* p = a.data;
  for (int64_t d = 0; d < depth; ++d, p += a.depth, b += ldb) {
    Vec row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = vload(b + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec scalar = vbroadcast(p + r * a.row);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Product::multiply_add(scalar, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* row = c(first + r) + column;
    for (int v = 0; v < kVectors; ++v) {
      float* target = row + v * kLanes;
      // Added at the end, not the start: a long sum over many tiles then rounds once a tile at its full size.
      vstore(target, kAccumulate ? vadd(vload(target), sum[r][v]) : sum[r][v]);
    }
  }
}

// All rows of one panel of kVectors vectors; what is left below kRows goes through ever smaller micro-tiles.
template <class Product, int kRows, int kVectors, bool kAccumulate, class Target>
EFFKERN_INLINE void gemm_panel(int64_t rows, int64_t depth, Strided a, const float* b, int64_t ldb, const Target& c,
                               int64_t first, int64_t column) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    gemm_micro<Product, kRows, kVectors, kAccumulate>(depth, {a.data + r * a.row, a.row, a.depth}, b, ldb, c, first + r,
                                                      column);
  if constexpr (kRows > 1) {
    if (r < rows)
      gemm_panel<Product, kRows / 2, kVectors, kAccumulate>(rows - r, depth, {a.data + r * a.row, a.row, a.depth}, b,
                                                            ldb, c, first + r, column);
  }
}

// `c` says where each row of C starts; the first one is number `first`.
template <class Product, bool kAccumulate, class Target>
static __attribute__((noinline)) void gemm_rows(int64_t rows, int64_t columns, int64_t depth, Strided a, const float* b,
                                                int64_t ldb, const Target& c, int64_t first = 0) {
  int64_t vectors = columns / kLanes, column = 0;
  for (; vectors >= kMicroVectors && vectors != kMicroVectors + 1; vectors -= kMicroVectors) {
    gemm_panel<Product, kMicroRows, kMicroVectors, kAccumulate>(rows, depth, a, b + column, ldb, c, first, column);
    column += kMicroVectors * kLanes;
  }
  for (; vectors >= 2; vectors -= 2) {  // 4 vectors left: 2 + 2 keeps more sums in flight than 3 + 1
    gemm_panel<Product, kMicroRows, 2, kAccumulate>(rows, depth, a, b + column, ldb, c, first, column);
    column += 2 * kLanes;
  }
  // Twice the rows, so that a single vector has as many sums in flight as two.
  if (vectors == 1)
    gemm_panel<Product, 2 * kMicroRows, 1, kAccumulate>(rows, depth, a, b + column, ldb, c, first, column);
}

template <class Product, bool kAccumulate>
static inline void gemm_vector(int64_t rows, int64_t columns, int64_t depth, Strided a, const float* b, int64_t ldb,
                               float* c, int64_t ldc) {
  gemm_rows<Product, kAccumulate>(rows, columns, depth, a, b, ldb, EvenRows{c, ldc});
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
