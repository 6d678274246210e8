// The merge ops on the CPU: checks, allocation, parallel loop. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_merge/kernel.h"
#include "core/check.h"
#include "core/cpu/isa.h"
#include "core/operands.h"
#include "core/parallel.h"
#include "core/trace.h"

namespace effkern::attention_merge {
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

bool same_shape(const Tensor& a, const Tensor& b, int64_t axes) {
  if (a.dim() < axes || b.dim() < axes) return false;
  for (int64_t axis = 0; axis < axes; ++axis)
    if (a.size(axis) != b.size(axis)) return false;
  return true;
}

void check_arguments(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses) {
  EFFKERN_CHECK(!outs.empty(), "attention_merge: outs is empty, expected at least one part");
  EFFKERN_CHECK(outs.size() == lses.size(), "attention_merge: there are ", outs.size(), " outs and ", lses.size(),
                " lses");
  const Tensor& first = outs[0];
  const ScalarType dtype = first.scalar_type();
  EFFKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                "attention_merge: outs must be float32, bfloat16 or float16");
  EFFKERN_CHECK(first.dim() >= 1, "attention_merge: outs must have at least one dimension");
  for (size_t k = 0; k < outs.size(); ++k) {
    EFFKERN_CHECK(outs[k].dim() == first.dim() && same_shape(outs[k], first, first.dim()), "attention_merge: outs[", k,
                  "] has shape ", shape_string(outs[k]), ", outs[0] has ", shape_string(first));
    EFFKERN_CHECK(lses[k].dim() == first.dim() - 1 && same_shape(lses[k], first, first.dim() - 1),
                  "attention_merge: lses[", k, "] has shape ", shape_string(lses[k]),
                  ", expected that of outs without the last dimension");
    EFFKERN_CHECK(outs[k].scalar_type() == dtype, "attention_merge: outs[", k, "] has another dtype than outs[0]");
    EFFKERN_CHECK(lses[k].scalar_type() == ScalarType::Float, "attention_merge: lses[", k, "] must be float32");
    EFFKERN_CHECK(outs[k].is_cpu() && lses[k].is_cpu(), "attention_merge: part ", k, " is on another device");
  }
}

// Contiguous tensors and the pointers to their data.
template <class T>
struct Parts {
  std::vector<Tensor> tensors;
  std::vector<T> data;

  explicit Parts(const std::vector<Tensor>& all) {
    for (const Tensor& t : all) {
      tensors.push_back(as_contiguous(t));
      data.push_back(static_cast<T>(tensors.back().data_ptr()));
    }
  }
};

// Stretches of rows worth a task.
template <class Body>
void over_rows(int64_t rows, const Body& body) {
  constexpr int64_t kStretch = 256;
  parallel_tasks((rows + kStretch - 1) / kStretch,
                 [&](int64_t task, int64_t) { body(task * kStretch, std::min(rows, (task + 1) * kStretch)); });
}

Tensor like(const Tensor& t) { return torch::stable::new_empty(t, t.sizes(), t.scalar_type()); }

std::tuple<Tensor, Tensor> merge_cpu(std::vector<Tensor> outs_in, std::vector<Tensor> lses_in) {
  check_arguments(outs_in, lses_in);
  const Kernels& kernels = select_kernels(outs_in[0].scalar_type());
  const Parts<const void*> outs(outs_in);
  const Parts<const float*> lses(lses_in);
  Tensor out = like(outs_in[0]), lse = like(lses_in[0]);
  trace_record(kernels.forward_path);
  const int64_t dim = out.size(out.dim() - 1), parts = static_cast<int64_t>(outs_in.size());
  void* out_data = out.mutable_data_ptr();
  float* lse_data = static_cast<float*>(lse.mutable_data_ptr());
  over_rows(lse.numel(), [&](int64_t begin, int64_t end) {
    kernels.forward({parts, dim, begin, end, outs.data.data(), lses.data.data(), out_data, lse_data});
  });
  return {out, lse};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> merge_backward_cpu(const Tensor& grad_out_in,
                                                                        std::optional<Tensor> grad_lse_in,
                                                                        std::vector<Tensor> outs_in,
                                                                        std::vector<Tensor> lses_in,
                                                                        const Tensor& out_in, const Tensor& lse_in) {
  check_arguments(outs_in, lses_in);
  const Tensor& first = outs_in[0];
  const auto fits = [&](const Tensor& t, const Tensor& wanted) {
    return t.dim() == wanted.dim() && same_shape(t, wanted, wanted.dim()) && t.scalar_type() == wanted.scalar_type() &&
           t.is_cpu();
  };
  EFFKERN_CHECK(fits(grad_out_in, first) && fits(out_in, first) && fits(lse_in, lses_in[0]) &&
                    (!grad_lse_in || fits(*grad_lse_in, lses_in[0])),
                "attention_merge_backward: grad_out, grad_lse, out or lse does not match the parts");
  const Kernels& kernels = select_kernels(first.scalar_type());
  const Parts<const void*> outs(outs_in);
  const Parts<const float*> lses(lses_in);
  const Tensor grad_out = as_contiguous(grad_out_in), out = as_contiguous(out_in);
  const Tensor lse = as_contiguous(lse_in);
  std::optional<Tensor> grad_lse;
  if (grad_lse_in) grad_lse = as_contiguous(*grad_lse_in);
  std::vector<Tensor> made_outs, made_lses;
  for (size_t k = 0; k < outs_in.size(); ++k) {
    made_outs.push_back(like(first));
    made_lses.push_back(like(lses_in[0]));
  }
  const Parts<void*> grad_outs(made_outs);
  const Parts<float*> grad_lses(made_lses);
  trace_record(kernels.backward_path);
  const int64_t dim = first.size(first.dim() - 1), parts = static_cast<int64_t>(outs_in.size());
  const float* grad_lse_data = grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr;
  over_rows(lse.numel(), [&](int64_t begin, int64_t end) {
    kernels.backward({parts, dim, begin, end, grad_out.const_data_ptr(), grad_lse_data, outs.data.data(),
                      lses.data.data(), out.const_data_ptr(), static_cast<const float*>(lse.const_data_ptr()),
                      grad_outs.data.data(), grad_lses.data.data()});
  });
  return {made_outs, made_lses};
}

}  // namespace
}  // namespace effkern::attention_merge

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("attention_merge", TORCH_BOX(&effkern::attention_merge::merge_cpu));
  m.impl("attention_merge_backward", TORCH_BOX(&effkern::attention_merge::merge_backward_cpu));
}
