// 16-bit weights by their codes: a group has at most 65,536 values, and everything a weight's value decides is computed
// once a value and looked up.
#pragma once

#include "core/buffer.h"
#include "dkm/group.h"

namespace effkern::dkm {

class Codes {
 public:
  // `narrow` are the kernels of the weights' dtype.
  Codes(const Kernels& narrow, const void* weight, int64_t count);

  bool finite() const { return finite_; }
  // The distinct values and how often each occurs; `grad` is what grad_sums returns, or null.
  Group group(const Kernels& wide, const float* grad) const;
  // The sums of the gradient over the weights of each value.
  const float* grad_sums(const void* grad);
  void emit(const float* of_values, void* out) const;
  void gradient(const float* slopes, const float* offsets, const void* grad, void* out) const;
  int64_t values() const { return unique_; }

 private:
  // A table by code from one by value.
  void spread(const float* of_values, float* table) const;

  const Kernels& kernels_;
  const uint16_t* codes_;
  int64_t count_, unique_ = 0;
  bool finite_ = true;
  Buffer index_, values_, grads_;
};

}  // namespace effkern::dkm
