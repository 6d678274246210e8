// Merging attention over disjoint sets of keys, one pass over memory each way:
//   l = log sum_k e^(l_k),  o = sum_k w_k o_k  with  w_k = e^(l_k - l)
//   do_k = w_k do,  dl_k = w_k (do . (o_k - o) + dl)
#pragma once

#include "attention_merge/kernel.h"
#include "core/cpu/simd.h"

namespace effkern {
namespace EFFKERN_UNIT {

using attention_merge::Backward;
using attention_merge::Forward;

// The weight of a part. A row that no part saw has l = -inf and no weights; a part that saw nothing weighs 0, whatever
// its output holds.
EFFKERN_INLINE float weight_of(float part, float lse) { return part == -INFINITY ? 0.0f : expf(part - lse); }

template <class T>
static void forward(const Forward& t) {
  for (int64_t row = t.begin; row < t.end; ++row) {
    float top = -INFINITY, total = 0.0f;
    for (int64_t k = 0; k < t.parts; ++k) {
      const float part = t.lses[k][row];
      if (!(part <= top)) top = part;  // NaN included: it has to come out
    }
    if (top == -INFINITY || top == INFINITY) {
      total = 1.0f;  // nothing seen; or an infinite logit, beside which nothing else counts
    } else {
      for (int64_t k = 0; k < t.parts; ++k) total += expf(t.lses[k][row] - top);
    }
    const float lse = top + logf(total);
    t.lse[row] = lse;
    T* out = static_cast<T*>(t.out) + row * t.dim;
    for (int64_t d = 0; d < t.dim; d += kLanes) {
      const int64_t width = min64(kLanes, t.dim - d);
      Vec sum = vzero();
      for (int64_t k = 0; k < t.parts; ++k) {
        if (t.lses[k][row] == -INFINITY) continue;
        const T* part = static_cast<const T*>(t.outs[k]) + row * t.dim + d;
        sum = vfma(load_some(part, width), vset(weight_of(t.lses[k][row], lse)), sum);
      }
      store_some(out + d, sum, width);
    }
  }
}

EFFKERN_INLINE float sum_of(Vec x) {
  float lanes[kLanes], total = 0.0f;
  vstore(lanes, x);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

template <class T>
static void backward(const Backward& t) {
  for (int64_t row = t.begin; row < t.end; ++row) {
    const T* grad_out = static_cast<const T*>(t.grad_out) + row * t.dim;
    const T* out = static_cast<const T*>(t.out) + row * t.dim;
    for (int64_t k = 0; k < t.parts; ++k) {
      const float weight = weight_of(t.lses[k][row], t.lse[row]);
      const T* part = static_cast<const T*>(t.outs[k]) + row * t.dim;
      T* grad_part = static_cast<T*>(t.grad_outs[k]) + row * t.dim;
      Vec dot = vzero();
      for (int64_t d = 0; d < t.dim; d += kLanes) {
        const int64_t width = min64(kLanes, t.dim - d);
        const Vec grad = load_some(grad_out + d, width);
        store_some(grad_part + d, weight == 0.0f ? vzero() : vmul(grad, vset(weight)), width);
        dot = vfma(grad, vsub(load_some(part + d, width), load_some(out + d, width)), dot);
      }
      const float grad_lse = t.grad_lse ? t.grad_lse[row] : 0.0f;
      t.grad_lses[k][row] = weight == 0.0f ? 0.0f : weight * (sum_of(dot) + grad_lse);
    }
  }
}

template <class T>
struct KernelTable {
  static constexpr attention_merge::Kernels value = {"attention_merge:cpu/" EFFKERN_UNIT_NAME,
                                                     "attention_merge_backward:cpu/" EFFKERN_UNIT_NAME, forward<T>,
                                                     backward<T>};
};

static const attention_merge::Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return KernelTable<Bf16>::value;
    case Dtype::fp16: return KernelTable<Fp16>::value;
    default: return KernelTable<float>::value;
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
