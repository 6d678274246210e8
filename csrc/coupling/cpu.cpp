// The coupling op on the CPU: checks, allocation, parallel loop. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/cpu/isa.h"
#include "core/operands.h"
#include "core/parallel.h"
#include "core/trace.h"
#include "coupling/kernel.h"

namespace effkern::coupling {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kFinest = 23;  // a float32 has 24 bits

const Kernels& select_kernels() {
#if defined(__x86_64__)
  if (isa_active() >= Isa::avx512) return kernels_avx512();
  if (isa_active() == Isa::avx2) return kernels_avx2();
#endif
  return kernels_scalar();
}

void check_argument(const char* name, const Tensor& t, const Tensor& f) {
  const ScalarType dtype = t.scalar_type();
  EFFKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                "coupling: ", name, " must be float32, bfloat16 or float16, got ", dtype_name(dtype));
  bool same = t.dim() == f.dim();
  for (int64_t axis = 0; same && axis < t.dim(); ++axis) same = t.size(axis) == f.size(axis);
  EFFKERN_CHECK(same, "coupling: ", name, " has shape ", shape_string(t), ", f has ", shape_string(f));
  EFFKERN_CHECK(t.is_cpu(), "coupling: ", name, " is on another device than f");
}

// A contiguous argument that may not be there.
struct Argument {
  std::optional<Tensor> storage;
  Operand operand = {nullptr, Dtype::fp32};

  explicit Argument(const std::optional<Tensor>& t) {
    if (!t) return;
    storage = as_contiguous(*t);
    operand = {storage->const_data_ptr(), kernel_dtype(t->scalar_type())};
  }
};

// That of a sum of the arguments in PyTorch; with a grid always float32.
ScalarType result_dtype(const Tensor& f, const std::optional<Tensor>& y, const std::optional<Tensor>& x, bool grid) {
  const ScalarType dtype = f.scalar_type();
  const bool one = (!y || y->scalar_type() == dtype) && (!x || x->scalar_type() == dtype);
  return one && !grid ? dtype : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> coupling_cpu(const Tensor& f_in, std::optional<Tensor> y_in,
                                                std::optional<Tensor> x_in, double alpha, double beta, bool subtract,
                                                std::optional<int64_t> q, std::optional<double> keep) {
  check_argument("f", f_in, f_in);
  if (y_in) check_argument("y", *y_in, f_in);
  if (x_in) check_argument("x", *x_in, f_in);
  EFFKERN_CHECK(y_in || x_in || q, "coupling: expected y, x or q beside f");
  EFFKERN_CHECK(!subtract || y_in, "coupling: subtract needs y");
  EFFKERN_CHECK(!keep || x_in, "coupling: keep needs x");
  EFFKERN_CHECK(!q || (0 <= *q && *q <= kFinest), "coupling: q must be from 0 to ", kFinest, ", got ", *q);

  const int64_t blank[1] = {0};
  const size_t as_scalar = 0, as_empty = 1;
  Tensor out = torch::stable::new_empty(f_in, f_in.sizes(), result_dtype(f_in, y_in, x_in, q.has_value()));
  Tensor kept = keep ? torch::stable::new_empty(f_in, f_in.sizes(), x_in->scalar_type())
                     : torch::stable::new_empty(f_in, {blank, as_empty});
  Tensor largest = torch::stable::new_empty(f_in, {blank, q ? as_scalar : as_empty}, ScalarType::Float);
  const Kernels& kernels = select_kernels();
  trace_record(kernels.path);

  const Argument f(f_in), y(y_in), x(x_in);
  Stretch whole = {};
  whole.f = f.operand;
  whole.y = y.operand;
  whole.x = x.operand;
  whole.out = {out.mutable_data_ptr(), kernel_dtype(out.scalar_type())};
  if (keep) whole.kept = {kept.mutable_data_ptr(), kernel_dtype(kept.scalar_type())};
  whole.alpha = static_cast<float>(alpha);
  whole.beta = static_cast<float>(beta);
  whole.sign = subtract ? -1.0f : 1.0f;
  whole.keep = static_cast<float>(keep.value_or(0.0));
  whole.grid = q.has_value();
  whole.up = std::ldexp(1.0f, static_cast<int>(q.value_or(0)));
  whole.down = 1.0f / whole.up;

  constexpr int64_t kStretch = 1 << 15;  // some ten microseconds
  const int64_t count = out.numel(), tasks = (count + kStretch - 1) / kStretch;
  std::vector<float> tops(static_cast<size_t>(tasks));
  parallel_tasks(tasks, [&](int64_t task, int64_t) {
    Stretch part = whole;
    part.begin = task * kStretch;
    part.end = std::min(count, part.begin + kStretch);
    tops[static_cast<size_t>(task)] = kernels.couple(part);
  });
  if (q) {
    float top = 0.0f;
    for (const float found : tops)
      if (!(found <= top)) {  // NaN included, which then stays
        top = found;
        if (found != found) break;
      }
    *static_cast<float*>(largest.mutable_data_ptr()) = top;
  }
  return {out, kept, largest};
}

}  // namespace
}  // namespace effkern::coupling

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("coupling", TORCH_BOX(&effkern::coupling::coupling_cpu)); }
