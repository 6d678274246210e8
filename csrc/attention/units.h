// What the forward and the backward op on the CPU share: kernels, operands, and the (sequence, kv head) units of work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "attention/checks.h"
#include "attention/kernel.h"
#include "core/buffer.h"
#include "core/cpu/isa.h"
#include "core/parallel.h"

namespace effkern::attention {

// Packed operands of the units in flight: enough units to feed the threads, few enough that what is packed is still in
// cache when it is read. The backward pass reads its packed queries once a key tile and gains 10 to 20 % from less.
constexpr int64_t kForwardBudget = int64_t{32} << 20, kBackwardBudget = int64_t{4} << 20;

inline const Kernels& select_kernels(ScalarType dtype) {
  const Isa level = isa_active();
  const Dtype kind = kernel_dtype(dtype);
#if defined(__x86_64__)
  if (kind == Dtype::bf16 && level == Isa::amx) return kernels_amx();
  if (kind == Dtype::bf16 && level == Isa::avx512_bf16) return kernels_avx512_bf16();
  if (level >= Isa::avx512) return kernels_avx512(kind);
  if (level == Isa::avx2) return kernels_avx2(kind);
#endif
  return kernels_scalar(kind);
}

inline Tensor empty_like_shape(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

// Element offsets of one operand: data + batch * batch_stride + head * head_stride + row * row_stride.
struct Operand {
  char* data;
  int64_t batch_stride, head_stride, row_stride, element;

  Operand(const Tensor& t, bool packed)
      : data(static_cast<char*>(t.data_ptr())),
        batch_stride(packed ? 0 : t.stride(0)),
        head_stride(t.stride(packed ? 0 : 1)),
        row_stride(t.stride(packed ? 1 : 2)),
        element(static_cast<int64_t>(t.element_size())) {}

  char* at(int64_t batch, int64_t head, int64_t row) const {
    return data + element * (batch * batch_stride + head * head_stride + row * row_stride);
  }
  Rows rows(int64_t batch, int64_t head, int64_t row) const { return {at(batch, head, row), row_stride}; }
};

// One (sequence, kv head); `batch` indexes the dense batch axis.
struct Unit {
  int64_t sequence, batch, kv_head;
  const Sequence* range;
};

inline std::vector<Unit> list_units(const Geometry& g, const std::vector<Sequence>& sequences) {
  std::vector<Unit> units;
  for (size_t s = 0; s < sequences.size(); ++s)
    for (int64_t head = 0; head < g.heads_kv; ++head)
      units.push_back({static_cast<int64_t>(s), g.packed ? 0 : static_cast<int64_t>(s), head, &sequences[s]});
  return units;
}

// Units [begin, end) processed together: at least one per thread, then as many as the budget holds.
template <class Bytes>
size_t block_end(const std::vector<Unit>& units, size_t begin, int64_t budget, const Bytes& bytes) {
  int64_t total = 0;
  size_t end = begin;
  while (end < units.size()) {
    total += bytes(units[end]);
    const bool enough_for_threads = end - begin >= static_cast<size_t>(thread_count());
    if (enough_for_threads && total > budget) break;
    ++end;
  }
  return end;
}

// Packs the keys of a block of units in parallel, a stretch of kPackStretch keys a task.
inline void pack_key_block(const Kernels& kernels, const Problem& problem, const std::vector<Unit>& units, size_t begin,
                           size_t end, const Operand& k, const Operand& v, bool backward, char* packed,
                           const std::vector<int64_t>& offsets) {
  constexpr int64_t kPackStretch = 1024;
  static_assert(kPackStretch % 128 == 0, "stretches must end on key tiles");
  std::vector<std::pair<size_t, int64_t>> tasks;
  for (size_t u = begin; u < end; ++u)
    if (kernels.key_bytes(problem, units[u].range->keys, backward) > 0)
      for (int64_t key = 0; key < units[u].range->keys; key += kPackStretch) tasks.emplace_back(u, key);
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t task, int64_t) {
    const auto [u, key] = tasks[task];
    const Unit& unit = units[u];
    kernels.pack_keys({problem, k.rows(unit.batch, unit.kv_head, unit.range->key_begin),
                       v.rows(unit.batch, unit.kv_head, unit.range->key_begin), unit.range->keys, key,
                       std::min(key + kPackStretch, unit.range->keys), backward, packed + offsets[u - begin]});
  });
}

}  // namespace effkern::attention
