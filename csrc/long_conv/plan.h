// How a convolution of a given size is computed: its passes and their tables.
#pragma once

#include <stdint.h>

#include "core/cpu/fft_tables.h"

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

// The smallest sizes are lanes^2 times a product of 2, 3, 4, 5, 8 and 16.
int64_t smallest_size(int64_t length, int64_t lanes);

// The blocks in which `length` outputs are computed with `taps` taps. One block holds everything, or causal
// convolutions go block by block, each also seeing the block before.
int64_t block_size(int64_t length, int64_t taps, bool one_block, int64_t lanes);

// Shared by all calls, made once for each size.
const Plan& plan_for(int64_t size, int64_t lanes);

}  // namespace long_conv
}  // namespace effkern
