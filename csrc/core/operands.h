// Operands in the layout and dtype that a kernel reads. Torch side only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace effkern {

// torch's own functions go through the dispatcher even where nothing is to be done: a microsecond per operand, which is
// a tenth of an op that takes one token.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline torch::stable::Tensor as_dtype(const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

}  // namespace effkern
