// Masks and tensor maps of a call as the tests of the sm_90a kernels pass them through ctypes.
#pragma once

#include "attention/forward_sm90_launch.h"
#include "attention_call.h"

// Masks and schedule of a call, beside what attention_call.h has.
struct Masks {
  int64_t left, right, sink, group;
  const uint8_t* layout;
  int64_t layout_batch, layout_head, layout_row;
  int block;
  effkern::attention::StoredLists lists;
  int multiprocessors;
  int head_dim, keys;  // the instance
};

inline void set_masks(effkern::attention::ForwardSm90Params& p, const Masks& masks) {
  set_window(p, masks.left, masks.right, masks.sink, masks.group);
  p.layout = {masks.layout, masks.layout_batch, masks.layout_head, masks.layout_row, masks.block};
  p.lists = masks.lists;
}

// As tensor_map.h makes it: an axis of one element, or a packed batch, has size 1.
inline effkern::cuda::TensorMap map_of(const Tensor& t, int batch, int heads, int tokens, int dim, int rows,
                                       int columns) {
  using namespace effkern;
  cuda::TensorMap map{};
  map.data = static_cast<char*>(t.data);
  const int64_t sizes[4] = {dim, tokens, heads, batch}, strides[4] = {1, t.token, t.head, t.batch};
  for (int axis = 0; axis < 4; ++axis) map.size[axis] = sizes[axis], map.stride[axis] = strides[axis] * 2;
  map.box_rows = rows;
  map.box_columns = columns;
  map.swizzle = columns == 64 ? cuda::Swizzle::k128B : cuda::Swizzle::k64B;
  return map;
}
