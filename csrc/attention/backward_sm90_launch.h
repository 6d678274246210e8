// What the launches of the sm_90a backward kernels are described by. No torch, no CUDA runtime.
//
// Three kernels in order: row terms; gradients of keys and values; gradient of queries, either computed anew or, where
// the second kernel has added it up, only rounded.
#pragma once

#include "attention/forward_sm90_launch.h"
#include "attention/query_steps_kernel.cuh"

namespace effkern::attention {

// The kernel that keeps keys and walks over queries. Two warpgroups have 64 keys each; with 256 columns the gradients
// of 64 keys fill the registers of two, which then split the columns. With kAddsQueries it also adds up dQ.
template <int kHeadDim_, int kQueries_, bool kAddsQueries_ = false>
struct BackwardSm90KeyShape {
  static constexpr bool kAddsQueries = kAddsQueries_;
  static constexpr int kHeadDim = kHeadDim_, kQueries = kQueries_;
  static constexpr int kGroups = 2;
  static constexpr int kColumnParts = kHeadDim > 128 ? 2 : 1, kColumns = kHeadDim / kColumnParts;
  static constexpr int kKeyTiles = kGroups / kColumnParts, kKeys = 64 * kKeyTiles;
  static constexpr int kThreads = (kGroups + 1) * cuda::kWarpgroup;
  static constexpr int kStages = 2;
  static_assert(!kAddsQueries || (kQueries == 64 && kColumnParts == 1 && kHeadDim % 64 == 0));
};

// The kernel that keeps queries and walks over keys, as the forward does.
template <int kHeadDim_, int kKeys_>
struct BackwardSm90QueryShape {
  static constexpr int kHeadDim = kHeadDim_, kKeys = kKeys_;
  static constexpr int kGroups = 2;
  static constexpr int kQueries = 64 * kGroups;
  static constexpr int kThreads = (kGroups + 1) * cuda::kWarpgroup;
  static constexpr int kKeyStages = 2, kValueStages = kHeadDim > 128 ? 1 : 2;  // what shared memory holds
};

// dQ of 64 queries while it is added up: two halves of the columns, each in the order of a warpgroup's registers.
constexpr int query_part_floats(int padded_head_dim) { return 64 * padded_head_dim / 2; }
constexpr int query_tile_floats(int padded_head_dim) { return 2 * query_part_floats(padded_head_dim); }

// One of these a kernel: maps, lists and schedules differ, the rest is the same.
struct BackwardSm90Params {
  // The forward's inputs and results; `lists`, `tasks`, `blocks`, slots and sections are those of the kernel launched,
  // boxes of maps have as many rows as its tiles. out_map is not used.
  ForwardSm90Params call;
  cuda::TensorMap grad_out_map;
  const uint16_t* grad_out;
  const float* grad_lse;  // null: none
  Strides grad_out_strides, grad_lse_strides;
  float scale, scale_log2;  // with their sign
  // Workspace: `row_slots` tiles a head, each lse in base 2 of `row_tile` queries and then their delta. Rows that see
  // nothing or lie beyond their sequence have inf and 0: their probabilities become zero.
  float* rows;
  int row_slots, row_tile;
  // Workspace of the variant that adds up dQ, null for the other: query_tile_floats of every tile of row terms.
  float* query_sums;
  int query_sums_tile;
  float* delta;  // rowsum(grad_out * out) - grad_lse by token
  uint16_t *grad_q, *grad_k, *grad_v;
  Strides delta_strides, grad_q_strides, grad_k_strides, grad_v_strides;
};

// The instances for a head dimension: its padded width, and the tiles of the two kernels.
struct BackwardSm90Choice {
  int head_dim, queries, keys;  // query tile of the first, key tile of the second
};

constexpr BackwardSm90Choice choose_backward_sm90(int head_dim, int value_dim) {
  const int widest = at_least(head_dim, value_dim);
  if (widest <= 64) return {64, 96, 128};
  if (widest <= 96) return {96, 80, 128};
  if (widest <= 128) return {128, 64, 128};
  return {256, 64, 64};
}

// The query tile of the variant that adds up dQ; 0: there is none.
constexpr int adding_queries_sm90(int padded_head_dim) {
  return padded_head_dim == 64 || padded_head_dim == 128 ? 64 : 0;
}

inline void set_scale(BackwardSm90Params& p, double scale) {
  p.scale = static_cast<float>(scale);
  p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
}

// Row terms: sets the shape of the workspace, rows_floats() of it, and returns the grid. Rounding dQ has the same.
inline int64_t plan_rows_sm90(BackwardSm90Params& p, int tile_queries) {
  const ForwardParams& b = p.call.base;
  p.row_tile = tile_queries;
  p.row_slots =
      b.packed() ? packed_slots(b.queries, b.sequences, tile_queries) : (b.queries + tile_queries - 1) / tile_queries;
  return int64_t{b.packed() ? 1 : b.sequences} * b.heads * p.row_slots;
}

inline int64_t rows_floats(const BackwardSm90Params& p) {
  const ForwardParams& b = p.call.base;
  return int64_t{b.packed() ? 1 : b.sequences} * b.heads * p.row_slots * p.row_tile * 2;
}

// Gradients of keys and values: sets the schedule and returns the grid, one block a key tile of a key head. A section
// holds the key heads whose queries and gradients take half of the L2 cache together.
inline int64_t plan_keys_sm90(BackwardSm90Params& p, int tile_keys, int64_t l2_bytes) {
  ForwardParams& b = p.call.base;
  const int64_t key_heads = int64_t{b.packed() ? 1 : b.sequences} * (b.heads / b.group);
  b.slots = b.packed() ? packed_slots(b.keys, b.sequences, tile_keys) : (b.keys + tile_keys - 1) / tile_keys;
  const int64_t bytes = int64_t{b.queries} * b.group * (b.head_dim + b.value_dim) * 2;
  b.section_rows =
      static_cast<int>(std::min(key_heads, std::max<int64_t>(1, l2_bytes / 2 / std::max<int64_t>(bytes, 1))));
  return key_heads * b.slots;
}

// Gradient of queries: the forward's schedule; the grid is p.call.blocks.
inline void plan_queries_sm90(BackwardSm90Params& p, int tile_queries, int multiprocessors, int64_t l2_bytes) {
  plan_forward_sm90(p.call, tile_queries, multiprocessors, l2_bytes);
}

}  // namespace effkern::attention
