#include "long_conv/operands.h"

#include <algorithm>
#include <cstring>

#include "core/operands.h"

namespace effkern::long_conv {
namespace {

bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t axis = 0;
  for (int64_t size : sizes)
    if (t.size(axis++) != size) return false;
  return true;
}

Tensor as_float(const Tensor& t) { return as_contiguous(as_dtype(t, ScalarType::Float)); }

}  // namespace

const Kernels& select_kernels(ScalarType dtype) {
  const Dtype kind = kernel_dtype(dtype);
#if defined(__x86_64__)
  if (isa_active() >= Isa::avx512) return kernels_avx512(kind);
  if (isa_active() == Isa::avx2) return kernels_avx2(kind);
#endif
  return kernels_scalar(kind);
}

Operands::Operands(const Tensor& u_in, const Tensor& k_in, const std::optional<Tensor>& spectrum_in,
                   const std::optional<Tensor>& skip_in, const std::optional<Tensor>& pre_in,
                   const std::optional<Tensor>& post_in, int64_t history_in, bool causal_in)
    : history(history_in),
      u(u_in),
      k(k_in),
      spectrum(spectrum_in),
      causal(causal_in) {
  const ScalarType dtype = u.scalar_type();
  EFFKERN_CHECK(is_fast(dtype), "long_conv: u must be float32, bfloat16 or float16, got ", dtype_name(dtype));
  EFFKERN_CHECK(u.dim() == 3, "long_conv: u must have shape (B, H, L), got ", shape_string(u));
  batches = u.size(0);
  channels = u.size(1);
  EFFKERN_CHECK(history >= 0 && history <= u.size(2), "long_conv: history must be between 0 and the ", u.size(2),
                " positions of u, got ", history);
  EFFKERN_CHECK(causal || history == 0, "long_conv: history must be 0 where taps look ahead, got ", history);
  EFFKERN_CHECK(!pre_in || history == 0, "long_conv: pre_gate cannot be given with a history");
  length = u.size(2) - history;
  EFFKERN_CHECK(u.size(2) <= kLongest, "long_conv: u may have up to ", kLongest, " positions, got ", u.size(2));
  taps = k.dim() >= 1 ? k.size(k.dim() - 1) : 0;
  EFFKERN_CHECK(causal ? has_shape(k, {channels, taps}) : has_shape(k, {channels, 2, taps}),
                "long_conv: k must have shape (", channels, causal ? ", Lk), got " : ", 2, Lk), got ", shape_string(k));
  EFFKERN_CHECK(taps >= 1, "long_conv: k has no taps");
  reach = std::min(taps, std::max<int64_t>(history + length, 1));
  const auto check = [&](const char* name, const std::optional<Tensor>& t, bool fits, bool any_float) {
    if (!t) return;
    EFFKERN_CHECK(fits, "long_conv: ", name, " has shape ", shape_string(*t), ", which does not fit u's ",
                  shape_string(u));
    const ScalarType kind = t->scalar_type();
    EFFKERN_CHECK(kind == dtype || (any_float && kind == ScalarType::Float), "long_conv: ", name,
                  " must have u's dtype", any_float ? " or float32" : "");
    EFFKERN_CHECK(t->is_cpu(), "long_conv: ", name, " is on another device than u");
  };
  check("k", k, true, true);
  check("skip", skip_in, !skip_in || has_shape(*skip_in, {channels}), true);
  check("pre_gate", pre_in, !pre_in || has_shape(*pre_in, {batches, channels, length}), false);
  check("post_gate", post_in, !post_in || has_shape(*post_in, {batches, channels, length}), false);

  kernels = &select_kernels(dtype);
  const Choice choice = choose(length, reach, causal, kernels->lanes);
  method = choice.method;
  plan = nullptr;
  if (spectrum) {
    const Tensor& s = *spectrum;
    EFFKERN_CHECK(s.is_cpu() && s.scalar_type() == ScalarType::Float && s.dim() == 2 && s.is_contiguous() &&
                      s.size(0) == channels && s.size(1) > 16,
                  "long_conv: spectrum must be what long_conv_spectrum returned for this k");
    const int64_t size = (s.size(1) - 16) / 2;
    EFFKERN_CHECK(size >= taps && (causal || size >= length), "long_conv: spectrum was prepared for at most ", size,
                  " positions, u has ", length, " and k ", taps);
    EFFKERN_CHECK(size == smallest_size(size, kernels->lanes), "long_conv: spectrum has ", size,
                  " numbers a channel, which is not a size of the CPU level in use");
    if (channels > 0) {
      float mark[16];
      write_mark(mark, *this);
      const float* found = static_cast<const float*>(s.const_data_ptr()) + 2 * size;
      EFFKERN_CHECK(found[0] == mark[0], "long_conv: spectrum was prepared on another CPU level");
      EFFKERN_CHECK(memcmp(found, mark, sizeof mark) == 0,
                    "long_conv: spectrum was prepared for another kernel: other taps, or another value of causal");
    }
    if (method == kTransform) plan = &plan_for(size, kernels->lanes);
  } else if (method == kTransform) {
    plan = &plan_for(choice.size, kernels->lanes);
  }
  u = adjacent(u);
  k = as_float(k);
  if (skip_in) skip = as_float(*skip_in);
  if (pre_in) pre_gate = adjacent(*pre_in);
  if (post_in) post_gate = adjacent(*post_in);
}

Tensor adjacent(const Tensor& t) { return t.stride(2) == 1 || t.size(2) <= 1 ? t : as_contiguous(t); }

void write_mark(float* mark, const Operands& call) {
  std::fill(mark, mark + 16, 0.0f);
  mark[0] = static_cast<float>(call.kernels->lanes);
  mark[1] = call.causal ? 1.0f : 2.0f;
  memcpy(mark + 2, &call.taps, sizeof call.taps);
}

Taps Operands::channel_taps(int64_t channel) const {
  const float* first = static_cast<const float*>(k.const_data_ptr()) + channel * (causal ? 1 : 2) * taps;
  return {first, causal ? nullptr : first + taps, reach};
}

const float* Operands::channel_spectrum(int64_t channel) const {
  return spectrum ? static_cast<const float*>(spectrum->const_data_ptr()) + channel * spectrum->size(1) : nullptr;
}

float Operands::channel_skip(int64_t channel) const {
  return skip ? static_cast<const float*>(skip->const_data_ptr())[channel] : 0.0f;
}

Signal channel_of(const std::optional<Tensor>& t, int64_t channel) {
  if (!t) return {nullptr, 0};
  return {static_cast<char*>(t->data_ptr()) + channel * t->stride(1) * static_cast<int64_t>(t->element_size()),
          t->stride(0)};
}

int64_t batch_groups(int64_t batches, int64_t channels) {
  constexpr int64_t kTasks = 64;
  if (channels >= kTasks || channels == 0) return 1;
  return std::clamp<int64_t>(batches / 4, 1, kTasks / channels);
}

}  // namespace effkern::long_conv
