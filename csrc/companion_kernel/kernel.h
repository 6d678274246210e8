// What passes between the companion_kernel op (torch side) and the ISA units (raw pointers only).
#pragma once

#include <stdint.h>

namespace effkern {
namespace companion_kernel {

struct Shape {
  int64_t channels, order, length;
};

// Channels from `first` on, as many as a unit has lanes or the rest; all tensors contiguous, (channels, order) and
// (channels, length). `scratch` starts at a cache line.
struct Forward {
  Shape shape;
  int64_t first;
  const float *a, *b, *c;
  float* out;
  float* scratch;
};

struct Backward {
  Shape shape;
  int64_t first;
  const float *grad_out, *a, *b, *c, *out;
  float *grad_a, *grad_b, *grad_c;
  float* scratch;
};

struct Kernels {
  const char* forward_path;
  const char* backward_path;
  int64_t lanes;
  int64_t (*scratch_bytes)(const Shape&);
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
};

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace companion_kernel
}  // namespace effkern
