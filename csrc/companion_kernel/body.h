// K[l] = c^T A^l b for companion matrices A: ones below the diagonal plus `a` in the last column. One channel a lane.
//
// The characteristic polynomial of A is z^d - sum_i a_i z^i, and A is a zero of it (Cayley-Hamilton), so that from l =
// d on the kernel continues itself:
//
//   K[l] = sum_m taps[m] K[l - 1 - m],  taps[m] = a[d - 1 - m]
//
// That is one product a number and component, a quarter of what x <- A x and c . x take, with the same error: each
// is a recurrence whose rounding errors answer to the same polynomial. Only the first d numbers come from the states.
//
// Backward, with G the gradient of K: g[l] = G[l] + sum_m taps[m] g[l + 1 + m] over l + 1 + m >= d is the same
// recurrence run from the end; for l >= d it is the adjoint of the line above, which gives the taps the gradient
// sum_l g[l] K[l - 1 - m], and for l < d it is what reaches the first d numbers, sum_l g[l] c^T A^l b, three Horner
// schemes.
#pragma once

#include "companion_kernel/kernel.h"
#include "companion_kernel/recurrence.h"

namespace effkern {
namespace EFFKERN_UNIT {

using companion_kernel::Backward;
using companion_kernel::Forward;
using companion_kernel::Shape;

// A kernel that decays below the normal range would slow every product down a hundredfold on x86: zero instead. Returns
// the mode of before. (Not a destructor's work: its cleanup would bring the C++ library's symbols into the unit.)
EFFKERN_INLINE unsigned flush_subnormals() {
#if defined(__x86_64__)
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040);
  return before;
#else
  return 0;
#endif
}

EFFKERN_INLINE void restore_mode([[maybe_unused]] unsigned mode) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(mode);
#endif
}

// Where the rows of a group of channels stand in its scratch.
struct Layout {
  int64_t order, start, chunk, history;  // start: how many numbers come from states
  int64_t used = 0;
  int64_t taps, a, b, c, walk, last, reached, window, waves, grad_taps, grad_a;

  EFFKERN_MEMBER int64_t take(int64_t rows) {
    const int64_t place = used;
    used += rows * kLanes;
    return place;
  }

  EFFKERN_MEMBER explicit Layout(const Shape& shape) : order(shape.order), start(min64(shape.order, shape.length)) {
    constexpr int64_t kChunk = 256;  // rows of a chunk and its history stay in the L1 cache up to order 256 or so
    chunk = round_up(max64(kChunk, order), kBlock);
    history = round_up(order, kStep);
    taps = take(2 * history + kBlock + kStep);
    a = take(order), b = take(order), c = take(order);
    walk = take(order + start);
    last = take(start);
    reached = take(round_up(start, kBlock));
    window = take(history + chunk + kBlock + kStep);
    waves = take(history + chunk);
    grad_taps = take(round_up(order, kBlock));
    grad_a = take(order);
  }
};

static void fill_zero(float* rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i) vstore(rows + i * kLanes, vzero());
}

// a, b and c of the group, and the taps with zeros behind them.
static void load_matrices(const Layout& at, const Shape& shape, int64_t first, const float* a, const float* b,
                          const float* c, float* scratch) {
  const int64_t d = at.order, lanes = min64(kLanes, shape.channels - first);
  to_rows<false>(a + first * d, d, lanes, d, scratch + at.a);
  to_rows<false>(b + first * d, d, lanes, d, scratch + at.b);
  to_rows<false>(c + first * d, d, lanes, d, scratch + at.c);
  to_rows<true>(a + first * d, d, lanes, d, scratch + at.taps);
  fill_zero(scratch + at.taps + d * kLanes, 2 * at.history + kBlock + kStep - d);
}

EFFKERN_INLINE Vec dot_rows(const float* x, const float* y, int64_t count) {
  Vec sum[4] = {vzero(), vzero(), vzero(), vzero()};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) sum[k] = vfma(vload(x + (i + k) * kLanes), vload(y + (i + k) * kLanes), sum[k]);
  for (; i < count; ++i) sum[0] = vfma(vload(x + i * kLanes), vload(y + i * kLanes), sum[0]);
  return vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3]));
}

// The states from x = b on, `start` of them: out[l] = c . x_l, or x_l's last component. Moving the start of x down by a
// row shifts its components.
template <bool kResponse>
static void walk_states(const Layout& at, float* scratch, float* out) {
  const int64_t d = at.order;
  float* x = scratch + at.walk + at.start * kLanes;
  const float *a = scratch + at.a, *b = scratch + at.b, *c = scratch + at.c;
  for (int64_t i = 0; i < d; ++i) vstore(x + i * kLanes, vload(b + i * kLanes));
  for (int64_t l = 0; l < at.start; ++l) {
    const Vec last = vload(x + (d - 1) * kLanes);
    vstore(out + l * kLanes, kResponse ? dot_rows(c, x, d) : last);
    x -= kLanes;
    vstore(x, vzero());
    for (int64_t i = 0; i < d; ++i) vstore(x + i * kLanes, vfma(vload(a + i * kLanes), last, vload(x + i * kLanes)));
  }
}

static void forward(const Forward& t) {
  const unsigned mode = flush_subnormals();
  const Layout at(t.shape);
  load_matrices(at, t.shape, t.first, t.a, t.b, t.c, t.scratch);
  const int64_t length = t.shape.length, lanes = min64(kLanes, t.shape.channels - t.first);
  float* out = t.out + t.first * length;
  float* chunk = t.scratch + at.waves + at.history * kLanes;
  if (at.history > at.start) fill_zero(t.scratch + at.waves, at.history - at.start);
  float* begun = chunk - at.start * kLanes;
  walk_states<true>(at, t.scratch, begun);
  from_rows(begun, lanes, at.start, out, length);
  for (int64_t l = at.start; l < length; l += at.chunk) {
    const int64_t count = min64(at.chunk, length - l);
    fill_zero(chunk, round_up(count, kBlock));
    run_recurrence(chunk, round_up(count, kBlock), t.scratch + at.taps, at.order);
    from_rows(chunk, lanes, count, out + l, length);
    memmove(t.scratch + at.waves, chunk + (count - at.history) * kLanes, at.history * kLanes * sizeof(float));
  }
  restore_mode(mode);
}

// g from the end down to l = d, a chunk at a time, newest row last, and what the taps get from it. Leaves g[d],
// g[d+1]... as the history before `chunk`.
static void backward_of_recurrence(const Backward& t, const Layout& at, int64_t lanes) {
  const int64_t d = at.order, length = t.shape.length;
  const float *grad_out = t.grad_out + t.first * length, *out = t.out + t.first * length;
  float *chunk = t.scratch + at.waves + at.history * kLanes, *window = t.scratch + at.window;
  fill_zero(t.scratch + at.waves, at.history);
  fill_zero(t.scratch + at.grad_taps, round_up(d, kBlock));
  for (int64_t end = length; end > at.start; end -= at.chunk) {
    const int64_t count = min64(at.chunk, end - at.start), begin = end - count;
    const int64_t padded = round_up(count, kBlock);
    to_rows<true>(grad_out + begin, length, lanes, count, chunk);
    fill_zero(chunk + count * kLanes, padded - count);
    run_recurrence(chunk, padded, t.scratch + at.taps, d);
    fill_zero(chunk + count * kLanes, padded - count);
    // window[s] = K[end - 2 - s]: g[end - 1 - j] meets K[end - 2 - j - m] at s = j + m
    const int64_t seen = count + d - 1;
    to_rows<true>(out + begin - d, length, lanes, seen, window);
    fill_zero(window + seen * kLanes, at.history + at.chunk + kBlock + kStep - seen);
    add_toeplitz<1>(t.scratch + at.grad_taps, d, window, chunk, padded);
    memmove(t.scratch + at.waves, chunk + (count - at.history) * kLanes, at.history * kLanes * sizeof(float));
  }
}

// Gradients of K[l] = c^T A^l b, l < start, where reached[p] is what K[start - 1 - p] gets.
static void backward_of_states(const Layout& at, float* scratch, float* grad_b, float* grad_c) {
  const int64_t d = at.order;
  const float *a = scratch + at.a, *b = scratch + at.b, *c = scratch + at.c;
  const float *last = scratch + at.last, *reached = scratch + at.reached;
  float* grad_a = scratch + at.grad_a;
  // grad_c = sum_l G[l] A^l b
  float* x = scratch + at.walk + at.start * kLanes;
  fill_zero(x, d);
  for (int64_t p = 0; p < at.start; ++p) {
    const Vec grad = vload(reached + p * kLanes), end = vload(x + (d - 1) * kLanes);
    x -= kLanes;
    vstore(x, vzero());
    for (int64_t i = 0; i < d; ++i) {
      const Vec sum = vfma(vload(a + i * kLanes), end, vload(x + i * kLanes));
      vstore(x + i * kLanes, vfma(grad, vload(b + i * kLanes), sum));
    }
  }
  for (int64_t i = 0; i < d; ++i) vstore(grad_c + i * kLanes, vload(x + i * kLanes));
  // grad_b = sum_l G[l] (A^T)^l c; on the way the gradients of the states, which give that of a
  x = scratch + at.walk;
  fill_zero(x, d);
  for (int64_t p = 0; p < at.start; ++p) {
    const Vec grad = vload(reached + p * kLanes), state = vload(last + (at.start - 1 - p) * kLanes);
    for (int64_t i = 0; i < d; ++i) {
      float* row = grad_a + i * kLanes;
      vstore(row, vfma(state, vload(x + i * kLanes), vload(row)));
    }
    const Vec end = dot_rows(a, x, d);
    x += kLanes;
    vstore(x + (d - 1) * kLanes, end);
    for (int64_t i = 0; i < d; ++i) vstore(x + i * kLanes, vfma(grad, vload(c + i * kLanes), vload(x + i * kLanes)));
  }
  for (int64_t i = 0; i < d; ++i) vstore(grad_b + i * kLanes, vload(x + i * kLanes));
}

static void backward(const Backward& t) {
  const unsigned mode = flush_subnormals();
  const Layout at(t.shape);
  load_matrices(at, t.shape, t.first, t.a, t.b, t.c, t.scratch);
  const int64_t d = at.order, length = t.shape.length, lanes = min64(kLanes, t.shape.channels - t.first);
  float *reached = t.scratch + at.reached, *grad_a = t.scratch + at.grad_a, *grad_taps = t.scratch + at.grad_taps;
  const int64_t padded = round_up(at.start, kBlock);
  backward_of_recurrence(t, at, lanes);
  to_rows<true>(t.grad_out + t.first * length, length, lanes, at.start, reached);
  fill_zero(reached + at.start * kLanes, padded - at.start);
  // K[d - 1 - p] reaches K[d + j] through taps[p + j]
  if (length > d)
    add_toeplitz<-1>(reached, d, t.scratch + at.taps, t.scratch + at.waves + (at.history - 1) * kLanes, at.history);
  for (int64_t i = 0; i < d; ++i) vstore(grad_a + i * kLanes, vload(grad_taps + (d - 1 - i) * kLanes));
  walk_states<false>(at, t.scratch, t.scratch + at.last);
  // b and c are read to the end: their gradients go where the chunks were.
  float *grad_b = t.scratch + at.waves, *grad_c = t.scratch + at.window;
  backward_of_states(at, t.scratch, grad_b, grad_c);
  from_rows(grad_a, lanes, d, t.grad_a + t.first * d, d);
  from_rows(grad_b, lanes, d, t.grad_b + t.first * d, d);
  from_rows(grad_c, lanes, d, t.grad_c + t.first * d, d);
  restore_mode(mode);
}

static int64_t scratch_bytes(const Shape& shape) { return Layout(shape).used * static_cast<int64_t>(sizeof(float)); }

static constexpr companion_kernel::Kernels kKernels = {"companion_kernel:cpu/" EFFKERN_UNIT_NAME,
                                                       "companion_kernel_backward:cpu/" EFFKERN_UNIT_NAME,
                                                       kLanes,
                                                       scratch_bytes,
                                                       forward,
                                                       backward};

}  // namespace EFFKERN_UNIT
}  // namespace effkern
