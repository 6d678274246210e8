// The short convolution on the CPU: checks, allocation, parallel loops. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "core/buffer.h"
#include "core/check.h"
#include "core/cpu/isa.h"
#include "core/operands.h"
#include "core/parallel.h"
#include "core/trace.h"
#include "short_conv/kernel.h"

namespace effkern::short_conv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& select_kernels(ScalarType dtype) {
  const Dtype kind = kernel_dtype(dtype);
#if defined(__x86_64__)
  if (isa_active() >= Isa::avx512) return kernels_avx512(kind);
  if (isa_active() == Isa::avx2) return kernels_avx2(kind);
#endif
  return kernels_scalar(kind);
}

// Errors in the words of effkern/ops/_short_conv_checks.py.
void check_kind(const char* name, const Tensor& t, const Tensor& x) {
  EFFKERN_CHECK(t.scalar_type() == x.scalar_type() || t.scalar_type() == ScalarType::Float, "short_conv: ", name,
                " is ", dtype_name(t.scalar_type()), ", expected ", dtype_name(x.scalar_type()), " as x or float32");
  EFFKERN_CHECK(t.is_cpu(), "short_conv: ", name, " is on another device than x");
}

Shape check_arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& state) {
  const ScalarType dtype = x.scalar_type();
  EFFKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                "short_conv: x must be float32, bfloat16 or float16, got ", dtype_name(dtype));
  EFFKERN_CHECK(x.dim() == 3, "short_conv: x must have shape (batch, channels, length), got ", shape_string(x));
  const int64_t batch = x.size(0), channels = x.size(1);
  EFFKERN_CHECK(weight.dim() == 2 && weight.size(0) == channels, "short_conv: weight must have shape (", channels,
                ", taps), got ", shape_string(weight));
  const int64_t taps = weight.size(1);
  EFFKERN_CHECK(1 <= taps && taps <= kMaxTaps, "short_conv: weight has ", taps, " taps, expected 1 to ", kMaxTaps);
  check_kind("weight", weight, x);
  if (bias) {
    EFFKERN_CHECK(bias->dim() == 1 && bias->size(0) == channels, "short_conv: bias must have shape (", channels,
                  ",), got ", shape_string(*bias));
    check_kind("bias", *bias, x);
  }
  if (state) {
    EFFKERN_CHECK(
        state->dim() == 3 && state->size(0) == batch && state->size(1) == channels && state->size(2) == taps - 1,
        "short_conv: state must have shape (", batch, ", ", channels, ", ", taps - 1, "), got ", shape_string(*state));
    check_kind("state", *state, x);
  }
  return {batch, channels, x.size(2), taps};
}

// (B, H, L) with adjacent positions; decoding wants all of it contiguous.
Tensor as_rows(const Tensor& t) { return t.size(2) > kFewPositions && t.stride(2) == 1 ? t : as_contiguous(t); }

Rows rows_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

// Weights or bias in fp32.
struct Parameter {
  Tensor storage;
  Buffer room;
  const float* data;

  Parameter(const Tensor& t, const Kernels& kernels) : storage(as_contiguous(t)) {
    data = static_cast<const float*>(storage.const_data_ptr());
    if (t.scalar_type() == ScalarType::Float) return;
    room.reserve(t.numel() * static_cast<int64_t>(sizeof(float)));
    float* to = reinterpret_cast<float*>(room.data);
    kernels.widen(storage.const_data_ptr(), t.numel(), to);
    data = to;
  }
};

// The arguments as the units want them.
struct Arguments {
  Tensor x;
  Parameter weight;
  std::optional<Parameter> bias;
  std::optional<Tensor> state;
  Inputs inputs;

  Arguments(const Shape& shape, const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
            const std::optional<Tensor>& state_in, bool silu, const Kernels& kernels)
      : x(as_rows(x_in)),
        weight(weight_in, kernels) {
    if (bias_in) bias.emplace(*bias_in, kernels);
    if (state_in && state_in->numel()) state = as_contiguous(*state_in);
    inputs = {shape,
              rows_of(x),
              state ? state->const_data_ptr() : nullptr,
              state && state->scalar_type() == ScalarType::Float,
              weight.data,
              bias ? bias->data : nullptr,
              silu};
  }
};

// Working memory, one part a thread.
struct Scratch {
  Buffer buffer;
  int64_t floats;

  Scratch(int64_t floats, int64_t tasks) : floats(round_to_line(floats * 4) / 4) {
    buffer.reserve(this->floats * 4 * slot_count(tasks));
  }
  float* of(int64_t slot) const { return reinterpret_cast<float*>(buffer.data) + slot * floats; }
};

// How many rows are worth a task: some ten microseconds.
int64_t rows_of_a_task(const Shape& shape, int64_t rows_of_a_unit = 1) {
  return std::max<int64_t>(1, (1 << 17) / (std::max<int64_t>(1, shape.length * rows_of_a_unit) * (shape.taps + 4)));
}

Tensor short_conv_cpu(const Tensor& x_in, const Tensor& weight_in, std::optional<Tensor> bias_in,
                      std::optional<Tensor> state_in, bool silu) {
  const Shape shape = check_arguments(x_in, weight_in, bias_in, state_in);
  const Kernels& kernels = select_kernels(x_in.scalar_type());
  Tensor out = torch::stable::new_empty(x_in, x_in.sizes(), x_in.scalar_type());
  trace_record(kernels.forward_path);
  if (out.numel() == 0) return out;
  const Arguments arguments(shape, x_in, weight_in, bias_in, state_in, silu, kernels);
  const int64_t rows = shape.batch * shape.channels, step = rows_of_a_task(shape), tasks = (rows + step - 1) / step;
  const Scratch scratch(kernels.scratch_floats(shape.taps), tasks);
  void* out_data = out.mutable_data_ptr();
  parallel_tasks(tasks, [&](int64_t task, int64_t slot) {
    kernels.forward({arguments.inputs, task * step, std::min(rows, (task + 1) * step), out_data, scratch.of(slot)});
  });
  return out;
}

Tensor new_gradient(bool wanted, const Tensor& like) {
  const int64_t none[1] = {0};
  if (!wanted) return torch::stable::new_empty(like, {none, 1});
  return torch::stable::new_empty(like, like.sizes(), like.scalar_type());
}

// Sums (channels, parts, taps + 1) into a gradient: `count` numbers of each channel from `first` on, parts in order.
void store_sums(const float* sums, const Shape& shape, int64_t parts, int64_t first, int64_t count,
                const Kernels& kernels, Tensor& gradient) {
  const int64_t stride = shape.taps + 1;
  const bool direct = gradient.scalar_type() == ScalarType::Float;
  Buffer room;
  if (!direct) room.reserve(shape.channels * count * static_cast<int64_t>(sizeof(float)));
  float* totals = direct ? static_cast<float*>(gradient.mutable_data_ptr()) : reinterpret_cast<float*>(room.data);
  for (int64_t h = 0; h < shape.channels; ++h)
    for (int64_t w = 0; w < count; ++w) {
      const float* part = sums + h * parts * stride + first + w;
      float total = part[0];
      for (int64_t p = 1; p < parts; ++p) total += part[p * stride];
      totals[h * count + w] = total;
    }
  if (!direct) kernels.narrow(totals, shape.channels * count, gradient.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> short_conv_backward_cpu(
    const Tensor& grad_out_in, const Tensor& x_in, const Tensor& weight_in, std::optional<Tensor> bias_in,
    std::optional<Tensor> state_in, bool silu, bool need_x, bool need_weight, bool need_bias, bool need_state) {
  const Shape shape = check_arguments(x_in, weight_in, bias_in, state_in);
  EFFKERN_CHECK(grad_out_in.dim() == 3 && grad_out_in.size(0) == shape.batch && grad_out_in.size(1) == shape.channels &&
                    grad_out_in.size(2) == shape.length && grad_out_in.scalar_type() == x_in.scalar_type() &&
                    grad_out_in.is_cpu(),
                "short_conv_backward: grad_out has shape ", shape_string(grad_out_in),
                ", which does not match x, or another dtype or device");
  need_bias = need_bias && bias_in;
  need_state = need_state && state_in;
  const Kernels& kernels = select_kernels(x_in.scalar_type());
  Tensor grad_x = new_gradient(need_x, x_in), grad_weight = new_gradient(need_weight, weight_in);
  Tensor grad_bias = new_gradient(need_bias, bias_in ? *bias_in : x_in);
  Tensor grad_state = new_gradient(need_state, state_in ? *state_in : x_in);
  trace_record(kernels.backward_path);
  if (shape.length == 0 && grad_state.numel())
    memset(grad_state.mutable_data_ptr(), 0, grad_state.numel() * grad_state.element_size());

  const Arguments arguments(shape, x_in, weight_in, bias_in, state_in, silu, kernels);
  const Tensor grad_out = as_rows(grad_out_in);
  // A channel's sums go over its batches in order. Where there are few channels, the batches are split among tasks,
  // by the shape alone: the order of a sum must not depend on the threads.
  constexpr int64_t kEnough = 64;
  const int64_t wanted = shape.channels ? (kEnough + shape.channels - 1) / shape.channels : 1;
  const int64_t parts = std::max<int64_t>(1, std::min(shape.batch, wanted)), units = shape.channels * parts;
  const int64_t step = rows_of_a_task(shape, (shape.batch + parts - 1) / parts), tasks = (units + step - 1) / step;
  const bool need_sums = need_weight || need_bias;
  const int64_t stride = shape.taps + 1;
  Buffer sums;
  if (need_sums) sums.reserve(units * stride * static_cast<int64_t>(sizeof(float)));
  float* sums_data = reinterpret_cast<float*>(sums.data);
  const Scratch scratch(kernels.scratch_floats(shape.taps), tasks);
  const Rows grad_rows = rows_of(grad_out);
  void* grad_x_data = need_x ? grad_x.mutable_data_ptr() : nullptr;
  void* grad_state_data = need_state && grad_state.numel() ? grad_state.mutable_data_ptr() : nullptr;
  parallel_tasks(tasks, [&](int64_t task, int64_t slot) {
    for (int64_t unit = task * step; unit < std::min(units, (task + 1) * step); ++unit) {
      const int64_t part = unit % parts;
      kernels.backward({arguments.inputs, grad_rows, unit / parts, shape.batch * part / parts,
                        shape.batch * (part + 1) / parts, grad_x_data, grad_state_data,
                        need_sums ? sums_data + unit * stride : nullptr, scratch.of(slot)});
    }
  });
  if (need_weight) store_sums(sums_data, shape, parts, 0, shape.taps, kernels, grad_weight);
  if (need_bias) store_sums(sums_data, shape, parts, shape.taps, 1, kernels, grad_bias);
  return {grad_x, grad_weight, grad_bias, grad_state};
}

}  // namespace
}  // namespace effkern::short_conv

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("short_conv", TORCH_BOX(&effkern::short_conv::short_conv_cpu));
  m.impl("short_conv_backward", TORCH_BOX(&effkern::short_conv::short_conv_backward_cpu));
}
