// What passes between palettized_linear (torch side) and the ISA units (raw pointers only).
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace effkern {
namespace palettized_linear {

constexpr int64_t kEntries = 256;  // of a table as the units read it: repeated, so that unused bits do not matter

// A weight of rows x (count * dim): packed rows of `count` indices each, layout as in effkern/ops/_palette_layout.py.
struct Packed {
  const uint8_t* indices;
  const float* tables;  // (groups, dim, kEntries)
  int64_t row_bytes, rows, count, bits, groups, dim;
  bool bf16_entries;  // all entries are bf16 numbers
};

struct Few {
  Packed weight;
  const float* x;               // (tokens, dim, count): one plane for each place in a vector, in the order of `few`
  int64_t tokens, first, last;  // rows
  const float* bias;            // may be null
  void* out;                    // (tokens, rows)
  float* scratch;               // kSlack floats
};

struct Rows {
  Packed weight;
  const float* x;  // (tokens, stride), rows zero from count * dim on
  int64_t tokens, stride, first, last;
  const float* bias;
  void* out;
  float* scratch;
};

// Products of bf16 in pairs, of which the table's entries must be bf16 too.
struct PairRows {
  Packed weight;
  const void* pairs;  // (depth / 2, lanes) words: x transposed, two features in a word, zeros behind the last ones
  int64_t tokens, lanes, depth, first, last;
  const float* bias;
  void* out;
  float* scratch;
};

constexpr int64_t kSlack = 512 + 64;  // room for the fields of a block

struct Kernels {
  const char* path;
  const char* backward_path;
  int64_t lanes;
  int64_t row_block;                                              // rows of a `many` task
  int64_t (*many_scratch)(const Packed& weight, int64_t tokens);  // floats
  void (*few)(const Few&);
  const uint16_t* (*order)(const Packed& weight);  // of the numbers of a whole block in `few`; null: as they lie
  void (*many)(const Rows&);
  void (*decode)(const Packed& weight, int64_t row, float* scratch, float* out);  // count * dim numbers
  // c (rows, columns) += a (rows, depth) b (depth, columns), columns a multiple of `lanes`; a through free strides
  void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                   const float* b, int64_t ldb, float* c, int64_t ldc);
};

struct PairKernels {
  const char* path;
  int64_t row_block;
  int64_t (*scratch)(const Packed& weight, int64_t depth);  // floats
  // Features [first, first + count) of x (tokens, columns), which is bf16, to `pairs`
  void (*pack)(const void* x, int64_t tokens, int64_t columns, int64_t first, int64_t count, int64_t lanes,
               void* pairs);
  void (*many)(const PairRows&);
};

const PairKernels& pair_kernels_avx512_bf16(Dtype out);
const PairKernels& pair_kernels_amx(Dtype out);

const Kernels& kernels_scalar(Dtype out);
const Kernels& kernels_avx2(Dtype out);
const Kernels& kernels_avx512(Dtype out);

}  // namespace palettized_linear
}  // namespace effkern
