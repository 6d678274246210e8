// How a convolution of a given size is computed: its passes and their tables.
#pragma once

#include <stdint.h>

#include "core/cpu/fft_tables.h"
#include "core/export.h"

namespace effkern {
namespace long_conv {

// A ring x^size = i, as `rows` rows of `columns` numbers. Transforms down the columns make the rows independent of each
// other; then every row is transformed, multiplied and transformed back while it is in the cache.
//
// A size that fits the cache is `whole`: the first pass of `inner` makes the rows, of which each is a block of the
// ring. Larger sizes take `tile` columns at a time through the passes of `outer`, in a small buffer, and turn number j
// of row p by turn_low[p][j % tile] turn_high[j / tile][p], which makes every row a ring x^columns = i of its own: one
// small set of tables serves them all.
struct Plan {
  int64_t size, rows, columns, tile;
  int64_t row_stride;  // of the rows in memory, in elements: not a power of two where there are many
  bool whole;
  FftRing outer, inner;
  const float* turn_low;   // (rows, tile), complex by lanes
  const float* turn_high;  // (columns / tile, rows), complex numbers
};

// Ways to compute a channel. Only the transform has taps that look ahead.
enum Method : int { kTransform, kFewOutputs, kFewTaps };

// How a call goes: the method, and the size of a transform's ring. `length` outputs are computed in one block, or,
// where that is less work, in blocks that also see the block before; those need causal taps.
struct Choice {
  Method method;
  int64_t size;
};
EFFKERN_API Choice choose(int64_t length, int64_t taps, bool causal, int64_t lanes);

// The ring of the transform, whatever the method. The smallest that holds `length` numbers is lanes^2 times 1, 3, 5 or
// 15 times a power of two.
int64_t transform_size(int64_t length, int64_t taps, bool causal, int64_t lanes);
int64_t smallest_size(int64_t length, int64_t lanes);

// Shared by all calls, made once for each size.
EFFKERN_API const Plan& plan_for(int64_t size, int64_t lanes);

}  // namespace long_conv
}  // namespace effkern
