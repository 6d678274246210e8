// Tile-sized bf16 matrix product with fp32 accumulation, on AMX tiles or on AVX512-BF16 dot products: the block that
// the bf16 kernels are made of.
//
//   C[r][j] (+)= sum_d A[r][d] * B[d][j]
//
// A is rows of bf16, B is in pairs along the depth (pack_bf16.h), C is fp32. Rows and columns are multiples of 16,
// the depth a multiple of 32; strides count elements (for B and C: words). Included inside a bf16 unit after simd.h.
#pragma once

#include "core/cpu/gemm_vector.h"
#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

#if defined(EFFKERN_UNIT_AMX)

// Eight tiles of 16 rows x 64 bytes. Static data: the intrinsic does not tell the compiler that all of it is read.
struct alignas(64) TileShape {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static const TileShape tile_shape = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Tile registers are configured for the life of one kernel call, and handed back at its end: the operating system
// then has no tile state to save when it switches threads.
struct ProductSession {
  ProductSession() { _tile_loadconfig(&tile_shape); }
  ~ProductSession() { _tile_release(); }
};

// Tiles 0-3 hold a block of C, row-major; 4 and 5 two tiles of A, 6 and 7 two of B. A full block does four products
// for four loads, so that loads from L2 still keep pace with the 16 cycles a product takes.
template <bool kAccumulate, bool kTwoRows, bool kTwoColumns>
EFFKERN_INLINE void amx_block(int64_t depth, const Bf16* a, int64_t lda, const Bf16* b, int64_t ldb, float* c,
                              int64_t ldc) {
  const int64_t a_bytes = lda * 2, b_bytes = ldb * 4, c_bytes = ldc * 4;
  float* below = c + 16 * ldc;
  if (kAccumulate) {
    _tile_loadd(0, c, c_bytes);
    if (kTwoColumns) _tile_loadd(1, c + 16, c_bytes);
    if (kTwoRows) _tile_loadd(2, below, c_bytes);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, below + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (kTwoColumns) _tile_zero(1);
    if (kTwoRows) _tile_zero(2);
    if (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; d += 32, a += 32, b += 32 * ldb) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) {
      _tile_loadd(7, b + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows) {
      _tile_loadd(5, a + 16 * lda, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (kTwoColumns) _tile_stored(1, c + 16, c_bytes);
  if (kTwoRows) _tile_stored(2, below, c_bytes);
  if (kTwoRows && kTwoColumns) _tile_stored(3, below + 16, c_bytes);
}

template <bool kAccumulate, bool kTwoColumns>
EFFKERN_INLINE void amx_panel(int64_t rows, int64_t depth, const Bf16* a, int64_t lda, const Bf16* b, int64_t ldb,
                              float* c, int64_t ldc) {
  int64_t r = 0;
  for (; r + 32 <= rows; r += 32)
    amx_block<kAccumulate, true, kTwoColumns>(depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc);
  if (r < rows) amx_block<kAccumulate, false, kTwoColumns>(depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc);
}

template <bool kAccumulate>
static __attribute__((noinline)) void gemm_bf16(int64_t rows, int64_t columns, int64_t depth, const Bf16* a,
                                                int64_t lda, const Bf16* b, int64_t ldb, float* c, int64_t ldc) {
  // GCC's tile loads are assembly that does not declare what it reads: without this, stores of the caller to A and B
  // may be moved behind them.
  __asm__ volatile("" ::: "memory");
  int64_t j = 0;
  for (; j + 32 <= columns; j += 32) amx_panel<kAccumulate, true>(rows, depth, a, lda, b + j * 2, ldb, c + j, ldc);
  if (j < columns) amx_panel<kAccumulate, false>(rows, depth, a, lda, b + j * 2, ldb, c + j, ldc);
  __asm__ volatile("" ::: "memory");
}

#else

struct ProductSession {
  ProductSession() {}  // a session that does nothing is still used
};

struct Bf16PairProduct {
  static inline __attribute__((always_inline)) Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};

template <bool kAccumulate>
static void gemm_bf16(int64_t rows, int64_t columns, int64_t depth, const Bf16* a, int64_t lda, const Bf16* b,
                      int64_t ldb, float* c, int64_t ldc) {
  gemm_vector<Bf16PairProduct, kAccumulate>(rows, columns, depth / 2, {reinterpret_cast<const float*>(a), lda / 2, 1},
                                            reinterpret_cast<const float*>(b), ldb, c, ldc);
}

#endif

}  // namespace EFFKERN_UNIT
}  // namespace effkern
