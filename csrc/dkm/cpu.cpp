// Differentiable k-means on the CPU: checks, allocation, the loop over groups. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "core/check.h"
#include "core/count_codes.h"
#include "core/cpu/isa.h"
#include "core/operands.h"
#include "core/parallel.h"
#include "core/trace.h"
#include "dkm/codes.h"

namespace effkern::dkm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& select_kernels(Dtype kind) {
#if defined(__x86_64__)
  if (isa_active() >= Isa::avx512) return kernels_avx512(kind);
  if (isa_active() == Isa::avx2) return kernels_avx2(kind);
#endif
  return kernels_scalar(kind);
}

// How a call splits its weight.
struct Shape {
  Options options;
  int64_t groups, vectors;  // of each group
  const Kernels& kernels;
  const Kernels& wide;
  int64_t group_bytes;
  bool by_code;

  bool wide_numbers() const { return &kernels == &wide; }
};

// Errors in the words of effkern/ops/_dkm_checks.py.
void check_weight(const Tensor& weight, double temperature, int64_t iterations, int64_t groups, int64_t dim) {
  const ScalarType dtype = weight.scalar_type();
  EFFKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                "dkm: weight must be float32, bfloat16 or float16, got ", dtype_name(dtype));
  EFFKERN_CHECK(weight.dim() > 0, "dkm: weight must have at least one axis, got shape ()");
  EFFKERN_CHECK(temperature > 0 && std::isfinite(temperature), "dkm: temperature must be positive and finite, got ",
                temperature);
  EFFKERN_CHECK(iterations >= 1, "dkm: iterations must be at least 1, got ", iterations);
  EFFKERN_CHECK(dim == 1 || dim == 2 || dim == 4, "dkm: dim must be 1, 2 or 4, got ", dim);
  EFFKERN_CHECK(groups >= 1 && weight.size(0) % groups == 0, "dkm: groups ", groups, " does not divide the ",
                weight.size(0), " rows of weight");
  const int64_t last = weight.size(weight.dim() - 1), run = weight.dim() > 1 ? last : last / groups;
  EFFKERN_CHECK(run % dim == 0, "dkm: dim ", dim, " does not divide the last axis of weight, of size ", last);
}

Shape shape_of(const Tensor& weight, int64_t clusters, double temperature, int64_t iterations, double tolerance,
               int64_t groups, int64_t dim) {
  const Dtype kind = kernel_dtype(weight.scalar_type());
  const int64_t numbers = weight.numel() / groups;
  return {{clusters, dim, iterations, temperature, tolerance},
          groups,
          numbers / dim,
          select_kernels(kind),
          select_kernels(Dtype::fp32),
          numbers * static_cast<int64_t>(weight.element_size()),
          kind != Dtype::fp32 && dim == 1 && numbers >= kWorthCodes};
}

// Many groups run side by side, few one after the other, each on all threads: their bits are the same.
template <class Body>
void over_groups(int64_t groups, const Body& body) {
  if (groups >= 2 * thread_count()) return parallel_tasks(groups, [&](int64_t group, int64_t) { body(group); });
  for (int64_t group = 0; group < groups; ++group) body(group);
}

bool run_group(const Shape& shape, const char* weight, double* trajectory, float* counts, int64_t* steps, char* out,
               std::atomic<int64_t>& mild) {
  const int64_t numbers = shape.options.clusters * shape.options.dim;
  if (!shape.by_code) {
    GroupPasses passes(shape.options, {&shape.kernels, weight, nullptr, nullptr, shape.vectors});
    *steps = passes.iterate(trajectory, counts);
    mild += passes.mild();
    if (*steps < 0) return false;
    passes.emit(trajectory + (*steps - 1) * numbers, trajectory + *steps * numbers, out);
    return true;
  }
  const Codes codes(shape.kernels, weight, shape.vectors);
  if (!codes.finite()) return false;
  GroupPasses passes(shape.options, codes.group(shape.wide, nullptr));
  *steps = passes.iterate(trajectory, counts);
  mild += passes.mild();
  Buffer values;
  values.reserve(codes.values() * 4);
  passes.emit(trajectory + (*steps - 1) * numbers, trajectory + *steps * numbers, values.data);
  codes.emit(reinterpret_cast<const float*>(values.data), out);
  return true;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dkm_cpu(const Tensor& weight_in, const Tensor& centroids_in,
                                                   double temperature, int64_t iterations, double tolerance,
                                                   int64_t groups, int64_t dim) {
  check_weight(weight_in, temperature, iterations, groups, dim);
  EFFKERN_CHECK(tolerance >= 0 && std::isfinite(tolerance), "dkm: tolerance must be finite and not negative, got ",
                tolerance);
  EFFKERN_CHECK(centroids_in.is_cpu(), "dkm: centroids is on another device than weight");
  EFFKERN_CHECK(centroids_in.scalar_type() == ScalarType::Float, "dkm: centroids is ",
                dtype_name(centroids_in.scalar_type()), ", expected float32");
  EFFKERN_CHECK(centroids_in.dim() == 3 && centroids_in.size(0) == groups && centroids_in.size(2) == dim,
                "dkm: centroids must have shape (", groups, ", clusters, ", dim, "), got ", shape_string(centroids_in));
  const int64_t clusters = centroids_in.size(1);
  EFFKERN_CHECK(1 <= clusters && clusters <= kMaxClusters, "dkm: clusters of centroids must be between 1 and ",
                kMaxClusters, ", got ", clusters);
  const Shape shape = shape_of(weight_in, clusters, temperature, iterations, tolerance, groups, dim);
  const Tensor weight = as_contiguous(weight_in), centroids = as_contiguous(centroids_in);
  const int64_t path_sizes[4] = {groups, iterations + 1, clusters, dim},
                count_sizes[3] = {groups, iterations, clusters};
  Tensor out = torch::stable::new_empty(weight, weight.sizes(), weight.scalar_type());
  Tensor trajectory = torch::stable::new_empty(weight, {path_sizes, 4}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(weight, {count_sizes, 3}, ScalarType::Float);
  Tensor steps = torch::stable::new_empty(weight, {path_sizes, 1}, ScalarType::Long);
  trace_record(shape.by_code ? shape.kernels.forward_codes_path : shape.kernels.forward_path);

  const float* start = static_cast<const float*>(centroids.const_data_ptr());
  EFFKERN_CHECK(std::all_of(start, start + centroids.numel(), [](float x) { return std::isfinite(x); }),
                "dkm: centroids has entries that are not finite");
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  prefer_huge_pages(out_data, shape.group_bytes * groups);
  double* path_data = static_cast<double*>(trajectory.mutable_data_ptr());
  float* count_data = static_cast<float*>(counts.mutable_data_ptr());
  int64_t* step_data = static_cast<int64_t*>(steps.mutable_data_ptr());
  const int64_t numbers = clusters * dim;
  std::atomic<int64_t> mild{0};
  std::atomic<bool> finite{true};  // an exception must not leave a thread of the pool
  over_groups(groups, [&](int64_t group) {
    double* path = path_data + group * (iterations + 1) * numbers;
    std::copy_n(start + group * numbers, numbers, path);
    if (!run_group(shape, data + group * shape.group_bytes, path, count_data + group * iterations * clusters,
                   step_data + group, out_data + group * shape.group_bytes, mild))
      finite = false;
  });
  trace_detail(mild);
  EFFKERN_CHECK(finite, "dkm: weight has entries that are not finite");
  return {out, trajectory, counts, steps};
}

void run_group_backward(const Shape& shape, const char* grad, const char* weight, const double* trajectory,
                        const float* counts, int64_t steps, char* out, std::atomic<int64_t>& mild) {
  const int64_t numbers = shape.options.clusters * shape.options.dim;
  if (!shape.by_code) {
    GroupPasses passes(shape.options, {&shape.kernels, weight, grad, nullptr, shape.vectors});
    passes.gradient(passes.reverse(trajectory, counts, steps, shape.wide_numbers() ? out : nullptr), out);
    mild += passes.mild();
    return;
  }
  Codes codes(shape.kernels, weight, shape.vectors);
  GroupPasses passes(shape.options, codes.group(shape.wide, codes.grad_sums(grad)));
  const std::vector<Step> reversed = passes.reverse(trajectory, counts, steps);
  mild += passes.mild();
  // grad_i = g_i D(w_i) + E(w_i): D is the gradient where g = 1 and nothing reaches the centroids, E where g = 0.
  const int64_t unique = codes.values();
  Buffer tables;
  tables.reserve((3 * unique + numbers) * 4);
  float *slopes = reinterpret_cast<float*>(tables.data), *offsets = slopes + unique, *grads = offsets + unique;
  float* nothing = grads + unique;
  std::fill_n(nothing, numbers, 0.0f);
  std::fill_n(grads, unique, 1.0f);
  const Step& last = reversed.back();
  GroupPasses(shape.options, codes.group(shape.wide, grads))
      .gradient({{last.before, last.after, nothing, true}}, slopes);
  std::fill_n(grads, unique, 0.0f);
  GroupPasses(shape.options, codes.group(shape.wide, grads)).gradient(reversed, offsets);
  codes.gradient(slopes, offsets, grad, out);
}

Tensor dkm_backward_cpu(const Tensor& grad_in, const Tensor& weight_in, const Tensor& trajectory_in,
                        const Tensor& counts_in, const Tensor& steps_in, double temperature, int64_t groups,
                        int64_t dim) {
  check_weight(weight_in, temperature, 1, groups, dim);
  EFFKERN_CHECK(trajectory_in.is_cpu() && trajectory_in.scalar_type() == ScalarType::Double &&
                    trajectory_in.dim() == 4 && trajectory_in.size(0) == groups && trajectory_in.size(1) > 1 &&
                    trajectory_in.size(2) <= kMaxClusters && trajectory_in.size(3) == dim,
                "dkm_backward: trajectory has shape ", shape_string(trajectory_in),
                ", which does not match groups and dim, or another dtype or device");
  const int64_t iterations = trajectory_in.size(1) - 1, clusters = trajectory_in.size(2);
  EFFKERN_CHECK(counts_in.is_cpu() && counts_in.scalar_type() == ScalarType::Float && counts_in.dim() == 3 &&
                    counts_in.size(0) == groups && counts_in.size(1) == iterations && counts_in.size(2) == clusters,
                "dkm_backward: counts has shape ", shape_string(counts_in),
                ", which does not match trajectory, or another dtype or device");
  EFFKERN_CHECK(steps_in.is_cpu() && steps_in.scalar_type() == ScalarType::Long && steps_in.dim() == 1 &&
                    steps_in.size(0) == groups,
                "dkm_backward: steps must have shape (", groups, ",) and be int64, got ", shape_string(steps_in));
  EFFKERN_CHECK(grad_in.is_cpu() && grad_in.scalar_type() == weight_in.scalar_type() &&
                    grad_in.numel() == weight_in.numel() && shape_string(grad_in) == shape_string(weight_in),
                "dkm_backward: grad_out has shape ", shape_string(grad_in),
                ", which does not match weight, or another dtype or device");
  const Shape shape = shape_of(weight_in, clusters, temperature, iterations, 0, groups, dim);
  const Tensor weight = as_contiguous(weight_in), grad = as_contiguous(grad_in);
  const Tensor trajectory = as_contiguous(trajectory_in), counts = as_contiguous(counts_in);
  const Tensor steps = as_contiguous(steps_in);
  const int64_t* step_data = static_cast<const int64_t*>(steps.const_data_ptr());
  EFFKERN_CHECK(std::all_of(step_data, step_data + groups, [&](int64_t n) { return 1 <= n && n <= iterations; }),
                "dkm_backward: steps must be from 1 to ", iterations);
  Tensor out = torch::stable::new_empty(weight, weight.sizes(), weight.scalar_type());
  trace_record(shape.by_code ? shape.kernels.backward_codes_path : shape.kernels.backward_path);
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  const char* grad_data = static_cast<const char*>(grad.const_data_ptr());
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  prefer_huge_pages(out_data, shape.group_bytes * groups);
  const double* path = static_cast<const double*>(trajectory.const_data_ptr());
  const float* soft = static_cast<const float*>(counts.const_data_ptr());
  std::atomic<int64_t> mild{0};
  over_groups(groups, [&](int64_t group) {
    const int64_t at = group * shape.group_bytes;
    run_group_backward(shape, grad_data + at, data + at, path + group * (iterations + 1) * clusters * dim,
                       soft + group * iterations * clusters, step_data[group], out_data + at, mild);
  });
  trace_detail(mild);
  return out;
}

}  // namespace
}  // namespace effkern::dkm

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("dkm", TORCH_BOX(&effkern::dkm::dkm_cpu));
  m.impl("dkm_backward", TORCH_BOX(&effkern::dkm::dkm_backward_cpu));
}
