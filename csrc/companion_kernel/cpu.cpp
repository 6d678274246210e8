// The companion_kernel ops on the CPU: checks, allocation, parallel loop. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "companion_kernel/kernel.h"
#include "core/buffer.h"
#include "core/check.h"
#include "core/cpu/isa.h"
#include "core/operands.h"
#include "core/parallel.h"
#include "core/trace.h"

namespace effkern::companion_kernel {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& select_kernels() {
#if defined(__x86_64__)
  if (isa_active() >= Isa::avx512) return kernels_avx512();
  if (isa_active() == Isa::avx2) return kernels_avx2();
#endif
  return kernels_scalar();
}

bool same_shape(const Tensor& x, const Tensor& y) {
  return x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && x.size(1) == y.size(1);
}

void check_parameter(const char* name, const Tensor& t, const Tensor& a) {
  EFFKERN_CHECK(same_shape(t, a), "companion_kernel: ", name, " has shape ", shape_string(t), ", a has ",
                shape_string(a));
  EFFKERN_CHECK(t.scalar_type() == ScalarType::Float, "companion_kernel: ", name, " has another dtype than a");
  EFFKERN_CHECK(t.is_cpu(), "companion_kernel: ", name, " is on another device than a");
}

Shape check_arguments(const Tensor& a, const Tensor& b, const Tensor& c, int64_t length) {
  EFFKERN_CHECK(a.dim() == 2 && a.size(1) >= 1,
                "companion_kernel: a must have shape (channels, order), order at least 1,", " got ", shape_string(a));
  EFFKERN_CHECK(a.scalar_type() == ScalarType::Float, "companion_kernel: a must be float32 for the kernel");
  check_parameter("b", b, a);
  check_parameter("c", c, a);
  EFFKERN_CHECK(length >= 1, "companion_kernel: length must be at least 1, got ", length);
  return {a.size(0), a.size(1), length};
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
Tensor like(const Tensor& t) { return torch::stable::new_empty(t, t.sizes(), t.scalar_type()); }

// Calls body(first, scratch) for every group of channels.
template <class Body>
void over_groups(const Kernels& kernels, const Shape& shape, const Body& body) {
  const int64_t groups = (shape.channels + kernels.lanes - 1) / kernels.lanes;
  const int64_t bytes = round_to_line(kernels.scratch_bytes(shape));
  Buffer scratch;
  scratch.reserve(bytes * slot_count(groups));
  parallel_tasks(groups, [&](int64_t group, int64_t slot) {
    body(group * kernels.lanes, reinterpret_cast<float*>(scratch.data + slot * bytes));
  });
}

Tensor companion_cpu(const Tensor& a_in, const Tensor& b_in, const Tensor& c_in, int64_t length) {
  const Shape shape = check_arguments(a_in, b_in, c_in, length);
  const Kernels& kernels = select_kernels();
  const Tensor a = as_contiguous(a_in), b = as_contiguous(b_in);
  const Tensor c = as_contiguous(c_in);
  const int64_t sizes[2] = {shape.channels, length};
  Tensor out = torch::stable::new_empty(a, {sizes, 2}, ScalarType::Float);
  trace_record(kernels.forward_path);
  float* data = floats(out);
  over_groups(kernels, shape, [&](int64_t first, float* scratch) {
    kernels.forward({shape, first, floats(a), floats(b), floats(c), data, scratch});
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> companion_backward_cpu(const Tensor& grad_out_in, const Tensor& a_in,
                                                          const Tensor& b_in, const Tensor& c_in,
                                                          const Tensor& out_in) {
  EFFKERN_CHECK(out_in.dim() == 2, "companion_kernel_backward: out must have shape (channels, length), got ",
                shape_string(out_in));
  const Shape shape = check_arguments(a_in, b_in, c_in, out_in.size(1));
  const auto fits = [&](const Tensor& t) {
    return same_shape(t, out_in) && t.size(0) == shape.channels && t.scalar_type() == ScalarType::Float && t.is_cpu();
  };
  EFFKERN_CHECK(fits(grad_out_in) && fits(out_in),
                "companion_kernel_backward: grad_out or out does not match the parameters");
  const Kernels& kernels = select_kernels();
  const Tensor a = as_contiguous(a_in), b = as_contiguous(b_in);
  const Tensor c = as_contiguous(c_in), out = as_contiguous(out_in);
  const Tensor grad_out = as_contiguous(grad_out_in);
  Tensor grad_a = like(a), grad_b = like(a), grad_c = like(a);
  trace_record(kernels.backward_path);
  float *to_a = floats(grad_a), *to_b = floats(grad_b), *to_c = floats(grad_c);
  over_groups(kernels, shape, [&](int64_t first, float* scratch) {
    kernels.backward(
        {shape, first, floats(grad_out), floats(a), floats(b), floats(c), floats(out), to_a, to_b, to_c, scratch});
  });
  return {grad_a, grad_b, grad_c};
}

}  // namespace
}  // namespace effkern::companion_kernel

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("companion_kernel", TORCH_BOX(&effkern::companion_kernel::companion_cpu));
  m.impl("companion_kernel_backward", TORCH_BOX(&effkern::companion_kernel::companion_backward_cpu));
}
