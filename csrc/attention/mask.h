// A mask and the other terms of a score as plain data: what passes from the caller's arguments to tile lists and
// kernels.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace effkern {
namespace attention {

// Position p sees key j when j <= p + right and (j >= p - left or j < sink).
struct Band {
  int64_t left, right, sink;
};

// Positions fall into groups of `size`, the first of which begins at -offset; a position sees the keys of its group.
struct Groups {
  int64_t size, offset;
};

// What the queries of one head of one sequence see: every term has to agree. Query i stands at position i + shift.
// Tables that a mask does not have are null.
struct Mask {
  int64_t keys, shift;
  const Band* bands;
  int64_t band_count;
  const Groups* groups;
  int64_t groups_count;
  const uint8_t* layout;  // one byte for block x block pairs, by (query / block, key / block)
  int64_t layout_row, block;
  const int64_t* ids;                   // one a key; a query has the id of the key at its position
  const uint8_t* visible;               // one byte a pair
  int64_t visible_row, visible_column;  // 0: broadcast; a column stride is 0 or 1
};

// What happens to the scores of one head between q.k and the softmax:
//   z = softcap tanh(scale q.k / softcap) + bias - slope |position - key|.
// Weights may then be dropped. Strides count elements, 0 is broadcast.
struct Terms {
  const void* bias;
  Dtype bias_dtype;
  int64_t bias_row, bias_column;
  float softcap, slope;  // 0: none
  bool has_sink;
  float sink;  // one more logit in the denominator
  // Dropout: a weight stays, times `keep`, where its random word is at least `threshold`. keep 0: no dropout.
  float keep;
  uint32_t threshold;
  uint64_t seed, first_row;  // first_row: number of query 0 among all rows of the call
  float* grad_bias;          // may be null
  int64_t grad_bias_row;
  bool shaped;  // bias, softcap or slope: the softmax sees z, not scale q.k
};

}  // namespace attention
}  // namespace effkern
