// Gradients of the convolution of a channel. The spectrum of the gradient of the taps is summed over blocks and batches
// before it is transformed back: three transforms a sequence, and one for the taps of all of them.
#pragma once

#include "long_conv/body.h"

namespace effkern {
namespace EFFKERN_UNIT {

// sum_t g_t x_t, in float32 over stretches of 256 and in float64 over those.
template <class T>
static double inner_product(const Team& team, const Gated<T>& g, const Gated<T>& x, int64_t history) {
  constexpr int64_t kPiece = 16384, kPieces = 64;
  double total = 0.0;
  for (int64_t first = 0; first < g.signal.length; first += kPieces * kPiece) {
    double sums[kPieces];
    const int64_t left = g.signal.length - first, pieces = min64(kPieces, (left + kPiece - 1) / kPiece);
    run(team, pieces, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t piece = begin; piece < end; ++piece) {
        double sum = 0.0;
        const int64_t until = first + min64(left, (piece + 1) * kPiece);
        for (int64_t n = first + piece * kPiece; n < until;) {
          Vec some = vzero();
          for (const int64_t stop = min64(until, n + 256); n < stop; n += kLanes)
            some = vfma(g.read(n), x.read(history + n), some);
          float lanes[kLanes];
          vstore(lanes, some);
          for (int c = 0; c < kLanes; ++c) sum += lanes[c];
        }
        sums[piece] = sum;
      }
    });
    for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece];
  }
  return total;
}

// The sums of the spectra in d become the gradients of the taps.
static void store_taps(const long_conv::Backward& t, const Scratch& scratch) {
  const Plan& plan = *t.plan;
  const Vec scale = vset(1.0f / static_cast<float>(plan.size));
  const Places places{scratch.a, nullptr, nullptr, scratch.d, false};
  work_on_rows<Step::restore>(scratch, places);
  float first = 0.0f;  // lag 0 is the first tap of both directions
  store_rows(scratch, scratch.a, t.taps.count, [&](int64_t n, int64_t count, const float* numbers) {
    for (int64_t c = 0; c < count; c += kLanes)
      store_some(t.grad_causal + n + c, vmul(scale, vload(numbers + c)), t.taps.count - n - c);
    if (n == 0) first = t.grad_causal[0];
  });
  if (!t.taps.anti) return;
  work_on_rows<Step::restore_imaginary>(scratch, places);
  store_rows(scratch, scratch.a, plan.size, [&](int64_t n, int64_t count, const float* numbers) {
    for (int64_t c = 0; c < count; ++c) {
      const int64_t lag = plan.size - n - c;
      if (lag < t.taps.count) t.grad_anti[lag] = -numbers[c] / static_cast<float>(plan.size);
    }
  });
  t.grad_anti[0] = first;
}

// Block i of the inputs, position i * size of the outputs: F being the product with the taps, grad_x is the real part
// of F^H (g_i + i g_(i+1)), for x reaches y of its own block through the real part of F and the next through the
// imaginary.
template <class T>
static void backward_block(const long_conv::Backward& t, int64_t batch, int64_t block, bool fresh, const float* k,
                           const Scratch& scratch) {
  const Plan& plan = *t.plan;
  const int64_t total = t.history + t.length, begin = t.history + block;
  const Gated<T> x{{t.u, batch, total}, {t.pre_gate, batch, total}};
  const Gated<T> g{{t.grad_out, batch, t.length}, {t.post_gate, batch, t.length}};
  const Sequence<T> grad_u(t.grad_u, batch, total), grad_pre(t.grad_pre, batch, total);
  const Sequence<T> grad_post(t.grad_post, batch, t.length);
  const bool wants_x = grad_u.data || grad_pre.data, wants_taps = t.grad_causal != nullptr, skips = t.skip != 0.0f;
  const Vec skip = vset(t.skip);
  // In one block the spectrum of x gives the outputs again.
  const bool alone = t.history == 0 && t.length <= plan.size, with_outputs = grad_post.data && alone;
  const int64_t outputs = min64(plan.size, t.length - block);
  const auto take_outputs = [&](int64_t n, int64_t count, const float* numbers) {
    for (int64_t c = n; c < n + count; c += kLanes, numbers += kLanes) {
      Vec y = vload(numbers);
      if (skips) y = vfma(skip, x.read(begin + c), y);
      grad_post.write(block + c, vmul(y, g.signal.read(block + c)));
    }
  };

  if (wants_x || wants_taps || with_outputs) {
    const bool spills = block < 0 || block + plan.size < t.length;
    load_sequence(scratch, g, block, spills ? 1.0f : 0.0f, plan.size, scratch.a);
    if (wants_taps || with_outputs) load_sequence(scratch, x, begin, 0.0f, 0, scratch.b);
    const Places places{scratch.a, scratch.b, k, scratch.d, fresh};
    if (with_outputs) {
      work_on_rows<Step::gradients>(scratch, places);
      store_rows(scratch, scratch.b, outputs, take_outputs);
    } else if (!wants_x) {
      work_on_rows<Step::taps>(scratch, places);
    } else if (wants_taps) {
      work_on_rows<Step::gradient>(scratch, places);
    } else {
      work_on_rows<Step::correlate>(scratch, places);
    }
  }
  if (wants_x)
    store_rows(scratch, scratch.a, outputs, [&](int64_t n, int64_t count, const float* numbers) {
      if (!skips && !grad_pre.data && !x.gate.data && grad_u.holds(begin + n, count)) {
        T* target = grad_u.data + begin + n;
        for (int64_t c = 0; c < count; c += kLanes) store_full(target + c, vload(numbers + c));
        return;
      }
      for (int64_t c = n; c < n + count; c += kLanes, numbers += kLanes) {
        Vec grad_x = vload(numbers);
        if (skips) grad_x = vfma(skip, g.read(block + c), grad_x);
        if (grad_pre.data) grad_pre.write(begin + c, vmul(grad_x, x.signal.read(begin + c)));
        if (!grad_u.data) continue;
        if (x.gate.data) grad_x = vmul(grad_x, x.gate.read(begin + c));
        grad_u.write(begin + c, grad_x);
      }
    });
  if (grad_post.data && !alone && block >= 0) convolve_block(scratch, x, begin, outputs, k, take_outputs);
}

template <class T>
static void backward(const long_conv::Backward& t) {
  const Plan& plan = *t.plan;
  const Scratch scratch(plan, *t.team, true, t.scratch);
  const float* k = t.spectrum;
  const bool wants_k = t.grad_u.data || t.grad_pre.data || t.grad_post.data;
  if (!k && wants_k) {
    make_spectrum(scratch, t.taps, scratch.k);
    k = scratch.k;
  }
  bool fresh = true;
  double skip = 0.0;
  for (int64_t batch = t.batch_begin; batch < t.batch_end; ++batch) {
    if (t.grad_skip)
      skip +=
          inner_product<T>(*t.team, {{t.grad_out, batch, t.length}, {t.post_gate, batch, t.length}},
                           {{t.u, batch, t.history + t.length}, {t.pre_gate, batch, t.history + t.length}}, t.history);
    // Inputs that no tap reaches from any output.
    if (t.grad_u.data && t.history > plan.size)
      memset(static_cast<T*>(t.grad_u.data) + batch * t.grad_u.batch_stride, 0, (t.history - plan.size) * sizeof(T));
    for (int64_t block = t.history > 0 ? -plan.size : 0; block < t.length; block += plan.size) {
      backward_block<T>(t, batch, block, fresh, k, scratch);
      fresh = false;
    }
  }
  if (t.grad_skip) *t.grad_skip = static_cast<float>(skip);
  if (t.grad_causal) store_taps(t, scratch);
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
