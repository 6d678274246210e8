// The instances of the sm_90a backward kernels, by padded head dimension (backward_sm90_unit.h).
#pragma once

#include <cuda_runtime_api.h>

#include "attention/backward_sm90_launch.h"
#include "core/cuda/tensor_map.h"

namespace effkern::attention {

struct BackwardSm90Views {
  cuda::TensorView q, k, v, grad_out;
};

// What the launches need beside the parameters: lists of key tiles (`params.call.lists` are those of query tiles), and
// memory. Rows hold rows_floats(), sums query_sums_floats() floats.
struct BackwardSm90Launch {
  BackwardSm90Views views;
  StoredLists by_key;
  float *rows, *query_sums;  // query_sums null: dQ by a kernel of its own
  const char* op;
  cudaStream_t stream;
};

// Completes the parameters by maps and schedules, and launches the kernels on the current device, in order.
template <class Element, int kHeadDim>
void launch_backward_sm90(BackwardSm90Params& p, const BackwardSm90Launch& launch);

}  // namespace effkern::attention
