// What the launch of a GPU forward kernel is described by, and how large its grid is. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention/schedule_kernel.cuh"

namespace effkern::attention {

// Strides in elements, of a tensor with unit stride along the head dimension.
struct Strides {
  int64_t batch, head, token;
};

struct ForwardParams {
  const uint16_t *q, *k, *v;
  uint16_t* out;
  float* lse;
  const int *cu_seqlens_q, *cu_seqlens_k;  // null for a dense batch
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;
  int sequences;            // batch entries, or packed sequences
  int heads, group;         // query heads, and query heads per key head
  int queries, keys;        // per batch entry, or packed totals
  int head_dim, value_dim;  // multiples of 8
  int slots, section_rows;  // schedule_kernel.cuh
  float scale_log2;         // |scale| * log2(e)
  bool negate;              // the sign of scale
  bool causal, top_left;

  bool packed() const { return cu_seqlens_q != nullptr; }
};

// A negative scale moves its sign into q, so that the maximum of unscaled scores serves. A zero one becomes the
// smallest normal number, which keeps -inf * scale = -inf.
inline void set_scale(ForwardParams& p, double scale) {
  p.negate = scale < 0;
  p.scale_log2 = std::max(static_cast<float>(std::fabs(scale) * 1.4426950408889634), 1.17549435e-38f);
}

// Sets the schedule for tiles of `tile` queries and returns the number of blocks. A section holds the key heads whose
// keys and values take half of the L2 cache together.
inline int64_t plan_grid(ForwardParams& p, int tile, int64_t l2_bytes) {
  const int64_t rows = int64_t{p.packed() ? 1 : p.sequences} * p.heads;
  p.slots = p.packed() ? packed_slots(p.queries, p.sequences, tile) : (p.queries + tile - 1) / tile;
  const int64_t head_bytes = int64_t{p.keys} * (p.head_dim + p.value_dim) * 2;
  const int64_t key_heads = std::max<int64_t>(1, l2_bytes / 2 / std::max<int64_t>(head_bytes, 1));
  p.section_rows = static_cast<int>(std::min(rows, key_heads * p.group));
  return rows * p.slots;
}

}  // namespace effkern::attention
