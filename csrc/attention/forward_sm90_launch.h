// What the launch of the sm_90a forward kernel is described by. No torch, no CUDA runtime.
#pragma once

#include "attention/forward_launch.h"
#include "attention/key_steps_kernel.cuh"
#include "core/cuda/ptx_sm90.cuh"

namespace effkern::attention {

// Which tiles a kernel instance works in: 64 queries a warpgroup, three warpgroups where registers suffice.
template <int kHeadDim_, int kKeys_>
struct ForwardSm90Shape {
  static constexpr int kHeadDim = kHeadDim_, kKeys = kKeys_;
  static constexpr int kGroups = kHeadDim <= 64 ? 3 : 2;
  static constexpr int kQueries = 64 * kGroups;
  static constexpr int kThreads = (kGroups + 1) * cuda::kWarpgroup;
  static constexpr int kStages = 2;
};

// Tile lists of a block-sparse layout, from attention_lists.py.
struct StoredLists {
  const int *entries, *full, *total;  // null: none
  int batch_lines, head_lines;        // lists between batch entries and between heads; 0: shared
  int most;                           // entries a list
};

// One byte for `block` x `block` pairs.
struct Layout {
  const uint8_t* data;
  int64_t batch, head, row;
  int block;
};

struct ForwardSm90Params {
  cuda::TensorMap q_map, k_map, v_map, out_map;
  ForwardParams base;
  Window window;
  Window second_half;  // of the query heads: groups of half the heads are shifted
  StoredLists lists;
  Layout layout;
  int64_t tasks;
  int blocks;  // of the grid
};

// The windows of both halves of the heads, of a mask folded by effkern/ops/_attention_cuda.py. Groups are shifted for
// the second one.
inline void set_window(ForwardSm90Params& p, int64_t left, int64_t right, int64_t sink, int64_t group) {
  const auto clamp = [](int64_t end) { return static_cast<int>(std::clamp<int64_t>(end, -kUnbounded, kUnbounded)); };
  p.window = p.second_half = {clamp(left), clamp(right), clamp(sink), clamp(group), 0};
  p.second_half.group_shift = p.window.group / 2;
}

// Sets the schedule for a device; the grid is p.blocks.
inline void plan_forward_sm90(ForwardSm90Params& p, int tile_queries, int multiprocessors, int64_t l2_bytes) {
  p.tasks = plan_grid(p.base, tile_queries, l2_bytes);
  p.blocks = static_cast<int>(std::min<int64_t>(p.tasks, multiprocessors));
}

// The instance for a head dimension: the padded width and the keys a tile.
struct ForwardSm90Choice {
  int head_dim, keys;
};

// More keys a tile keep the tensor cores busier; where tiles are masked, smaller ones waste less.
constexpr ForwardSm90Choice choose_forward_sm90(int head_dim, int value_dim, bool masked) {
  const int widest = at_least(head_dim, value_dim);
  if (widest <= 64) return {64, 128};
  if (widest <= 96) return {96, 128};
  if (widest <= 128) return {128, masked ? 128 : 176};
  return {256, 80};
}

}  // namespace effkern::attention
