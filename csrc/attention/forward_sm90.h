// The instances of the sm_90a forward kernel, by padded head dimension and keys a tile (forward_sm90_unit.h).
#pragma once

#include <cuda_runtime_api.h>

#include "attention/forward_sm90_launch.h"
#include "core/cuda/tensor_map.h"

namespace effkern::attention {

struct ForwardSm90Views {
  cuda::TensorView q, k, v, out;
};

// Completes the parameters by maps of the tensors and the schedule, and launches on the current device.
template <class Element, class Shape>
void launch_forward_sm90(ForwardSm90Params& p, const ForwardSm90Views& views, const char* op, cudaStream_t stream);

}  // namespace effkern::attention
