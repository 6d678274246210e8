// The decode op on NVIDIA GPUs, as `attention_decode_cuda`: checks, allocation, launches. The device code is in
// split_sm80_kernel.cuh and merge_kernel.cuh.
//
// Status: unverified on hardware. The op runs when it is asked for by name; automatic dispatch does not choose it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "attention_decode/checks.h"
#include "attention_decode/split_kernels.h"
#include "core/cuda/check.h"
#include "core/cuda/stream.h"
#include "core/operands.h"
#include "core/trace.h"

namespace effkern::attention_decode {
namespace {

constexpr const char* kOp = "attention_decode_cuda";

// In bytes of a 16-bit tensor. The stride of an axis of one element is never used and may be anything.
int64_t stride(const Tensor& t, int64_t axis) { return t.size(axis) > 1 ? t.stride(axis) * 2 : 0; }

// Rows are read 16 bytes at a time.
const char* aligned(const Tensor& t, const char* name) {
  bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t axis = 0; axis < 3; ++axis) fits = fits && stride(t, axis) % 16 == 0;
  EFFKERN_CHECK(fits, kOp, ": ", name, " must have rows that start on multiples of 16 bytes; pass ", name,
                ".contiguous()");
  return static_cast<const char*>(t.const_data_ptr());
}

Cache cache_of(const Tensor& t, const char* name) {
  const int64_t token = stride(t, 2);
  EFFKERN_CHECK(token >= 0 && token < kMostKeys, kOp, ": the rows of ", name, " are ", token,
                " bytes apart, expected less than 2^29");
  return {aligned(t, name), stride(t, 0), stride(t, 1), static_cast<uint32_t>(token)};
}

void check_features(const Sizes& s, ScalarType dtype, int major, int minor) {
  EFFKERN_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp,
                ": kernels exist for bfloat16 and float16, q is ", dtype_name(dtype));
  for (const auto& [name, dim] : {std::pair{"q", s.head_dim}, std::pair{"v_cache", s.value_dim}})
    EFFKERN_CHECK(dim % Features::kDimStep == 0 && dim <= Features::kMaxDim, kOp,
                  ": kernels take head dims that are multiples of ", Features::kDimStep, " up to ", Features::kMaxDim,
                  ", ", name, " has ", dim);
  EFFKERN_CHECK(10 * major + minor >= Features::kMinCapability, kOp, ": needs a GPU of compute capability ",
                Features::kMinCapability / 10, ".0 or newer, this one has ", major, ".", minor);
  for (int64_t size : {s.capacity, s.page, s.pages, s.batch, s.queries * s.heads_q})
    EFFKERN_CHECK(size < kMostKeys, kOp, ": capacity, pages, batch and rows must be below 2^29, got ", size);
}

void launch(const void* kernel, int64_t blocks, unsigned threads, unsigned shared_bytes, SplitParams& p,
            cudaStream_t stream) {
  EFFKERN_CHECK(blocks <= std::numeric_limits<int>::max(), kOp, ": too many rows for one launch (", blocks, " blocks)");
  if (shared_bytes > 48 << 10)  // more than every kernel may have
    cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), kOp,
                "cudaFuncSetAttribute");
  void* arguments[] = {&p};
  cuda::check(
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, shared_bytes, stream),
      kOp, "the kernel launch");
}

std::tuple<Tensor, Tensor> decode_cuda(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                       const Tensor& cache_seqlens, std::optional<Tensor> page_table,
                                       std::optional<double> scale, std::optional<std::vector<int64_t>> band_list,
                                       double softcap, std::optional<Tensor> sink_logits) {
  const Sizes s = check_arguments(q_in, k_in, v_in, cache_seqlens, page_table);
  const std::vector<int64_t> bands = band_list.value_or(std::vector<int64_t>{});
  const float factor = check_options(s, q_in, scale, bands, softcap, sink_logits);
  const int device = q_in.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  // Our own copy of the CUDA runtime keeps a current device of its own.
  cuda::check(cudaSetDevice(device), kOp, "cudaSetDevice");
  const auto attribute = [&](cudaDeviceAttr which) { return cuda::device_attribute(which, device, kOp); };
  check_features(s, q_in.scalar_type(), attribute(cudaDevAttrComputeCapabilityMajor),
                 attribute(cudaDevAttrComputeCapabilityMinor));
  using attention::unit_last_stride;
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const Tensor lengths = as_contiguous(cache_seqlens);
  const int64_t out_shape[4] = {s.batch, s.heads_q, s.queries, s.value_dim};
  Tensor out = torch::stable::new_empty(q, {out_shape, 4});
  Tensor lse = torch::stable::new_empty(q, {out_shape, 3}, ScalarType::Float);
  trace_record("attention_decode:cuda/sm80");
  if (lse.numel() == 0) return {out, lse};

  SplitParams p{};
  Tensor table, sinks;  // alive until the launches
  p.q = aligned(q, "q");
  p.q_batch_stride = stride(q, 0);
  p.q_head_stride = stride(q, 1);
  p.q_row_stride = stride(q, 2);
  p.k = cache_of(k, "k_cache");
  p.v = cache_of(v, "v_cache");
  p.lengths = lengths.const_data_ptr<int32_t>();
  if (s.paged) {
    table = as_contiguous(*page_table);
    p.page_table = table.const_data_ptr<int32_t>();
    p.table_stride = static_cast<int>(table.size(1));
  }
  if (sink_logits) {
    sinks = as_contiguous(*sink_logits);
    p.sinks = sinks.const_data_ptr();
    p.sinks_fp32 = sinks.scalar_type() == ScalarType::Float;
  }
  p.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.kv_heads = static_cast<int>(s.heads_kv);
  p.group = static_cast<int>(s.heads_q / s.heads_kv);
  p.queries = static_cast<int>(s.queries);
  p.query_divisor = divisor(p.queries);
  p.capacity = static_cast<int>(s.capacity);
  p.head_dim = static_cast<int>(s.head_dim);
  p.value_dim = static_cast<int>(s.value_dim);
  set_pages(p, static_cast<int>(s.pages), static_cast<int>(s.page));
  set_scores(p, factor, softcap);
  EFFKERN_CHECK(set_bands(p, bands.data(), bands.size()), kOp, ": kernels take masks of up to ", kMaxBands,
                " windows, got ", bands.size() / 3);

  const int dim = instance_dim(s.head_dim, s.value_dim), blocks_of_rows = row_blocks(dim, p.rows());
  const SplitKernels kernels = q.scalar_type() == ScalarType::BFloat16
                                   ? split_kernels_sm80<cuda::Bf16>(dim, blocks_of_rows)
                                   : split_kernels_sm80<cuda::Fp16>(dim, blocks_of_rows);
  const int64_t units = s.batch * s.heads_kv;
  const int64_t blocks = kernels.plan_grid(p, units, attribute(cudaDevAttrMultiProcessorCount),
                                           attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  const int64_t lines = partial_rows(p, units);
  Tensor partials;
  if (lines > 0) {
    const int64_t floats = lines * (s.value_dim + 2);
    partials = torch::stable::new_empty(q, {&floats, 1}, ScalarType::Float);
    p.values = static_cast<float*>(partials.mutable_data_ptr());
    p.tops = p.values + lines * s.value_dim;
  }
  const cudaStream_t stream = cuda::current_stream(device, kOp);
  launch(kernels.split, blocks, kernels.threads, kernels.shared_bytes, p, stream);
  if (lines > 0) launch(kernels.merge, units * p.rows(), MergeShape::kThreads, MergeShape::kSharedBytes, p, stream);
  return {out, lse};
}

}  // namespace
}  // namespace effkern::attention_decode

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, m) {
  m.impl("attention_decode_cuda", TORCH_BOX(&effkern::attention_decode::decode_cuda));
}
