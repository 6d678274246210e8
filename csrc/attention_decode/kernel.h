// What passes between the decode op (torch side) and the ISA units (raw pointers only).
#pragma once

#include "attention/mask.h"

namespace effkern {
namespace attention_decode {

using attention::Mask;

// The keys or values of one (sequence, kv head): rows one after the other, or in pages. Strides count elements.
struct Cache {
  const void* data;
  int64_t row_stride;
  const int32_t* pages;  // null: contiguous
  int64_t page_size, page_stride;
};

// A chunk of keys against all query rows of a kv head: row (head, query) of the group * queries rows.
struct Chunk {
  int64_t head_dim, value_dim;
  float scale, softcap;
  const void* q;
  int64_t q_head_stride, q_row_stride, group, queries;
  Cache k, v;
  int64_t begin, end;
  bool partial;  // some (query, key) pair inside is masked
  const Mask* mask;
  float* values;  // (rows, value_dim): sum of weights times values
  float* top;     // (rows) largest logit, minus infinity where no key was seen
  float* total;   // (rows) sum of exp(logit - top)
  void* scratch;
};

// The chunks of a kv head together, in their order.
struct Merge {
  int64_t value_dim, group, queries, chunks;
  const float *values, *top, *total;  // (chunks, rows, ...)
  const float* sinks;                 // (group) or null
  void* out;                          // (heads, queries, value_dim), first head of the group
  float* lse;                         // (heads, queries)
};

struct Kernels {
  const char* path;
  int64_t (*scratch_bytes)(int64_t rows, int64_t head_dim, int64_t value_dim);
  void (*chunk)(const Chunk&);
  void (*merge)(const Merge&);
};

const Kernels& kernels_scalar(Dtype dtype);
const Kernels& kernels_avx2(Dtype dtype);
const Kernels& kernels_avx512(Dtype dtype);

}  // namespace attention_decode
}  // namespace effkern
