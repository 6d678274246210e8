// What passes between the long convolutions (torch side) and the ISA units (raw pointers only).
#pragma once

#include "core/dtype.h"
#include "long_conv/plan.h"

namespace effkern {
namespace long_conv {

// One channel of a (batch, channel, position) tensor in the caller's dtype; positions are adjacent.
struct Signal {
  void* data;  // of batch 0; null where there is none
  int64_t batch_stride;
};

// The taps of a channel; `anti` has those that look ahead, or is null.
struct Taps {
  const float* causal;
  const float* anti;
  int64_t count;
};

// Whoever works on a channel: run() calls body(context, begin, end, slot) for pieces that make up [0, count), at the
// same time where there are several slots. The steps of a large transform share their work out so.
struct Team {
  int64_t slots;
  void (*run)(const Team& team, int64_t count, void (*body)(void* context, int64_t begin, int64_t end, int64_t slot),
              void* context);
};

struct Forward {
  const Plan* plan;
  const Team* team;
  Taps taps;
  const float* spectrum;  // of the channel, or null: made from the taps
  float skip;
  Signal u, pre_gate, post_gate, out;
  int64_t batch_begin, batch_end;
  int64_t history, length;  // inputs before the outputs, and outputs
  void* scratch;
};

// Gradients that nobody wants are null. grad_taps and grad_skip get the sums over the batches of the task.
struct Backward {
  const Plan* plan;
  const Team* team;
  Taps taps;
  const float* spectrum;
  float skip;
  Signal grad_out, u, pre_gate, post_gate;
  Signal grad_u, grad_pre, grad_post;
  float* grad_causal;
  float* grad_anti;
  float* grad_skip;
  int64_t batch_begin, batch_end;
  int64_t history, length;
  void* scratch;
};

// Plan and spectrum are those of a transform; other methods do without.
struct Kernels {
  const char* forward_path;
  const char* backward_path;
  int64_t lanes;
  // 2 plan.size floats, in the unit's own order, divided by the size; with the scratch of a forward transform.
  void (*spectrum)(const Plan&, const Team&, const Taps&, float* target, void* scratch);
  struct {
    int64_t (*scratch_floats)(const Plan*, const Taps&, bool backward, int64_t slots);
    void (*forward)(const Forward&);
    void (*backward)(const Backward&);
  } methods[3];  // by Method
};

const Kernels& kernels_scalar(Dtype dtype);
const Kernels& kernels_avx2(Dtype dtype);
const Kernels& kernels_avx512(Dtype dtype);

}  // namespace long_conv
}  // namespace effkern
