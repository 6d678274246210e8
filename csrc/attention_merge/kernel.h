// What passes between the merge op (torch side) and the ISA units (raw pointers only).
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace effkern {
namespace attention_merge {

// Rows [begin, end) of `parts` results over disjoint keys; all tensors contiguous, (rows, dim) and (rows).
struct Forward {
  int64_t parts, dim, begin, end;
  const void* const* outs;
  const float* const* lses;
  void* out;
  float* lse;
};

struct Backward {
  int64_t parts, dim, begin, end;
  const void* grad_out;
  const float* grad_lse;  // may be null
  const void* const* outs;
  const float* const* lses;
  const void* out;
  const float* lse;
  void* const* grad_outs;
  float* const* grad_lses;
};

struct Kernels {
  const char* forward_path;
  const char* backward_path;
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
};

const Kernels& kernels_scalar(Dtype dtype);
const Kernels& kernels_avx2(Dtype dtype);
const Kernels& kernels_avx512(Dtype dtype);

}  // namespace attention_merge
}  // namespace effkern
