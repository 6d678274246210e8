// Working memory of an op.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace effkern {

// A byte buffer from torch's allocator, so that profilers and memory limits see it.
struct Buffer {
  std::optional<torch::stable::Tensor> storage;
  char* data = nullptr;
  int64_t capacity = 0;

  // At least `bytes`; what was inside is lost where it has to grow.
  void reserve(int64_t bytes) {
    if (bytes <= capacity) return;
    capacity = bytes;
    const int64_t size[1] = {bytes + 64};
    storage = torch::stable::empty({size, 1}, torch::headeronly::ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(storage->mutable_data_ptr());
    data = reinterpret_cast<char*>((address + 63) / 64 * 64);
  }
};

inline int64_t round_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace effkern
