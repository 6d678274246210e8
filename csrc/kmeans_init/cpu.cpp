// kmeans_init on the CPU: checks, groups, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>

#include "core/check.h"
#include "core/operands.h"
#include "core/parallel.h"
#include "core/trace.h"
#include "kmeans_init/kernel.h"

namespace effkern::kmeans_init {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_arguments(const Tensor& weight, int64_t clusters, int64_t groups, int64_t dim,
                     const std::optional<Tensor>& importance) {
  const ScalarType dtype = weight.scalar_type();
  EFFKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                "kmeans_init: weight must be float32, bfloat16 or float16, got ", dtype_name(dtype));
  EFFKERN_CHECK(weight.dim() >= 1 && weight.numel() > 0, "kmeans_init: weight must not be empty, got shape ",
                shape_string(weight));
  EFFKERN_CHECK(clusters >= 1 && clusters <= 256, "kmeans_init: clusters must be between 1 and 256, got ", clusters);
  EFFKERN_CHECK(groups >= 1 && weight.size(0) % groups == 0, "kmeans_init: groups ", groups, " does not divide the ",
                weight.size(0), " rows of weight");
  EFFKERN_CHECK(dim == 1 || dim == 2 || dim == 4, "kmeans_init: dim must be 1, 2 or 4, got ", dim);
  EFFKERN_CHECK(weight.size(weight.dim() - 1) % dim == 0 && weight.numel() / groups % dim == 0, "kmeans_init: dim ",
                dim, " does not divide the last axis of weight, of size ", weight.size(weight.dim() - 1));
  if (!importance) return;
  EFFKERN_CHECK(importance->dim() == weight.dim() &&
                    std::equal(weight.sizes().begin(), weight.sizes().end(), importance->sizes().begin()),
                "kmeans_init: importance has shape ", shape_string(*importance), ", weight has ", shape_string(weight));
  EFFKERN_CHECK(importance->scalar_type() == ScalarType::Float, "kmeans_init: importance must be float32, got ",
                dtype_name(importance->scalar_type()));
  EFFKERN_CHECK(importance->is_cpu(), "kmeans_init: importance is on another device than weight");
}

// In one dimension: every group on its own thread, or, where one is large, all threads on one after the other.
Faults over_scalars(const Tensor& weight, const float* importance, int64_t clusters, int64_t groups, float* centroids) {
  const int64_t count = weight.numel() / groups;
  const auto* data = static_cast<const char*>(weight.const_data_ptr());
  std::atomic<bool> bad_weight{false}, bad_importance{false};
  const auto one = [&](int64_t group) {
    Faults faults;
    const int64_t bytes = group * count * static_cast<int64_t>(weight.element_size());
    const Points points = distinct_points(
        {data + bytes, importance ? importance + group * count : nullptr, count, kernel_dtype(weight.scalar_type())},
        &faults);
    if (faults.weight) bad_weight = true;
    if (faults.importance) bad_importance = true;
    if (!faults.weight && !faults.importance) exact_centroids(points, clusters, centroids + group * clusters);
  };
  if (groups < 2 * thread_count()) {
    for (int64_t group = 0; group < groups; ++group) one(group);
  } else {
    parallel_tasks(groups, [&](int64_t group, int64_t) { one(group); });
  }
  return {bad_weight, bad_importance};
}

// The importance of a vector is the mean of that of its numbers. A group of none counts every vector once.
Faults over_vectors(const Tensor& weight, const float* importance, int64_t clusters, int64_t groups, int64_t dim,
                    float* centroids) {
  const int64_t count = weight.numel() / groups / dim;
  const Tensor wide = as_dtype(weight, ScalarType::Float);
  const auto* value = static_cast<const float*>(wide.const_data_ptr());
  Faults faults;
  for (int64_t i = 0; i < weight.numel(); ++i) {
    if (!(std::abs(value[i]) < INFINITY)) faults.weight = true;
    if (importance && !(importance[i] >= 0.0f && importance[i] < INFINITY)) faults.importance = true;
  }
  if (faults.weight || faults.importance) return faults;
  std::vector<float> mass(importance ? count : 0);
  for (int64_t group = 0; group < groups; ++group) {
    bool counts = false;
    for (int64_t i = 0; importance && i < count; ++i) {
      mass[i] = 0.0f;
      for (int64_t d = 0; d < dim; ++d) mass[i] += importance[(group * count + i) * dim + d] / dim;
      counts = counts || mass[i] > 0.0f;
    }
    lloyd_centroids({value + group * count * dim, counts ? mass.data() : nullptr, count, dim}, clusters, group,
                    centroids + group * clusters * dim);
  }
  return faults;
}

Tensor kmeans_init_cpu(const Tensor& weight_in, int64_t clusters, int64_t groups, int64_t dim,
                       std::optional<Tensor> importance_in) {
  check_arguments(weight_in, clusters, groups, dim, importance_in);
  const Tensor weight = as_contiguous(weight_in);
  std::optional<Tensor> importance;
  if (importance_in) importance = as_contiguous(*importance_in);
  std::vector<int64_t> shape{clusters};
  if (groups > 1) shape.insert(shape.begin(), groups);
  if (dim > 1) shape.push_back(dim);
  Tensor centroids = torch::stable::new_empty(weight, {shape.data(), shape.size()}, ScalarType::Float);
  trace_record("kmeans_init:cpu");
  const float* counts = importance ? static_cast<const float*>(importance->const_data_ptr()) : nullptr;
  auto* out = static_cast<float*>(centroids.mutable_data_ptr());
  const Faults faults = dim == 1 ? over_scalars(weight, counts, clusters, groups, out)
                                 : over_vectors(weight, counts, clusters, groups, dim, out);
  EFFKERN_CHECK(!faults.weight, "kmeans_init: weight has entries that are not finite");
  EFFKERN_CHECK(!faults.importance, "kmeans_init: importance has entries that are negative or not finite");
  return centroids;
}

}  // namespace
}  // namespace effkern::kmeans_init

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("kmeans_init", TORCH_BOX(&effkern::kmeans_init::kmeans_init_cpu)); }
