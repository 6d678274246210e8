// Working memory of an op.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace effkern {

// Asks for huge pages under fresh memory of 16 MiB and more, where the system leaves that to programs: most of the time
// of writing to it for the first time goes into mapping it page by page. Half-used huge pages are then little beside
// it.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (bytes >= int64_t{1} << 24 && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

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
    prefer_huge_pages(data, bytes);
  }
};

inline int64_t round_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace effkern
