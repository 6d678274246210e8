// What passes between the Monarch ops (torch side) and the ISA units (raw pointers only).
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace effkern {
namespace monarch {

// w1 (k, q, p) takes k * p inputs to k * q = l * r numbers in between, `mid`; w2 (l, s, r) takes those to l * s
// outputs. Number i of the middle is input i / l of block i % l of the second factor. A single factor has l = 0.
struct Shape {
  int64_t k, q, p, l, s, r;
  bool l_major;  // output (block, index) is number block * s + index, not index * l + block
  bool few;      // a handful of tokens, see below
};

// Inside the units everything is transposed: features run down, tokens run across, `lanes` of them (a multiple of
// the unit's lane count, not more than its token tile). So reading the middle for a block of the second factor is a
// row stride of l * lanes: the permutation of the Monarch matrix costs nothing. A handful of tokens would leave most
// lanes empty; they stand one after the other instead, each with the middle in the order of the second factor (`few`).

// Rows of the caller, one token each, in the caller's dtype; the stride counts elements.
struct Tokens {
  void* data;
  int64_t stride, count;
};

// A factor as the caller has it, and as the unit wants it, if that is something else and worth a copy.
struct Weights {
  const void* raw;
  const void* prepared;  // or null
};

// Blocks [begin, end) of a factor, and of each the rows [row_begin, row_end); row_begin is a multiple of 16.
struct Part {
  int64_t begin, end, row_begin, row_end;
};

// mid = w1 x for a part of the first factor.
struct FirstStage {
  Shape shape;
  Tokens x;
  Weights w1;
  Part part;
  float* mid;  // k * q numbers in the unit's own order, lanes of each
  void* scratch;
};

// out = w2 mid + bias for a part of the second factor.
struct SecondStage {
  Shape shape;
  const float* mid;
  Weights w2;
  const float* bias;  // (l * s) or null
  Part part;
  Tokens out;
  void* scratch;
};

// One token tile of the backward pass of two factors: grad_mid = w2^T grad_out for whole blocks of w2.
struct SecondBackward {
  Shape shape;
  int64_t tokens;
  const float* grad_out_lanes;  // (l, s, lanes), whatever the order of the output
  Weights w2;
  Part part;
  float* grad_mid;  // (k * q, lanes)
  void* scratch;
};

// grad_x = w1^T grad_mid for whole blocks of w1.
struct FirstBackward {
  Shape shape;
  const float* grad_mid;
  Weights w1;
  Part part;
  Tokens grad_x;
  void* scratch;
};

// The share of one token tile in the gradient of some rows of a block of a factor, added to fp32 sums. `part` has one
// block.
struct FirstGradient {
  Shape shape;
  Tokens x;
  const float* grad_mid;
  Part part;
  float* grad_w1;  // (padded q, padded p)
  void* scratch;
};
struct SecondGradient {
  Shape shape;
  int64_t tokens;
  const void* mid_operand;  // of the tile
  const float* grad_out_lanes;
  Part part;
  float* grad_w2;    // (padded s, padded r), or null
  float* grad_bias;  // (l * s), or null
  void* scratch;
};

enum Path : int { kMatmul, kMatmulBackward, kBlockDiag, kBlockDiagBackward };

// Everything one ISA unit offers for one dtype.
struct Kernels {
  const char* paths[4];  // by Path
  int64_t token_tile, lanes, few_tokens;
  // Whether the backward pass wants its factors prepared transposed, else as the forward pass has them.
  bool transposes;
  int64_t (*scratch_bytes)(const Shape&);  // for any of the calls below
  void (*widen)(const void* source, int64_t count, float* target);
  // What a prepared block of a factor takes, 0 where the factor is best read in place. `often`: by many token tiles.
  int64_t (*prepared_bytes)(int64_t rows, int64_t columns, bool transposed, bool often);
  void (*prepare)(const void* block, int64_t rows, int64_t columns, bool transposed, void* target);
  void (*first_stage)(const FirstStage&);
  void (*second_stage)(const SecondStage&);
  void (*second_backward)(const SecondBackward&);
  void (*first_backward)(const FirstBackward&);
  // The middle of a token tile as the gradient of w2 reads it, again and again.
  int64_t (*mid_operand_bytes)(const Shape&);
  void (*mid_operand)(const Shape&, const float* mid, int64_t tokens, void* target);
  void (*first_gradient)(const FirstGradient&);
  void (*second_gradient)(const SecondGradient&);
  // Between the caller's rows and lanes, whatever the number of tokens. Column index * blocks + block of the rows
  // becomes row block * size + index.
  void (*pack)(const Tokens& rows, int64_t blocks, int64_t size, float* lanes);
  // A part of the result of `first_stage` as rows.
  void (*unpack_mid)(const Shape& shape, const float* mid, const Part& part, const Tokens& rows);
  // target[row][column] = source[row * stride + column] in the unit's dtype
  void (*store)(const float* source, int64_t stride, int64_t rows, int64_t columns, void* target);
};

const Kernels& kernels_scalar(Dtype dtype);
const Kernels& kernels_avx2(Dtype dtype);
const Kernels& kernels_avx512(Dtype dtype);
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();

}  // namespace monarch
}  // namespace effkern
