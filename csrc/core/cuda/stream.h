// The stream torch is working on, through its C shim. Torch side only.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "core/check.h"

// Weak, because a CPU-only torch does not have it and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace effkern::cuda {

inline cudaStream_t current_stream(int32_t device_index, const char* op) {
  EFFKERN_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
                ": this PyTorch was built without CUDA; install a CUDA build of torch to run on a GPU");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace effkern::cuda
