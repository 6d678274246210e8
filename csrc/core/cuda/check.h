// CUDA runtime errors as exceptions that name the op and the call. Torch side only.
#pragma once

#include <cuda_runtime_api.h>

#include "core/check.h"

namespace effkern::cuda {

inline void check(cudaError_t status, const char* op, const char* call) {
  if (status == cudaSuccess) return;
  const char* hint =
      status == cudaErrorNoKernelImageForDevice ? " (this build has images for " EFFKERN_CUDA_IMAGES ")" : "";
  EFFKERN_CHECK(false, op, ": ", call, " failed: ", cudaGetErrorString(status), hint);
}

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* op) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), op, "cudaDeviceGetAttribute");
  return value;
}

}  // namespace effkern::cuda
