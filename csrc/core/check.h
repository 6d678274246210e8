// Errors that name the op, the argument, what was expected and what came. Torch side only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "core/dtype.h"

namespace effkern {

// Becomes a RuntimeError in Python. Torch's own check macro would put a source path before the message.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// Of a tensor that has been checked to have one that kernels take.
inline Dtype kernel_dtype(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Float ? Dtype::fp32 : dtype == ScalarType::Half ? Dtype::fp16 : Dtype::bf16;
}

inline std::string shape_string(const torch::stable::Tensor& tensor) {
  std::string text = "(";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (axis) text += ", ";
    text += std::to_string(tensor.size(axis));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

}  // namespace effkern

// A macro, so that the message is only put together when it is needed.
#define EFFKERN_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) [[unlikely]]    \
      ::effkern::fail(__VA_ARGS__);   \
  } while (false)
