// What passes between the short convolution (torch side) and the ISA units (raw pointers only).
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace effkern {
namespace short_conv {

constexpr int64_t kMaxTaps = 256;
// Calls of up to this many positions, decoding above all, go row by row in scalar code and expect a contiguous x.
constexpr int64_t kFewPositions = 4;

struct Shape {
  int64_t batch, channels, length, taps;
};

// A (B, H, L) tensor whose positions are adjacent; strides in elements.
struct Rows {
  const void* data;
  int64_t batch, channel;
};

// What both directions read. `past` (B, H, taps - 1), contiguous, are the inputs before x: of x's dtype or `past_fp32`,
// null for zeros. Weights (H, taps) and bias (H, or null) are contiguous fp32.
struct Inputs {
  Shape shape;
  Rows x;
  const void* past;
  bool past_fp32;
  const float* weight;
  const float* bias;
  bool silu;
};

// Rows [begin, end) of out (B H, L), contiguous.
struct Forward {
  Inputs in;
  int64_t begin, end;
  void* out;
  float* scratch;
};

// One channel over the batches [begin, end), in their order. What is null is not computed.
struct Backward {
  Inputs in;
  Rows grad_out;
  int64_t channel, begin, end;
  void* grad_x;     // (B, H, L), contiguous
  void* grad_past;  // like past
  float* sums;      // taps + 1 numbers: the gradients of the channel's weights, then of its bias
  float* scratch;
};

struct Kernels {
  const char* forward_path;
  const char* backward_path;
  int64_t (*scratch_floats)(int64_t taps);
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*widen)(const void* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, void* to);
};

const Kernels& kernels_scalar(Dtype dtype);
const Kernels& kernels_avx2(Dtype dtype);
const Kernels& kernels_avx512(Dtype dtype);

}  // namespace short_conv
}  // namespace effkern
