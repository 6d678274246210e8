// Monarch products on bf16 units (AVX512-BF16, AMX): the same passes as body.h, on products of pairs. Factors are A
// operands, in place where their sizes are whole tiles; tokens are across, as B operands. The middle and grad_mid are
// rounded to bf16 where they enter a second product, as in two separate matmuls; sums stay in fp32.
#pragma once

#include "core/cpu/gemm_bf16.h"
#include "core/cpu/pack_bf16.h"
#include "monarch/backward_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

EFFKERN_INLINE int64_t padded32(int64_t dim) { return round_up(dim, 32); }

// A block as A operand: (round_up(rows, 16), round_up(depth, 32)), or where it stands.
struct PairOperand {
  const Bf16* data;
  int64_t stride;
};

static int64_t prepared_pairs_bytes(int64_t rows, int64_t columns, bool transposed, bool) {
  if (transposed) return padded(columns) * padded32(rows) * static_cast<int64_t>(sizeof(Bf16));
  const bool whole = rows % 16 == 0 && columns % 32 == 0;
  return whole ? 0 : padded(rows) * padded32(columns) * static_cast<int64_t>(sizeof(Bf16));
}
static void prepare_pairs(const void* block, int64_t rows, int64_t columns, bool transposed, void* target) {
  const Bf16* source = static_cast<const Bf16*>(block);
  Bf16* out = static_cast<Bf16*>(target);
  if (transposed)
    transpose_rows(source, columns, rows, columns, padded32(rows), padded(columns), out);
  else
    copy_rows(source, columns, rows, columns, padded(rows), padded32(columns), out);
}
EFFKERN_INLINE PairOperand operand(const Weights& w, int64_t block, int64_t rows, int64_t columns, int64_t row) {
  const Bf16* raw = static_cast<const Bf16*>(w.raw);
  if (!w.prepared) return {raw + (block * rows + row) * columns, columns};
  const int64_t stride = padded32(columns);
  return {static_cast<const Bf16*>(w.prepared) + (block * padded(rows) + row) * stride, stride};
}
EFFKERN_INLINE PairOperand transposed_operand(const Weights& w, int64_t block, int64_t rows, int64_t columns) {
  const int64_t stride = padded32(rows);
  return {static_cast<const Bf16*>(w.prepared) + block * padded(columns) * stride, stride};
}

// Room for one B operand, one product with all its padding, and a group of outputs.
struct Rooms {
  Bf16* pairs;
  float* product;
};
EFFKERN_INLINE int64_t widest(const Shape& shape) { return max64(max64(shape.p, shape.q), max64(shape.r, shape.s)); }
EFFKERN_INLINE int64_t pair_floats(const Shape& shape) {
  return padded32(max64(widest(shape), kTokenTile)) * max64(kTokenTile, padded(max64(shape.p, shape.r))) / 2;
}
static int64_t pair_scratch_bytes(const Shape& shape) {
  const int64_t group = max64(padded(widest(shape)), padded(shape.s) * min64(kTogether, shape.l)) * kTokenTile;
  const int64_t rows = padded(max64(shape.q, shape.s)) * padded32(kTokenTile) / 2;  // A operand of a weight gradient
  return max64(scratch_bytes<Bf16>(shape),
               (pair_floats(shape) + max64(group, rows)) * static_cast<int64_t>(sizeof(float)) + 64);
}
EFFKERN_INLINE Rooms rooms(const Shape& shape, void* scratch) {
  float* base = aligned(scratch);
  return {reinterpret_cast<Bf16*>(base), base + pair_floats(shape)};
}

EFFKERN_INLINE __m256i rounded(const float* p) { return native_to_bf16(vload(p)); }

// Word target[row / 2][lane] = (source[row][lane], source[row + 1][lane]), rows past `rows` zero.
static void pack_lane_pairs(const float* source, int64_t stride, int64_t rows, int64_t lanes, Bf16* target) {
  const __m256i nothing = _mm256_setzero_si256();
  for (int64_t row = 0; row < padded32(rows); row += 2)
    for (int64_t lane = 0; lane < lanes; lane += 16) {
      const float* even = source + row * stride + lane;
      const __m256i low = row < rows ? rounded(even) : nothing,
                    high = row + 1 < rows ? rounded(even + stride) : nothing;
      _mm512_storeu_si512(target + (row / 2 * lanes + lane) * 2, interleave(low, high));
    }
}

// Word target[token / 2][row] = (source[row][token], source[row][token + 1]): the transposed matrix as B operand,
// (round_up(lanes, 32) / 2, padded(rows)) words.
static void pack_token_pairs(const float* source, int64_t stride, int64_t rows, int64_t lanes, Bf16* target) {
  const int64_t width = padded(rows);
  for (int64_t row = 0; row < width; row += 16)
    for (int64_t token = 0; token < padded32(lanes); token += 32) {
      __m512i block[16];
      for (int64_t i = 0; i < 16; ++i) {
        block[i] = _mm512_setzero_si512();
        if (row + i >= rows) continue;
        const float* from = source + (row + i) * stride + token;
        block[i] = _mm512_castsi256_si512(rounded(from));
        block[i] = _mm512_inserti64x4(block[i], token + 16 < lanes ? rounded(from + 16) : _mm256_setzero_si256(), 1);
      }
      transpose_words(block);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(target + ((token / 2 + i) * width + row) * 2, block[i]);
    }
}

// target[row][token], rows to a multiple of 16 and tokens to one of 32: an A operand.
static void pack_token_rows(const float* source, int64_t stride, int64_t rows, int64_t lanes, Bf16* target) {
  const __m256i nothing = _mm256_setzero_si256();
  for (int64_t row = 0; row < padded(rows); ++row)
    for (int64_t token = 0; token < padded32(lanes); token += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + row * padded32(lanes) + token),
                          row < rows && token < lanes ? rounded(source + row * stride + token) : nothing);
}

// rows x lanes of a product whose row count is not whole tiles: through `room`.
static void product(const PairOperand& a, int64_t rows, int64_t depth, const Bf16* b, int64_t lanes, float* room,
                    float* target, int64_t stride) {
  if (rows % 16 == 0) return gemm_bf16<false>(rows, lanes, padded32(depth), a.data, a.stride, b, lanes, target, stride);
  gemm_bf16<false>(padded(rows), lanes, padded32(depth), a.data, a.stride, b, lanes, room, lanes);
  for (int64_t row = 0; row < rows; ++row) memcpy(target + row * stride, room + row * lanes, lanes * sizeof(float));
}

static void first_stage_pairs(const FirstStage& t) {
  if (t.shape.few) return first_stage_dot<Bf16>(t);
  const ProductSession session;
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.x.count);
  const Rooms room = rooms(shape, t.scratch);
  for (int64_t block = t.part.begin; block < t.part.end; ++block) {
    transpose_pairs(static_cast<const Bf16*>(t.x.data) + block * shape.p, t.x.stride, t.x.count, shape.p, lanes,
                    padded32(shape.p), false, room.pairs);
    product(operand(t.w1, block, shape.q, shape.p, t.part.row_begin), t.part.row_end - t.part.row_begin, shape.p,
            room.pairs, lanes, room.product, t.mid + (block * shape.q + t.part.row_begin) * lanes, lanes);
  }
}

static void second_stage_pairs(const SecondStage& t) {
  if (t.shape.few) return second_stage_dot<Bf16>(t);
  const ProductSession session;
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.out.count);
  const Rooms room = rooms(shape, t.scratch);
  const int64_t rows = t.part.row_end - t.part.row_begin;
  for (int64_t begin = t.part.begin; begin < t.part.end; begin += kTogether) {
    const int64_t blocks = min64(kTogether, t.part.end - begin);
    for (int64_t i = 0; i < blocks; ++i) {
      pack_lane_pairs(t.mid + (begin + i) * lanes, shape.l * lanes, shape.r, lanes, room.pairs);
      const PairOperand a = operand(t.w2, begin + i, shape.s, shape.r, t.part.row_begin);
      gemm_bf16<false>(padded(rows), lanes, padded32(shape.r), a.data, a.stride, room.pairs, lanes,
                       room.product + i * lanes, blocks * lanes);
    }
    store_group<Bf16>(room.product, lanes, t, begin, blocks);
  }
}

static void second_backward_pairs(const SecondBackward& t) {
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.tokens);
  const ProductSession session;
  const Rooms room = rooms(shape, t.scratch);
  for (int64_t block = t.part.begin; block < t.part.end; ++block) {
    pack_lane_pairs(t.grad_out_lanes + block * shape.s * lanes, lanes, shape.s, lanes, room.pairs);
    product(transposed_operand(t.w2, block, shape.s, shape.r), shape.r, shape.s, room.pairs, lanes, room.product,
            t.grad_mid + block * lanes, shape.l * lanes);
  }
}

static void first_backward_pairs(const FirstBackward& t) {
  const ProductSession session;
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.grad_x.count);
  const Rooms room = rooms(shape, t.scratch);
  for (int64_t block = t.part.begin; block < t.part.end; ++block) {
    pack_lane_pairs(t.grad_mid + block * shape.q * lanes, lanes, shape.q, lanes, room.pairs);
    const PairOperand a = transposed_operand(t.w1, block, shape.q, shape.p);
    gemm_bf16<false>(padded(shape.p), lanes, padded32(shape.q), a.data, a.stride, room.pairs, lanes, room.product,
                     lanes);
    unpack_transposed(room.product, lanes, static_cast<const float*>(nullptr), 1.0f, t.grad_x.count, shape.p,
                      static_cast<Bf16*>(t.grad_x.data) + block * shape.p, t.grad_x.stride);
  }
}

static void first_gradient_pairs(const FirstGradient& t) {
  const ProductSession session;
  const Shape& shape = t.shape;
  const int64_t lanes = padded(t.x.count), depth = padded32(lanes), width = padded(shape.p);
  const int64_t row = t.part.row_begin, count = t.part.row_end - row;
  const Rooms room = rooms(shape, t.scratch);
  interleave_rows(static_cast<const Bf16*>(t.x.data) + t.part.begin * shape.p, t.x.stride, t.x.count, shape.p, depth,
                  width, room.pairs);
  Bf16* a = reinterpret_cast<Bf16*>(room.product);
  pack_token_rows(t.grad_mid + (t.part.begin * shape.q + row) * lanes, lanes, count, lanes, a);
  gemm_bf16<true>(padded(count), width, depth, a, depth, room.pairs, width, t.grad_w1 + row * width, width);
}

EFFKERN_INLINE int64_t mid_pairs_size(const Shape& shape) { return padded32(kTokenTile) * padded(shape.r); }
static int64_t mid_pairs_bytes(const Shape& shape) {
  return shape.l * mid_pairs_size(shape) * static_cast<int64_t>(sizeof(Bf16));
}
static void mid_pairs(const Shape& shape, const float* mid, int64_t tokens, void* target) {
  const int64_t lanes = padded(tokens);
  for (int64_t of = 0; of < shape.l; ++of)
    pack_token_pairs(mid + of * lanes, shape.l * lanes, shape.r, lanes,
                     static_cast<Bf16*>(target) + of * mid_pairs_size(shape));
}

static void second_gradient_pairs(const SecondGradient& t) {
  const Shape& shape = t.shape;
  if (t.grad_bias) add_bias_gradient(t);
  if (!t.grad_w2) return;
  const ProductSession session;
  const int64_t lanes = padded(t.tokens), depth = padded32(lanes), width = padded(shape.r);
  const int64_t row = t.part.row_begin, count = t.part.row_end - row;
  const Rooms room = rooms(shape, t.scratch);
  const Bf16* mid = static_cast<const Bf16*>(t.mid_operand) + t.part.begin * mid_pairs_size(shape);
  Bf16* a = reinterpret_cast<Bf16*>(room.product);
  pack_token_rows(t.grad_out_lanes + (t.part.begin * shape.s + row) * lanes, lanes, count, lanes, a);
  gemm_bf16<true>(padded(count), width, depth, a, depth, mid, width, t.grad_w2 + row * width, width);
}

static constexpr monarch::Kernels kernels_pairs = {
    {"monarch_matmul:cpu/" EFFKERN_UNIT_NAME, "monarch_matmul_backward:cpu/" EFFKERN_UNIT_NAME,
     "block_diag_matmul:cpu/" EFFKERN_UNIT_NAME, "block_diag_matmul_backward:cpu/" EFFKERN_UNIT_NAME},
    kTokenTile,
    kLanes,
    kDotTokens,
    true,
    pair_scratch_bytes,
    widen<Bf16>,
    prepared_pairs_bytes,
    prepare_pairs,
    first_stage_pairs,
    second_stage_pairs,
    second_backward_pairs,
    first_backward_pairs,
    mid_pairs_bytes,
    mid_pairs,
    first_gradient_pairs,
    second_gradient_pairs,
    pack<Bf16>,
    unpack_mid<Bf16>,
    store_rows<Bf16>};

}  // namespace EFFKERN_UNIT
}  // namespace effkern
