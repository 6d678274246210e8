// Arguments of the Monarch ops: checks, the unit that serves them, and tensors as the units want them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "core/buffer.h"
#include "core/check.h"
#include "core/cpu/isa.h"
#include "core/parallel.h"
#include "monarch/kernel.h"

namespace effkern::monarch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& select_kernels(ScalarType dtype);

// Errors in the words of effkern/ops/_monarch_checks.py.
Shape check_monarch(const Tensor& x, const Tensor& w1, const Tensor& w2, const std::optional<Tensor>& bias);
Shape check_block_diag(const Tensor& x, const Tensor& w);
void check_grad_out(const char* op, const Tensor& grad_out, const Tensor& x, int64_t features);

// (tokens, features) with adjacent features; copies only what no view can express.
Tensor as_rows(const Tensor& t);

// An empty tensor of x's leading axes and `features`.
Tensor new_rows(const Tensor& x, int64_t features);

// An empty tensor like `like` in shape, of no elements where it is not wanted.
Tensor new_gradient(bool wanted, const Tensor& like);

inline Tokens tokens_of(const Tensor& rows, int64_t begin, int64_t count) {
  return {static_cast<char*>(rows.data_ptr()) + begin * rows.stride(0) * static_cast<int64_t>(rows.element_size()),
          rows.stride(0), count};
}

// The tokens of a call in tiles of the unit, of which the last may be smaller; or `even`, in tiles of about the same
// size, whole vectors but for the last, and in number a multiple of `even`.
struct Tiles {
  int64_t tokens, tile, lanes, vectors, count;
  bool even;

  Tiles(const Tensor& rows, const Kernels& kernels, int64_t multiple = 0)
      : tokens(rows.size(0)),
        tile(kernels.token_tile),
        lanes(kernels.lanes),
        vectors((tokens + lanes - 1) / lanes),
        count((tokens + tile - 1) / tile),
        even(multiple > 1) {
    if (even) count = std::min(vectors, (count + multiple - 1) / multiple * multiple);
  }
  int64_t begin(int64_t index) const { return std::min(tokens, even ? vectors * index / count * lanes : index * tile); }
  Tokens of(const Tensor& rows, int64_t index) const {
    return tokens_of(rows, begin(index), begin(index + 1) - begin(index));
  }
  int64_t bytes(int64_t features) const {
    return round_to_line(features * std::min(tile, vectors * lanes) * int64_t{sizeof(float)});
  }
};

// A factor as the unit wants it.
struct Factor {
  Tensor storage;
  Buffer room;
  Weights weights;

  // Not `prepared`: only read in place.
  Factor(const Tensor& t, const Kernels& kernels, bool often, bool transposed = false, bool prepared = true);
};
// From this many token tiles on, a widened copy costs less than widening each block for each tile.
constexpr int64_t kOften = 4;

// A bias in fp32.
struct Bias {
  Tensor storage;
  Buffer room;
  const float* data;

  Bias(const Tensor& t, const Kernels& kernels);
};

// Factors of up to this many bytes in fp32 fit a cache beside a token tile, which then passes both of them on one
// thread. Larger ones are read once for several tiles.
constexpr int64_t kSmallFactors = 3 << 20;

// fp32 sums of one factor's gradient, blocks x padded rows x padded columns: in the gradient itself where that is what
// it is, else in memory of their own.
struct Sums {
  int64_t blocks, rows, columns, padded_rows, stride;
  bool direct;
  Buffer buffer;
  float* data = nullptr;

  Sums(bool wanted, Tensor& gradient, const Tensor& factor, const Kernels& kernels);
  float* block(int64_t index) const { return data ? data + index * padded_rows * stride : nullptr; }
  void store(const Kernels& kernels, Tensor& gradient) const;
};

inline float* floats(const Buffer& buffer, int64_t bytes) { return reinterpret_cast<float*>(buffer.data + bytes); }

}  // namespace effkern::monarch
