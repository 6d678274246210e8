// Arguments of the long convolutions: checks, the unit that serves them, and tensors as the units want them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "core/buffer.h"
#include "core/check.h"
#include "core/cpu/isa.h"
#include "core/parallel.h"
#include "core/trace.h"
#include "long_conv/kernel.h"

namespace effkern::long_conv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& select_kernels(ScalarType dtype);

// The arguments of a call, checked; tensors in the layout the units read.
struct Operands {
  int64_t batches, channels, taps, history, length;  // length: of the outputs
  int64_t reach;                                     // taps that meet an input; the others count for nothing
  Tensor u, k;                                       // k float32, contiguous
  std::optional<Tensor> spectrum, skip, pre_gate, post_gate;
  bool causal;
  const Kernels* kernels;
  Method method;
  const Plan* plan;  // of a transform, else null

  Operands(const Tensor& u, const Tensor& k, const std::optional<Tensor>& spectrum, const std::optional<Tensor>& skip,
           const std::optional<Tensor>& pre_gate, const std::optional<Tensor>& post_gate, int64_t history, bool causal);

  const auto& kernel() const { return kernels->methods[method]; }
  Taps channel_taps(int64_t channel) const;
  const float* channel_spectrum(int64_t channel) const;
  float channel_skip(int64_t channel) const;
};

// t, copied where positions are not adjacent.
Tensor adjacent(const Tensor& t);

// The data of a channel of a (batch, channel, position) tensor, if there is one.
Signal channel_of(const std::optional<Tensor>& t, int64_t channel);

// Channels are the tasks. Where they are few, the batch is cut into groups as well, in a way that depends on the shape
// alone, since the sums over a group come before those over the groups.
int64_t batch_groups(int64_t batches, int64_t channels);

constexpr int64_t kLongest = int64_t{1} << 34;  // positions of an input

inline bool is_fast(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Floats of a row of a prepared spectrum: the numbers, and a mark that says what they are.
inline int64_t spectrum_floats(int64_t size) { return 2 * size + 16; }
void write_mark(float* mark, const Operands& call);

}  // namespace effkern::long_conv
