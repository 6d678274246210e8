// What the forward and the backward op of sm_90a share: views of tensors for the copy engine, layouts and their lists.
#pragma once

#include "attention/cuda_arguments.h"
#include "attention/forward_sm90_launch.h"
#include "core/cuda/tensor_map.h"

namespace effkern::attention {

inline void check_sm90(const char* op, int device) {
  const int major = cuda::device_attribute(cudaDevAttrComputeCapabilityMajor, device, op);
  EFFKERN_CHECK(major == 9, op, ": needs a GPU of compute capability 9.0, this one has ", major, ".x");
}

inline cuda::TensorView view_of(const Tensor& t, const Strides& strides, bool packed) {
  const int64_t head = packed ? 0 : 1;
  return {t.const_data_ptr(),
          {t.size(head + 2), t.size(head + 1), t.size(head), packed ? 1 : t.size(0)},
          {1, strides.token, strides.head, strides.batch}};
}

// Lists made by effkern/_triton/attention_lists.py, (B or 1, Hq or 1, tiles, most) and (B or 1, Hq or 1, tiles).
inline StoredLists stored_lists(const std::optional<Tensor>& entries, const std::optional<Tensor>& full,
                                const std::optional<Tensor>& total) {
  if (!entries || !full || !total) return {};
  const int64_t heads = entries->size(1);
  return {entries->const_data_ptr<int32_t>(),
          full->const_data_ptr<int32_t>(),
          total->const_data_ptr<int32_t>(),
          entries->size(0) > 1 ? static_cast<int>(heads) : 0,
          heads > 1 ? 1 : 0,
          static_cast<int>(entries->size(3))};
}

// A block-sparse layout (B or 1, Hq or 1, ., .) with the lists of its query tiles, or nothing.
struct LayoutOnDevice {
  Tensor bytes;  // keeps alive what `layout` points to
  Layout layout{};
  StoredLists lists{};

  LayoutOnDevice(const char* op, const Geometry& g, const std::optional<Tensor>& given, int64_t block,
                 const std::optional<Tensor>& entries, const std::optional<Tensor>& full,
                 const std::optional<Tensor>& total) {
    EFFKERN_CHECK(given.has_value() == (entries.has_value() && full.has_value() && total.has_value()), op,
                  ": layout comes with its tile lists");
    if (!given) return;
    EFFKERN_CHECK(
        !g.packed && given->scalar_type() == ScalarType::Bool && given->dim() == 4 && block >= 16 && block % 16 == 0,
        op, ": layout must be bool (B or 1, Hq or 1, ., .) of blocks of a multiple of 16, without cu_seqlens");
    bytes = torch::stable::contiguous(*given);
    const auto stride = [&](int64_t axis) { return bytes.size(axis) > 1 ? bytes.stride(axis) : 0; };
    layout = {static_cast<const uint8_t*>(bytes.const_data_ptr()), stride(0), stride(1), bytes.size(3),
              static_cast<int>(block)};
    lists = stored_lists(entries, full, total);
  }
};

}  // namespace effkern::attention
