// Reductions over a row of accumulators: its elements lie in the four lanes of a quad (see mma.cuh).
#pragma once

#include "core/cuda/ptx.cuh"

namespace effkern::cuda {

EFFKERN_DEVICE float quad_max(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

EFFKERN_DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

}  // namespace effkern::cuda
