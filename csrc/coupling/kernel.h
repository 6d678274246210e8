// What passes between the coupling op (torch side) and the ISA units (raw pointers only).
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace effkern {
namespace coupling {

// Contiguous numbers; data is null where the argument is not there.
struct Operand {
  const void* data;
  Dtype dtype;
};

struct Target {
  void* data;
  Dtype dtype;
};

// Numbers [begin, end) of out = beta y + sign R(f + alpha x) and kept = keep x.
struct Stretch {
  Operand f, y, x;
  Target out, kept;
  float alpha, beta, sign, keep;
  bool grid;       // R rounds to multiples of `down`, else it changes nothing
  float up, down;  // 2^q and 2^-q
  int64_t begin, end;
};

struct Kernels {
  const char* path;
  // The largest magnitude in out, NaN where there is one; only with a grid.
  float (*couple)(const Stretch&);
};

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace coupling
}  // namespace effkern
