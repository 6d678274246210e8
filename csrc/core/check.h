// Errors that name the op, the argument, what was expected and what came. Torch side only.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

// Raises RuntimeError in Python with the streamed message when `condition` is false.
#define EFFKERN_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace effkern {

inline std::string shape_string(const torch::stable::Tensor& tensor) {
  std::string text = "(";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (axis) text += ", ";
    text += std::to_string(tensor.size(axis));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

}  // namespace effkern
