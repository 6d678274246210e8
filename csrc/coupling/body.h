// The arithmetic between the sub-blocks of reversible networks, one pass over memory:
//   out = beta y + sign R(f + alpha x),  kept = keep x
// R rounds to a grid or does nothing. Every product and every sum is rounded by itself (the build forbids fused ones
// here), so that all levels have the bits of PyTorch's multiplication and addition, and an inverse those of its
// forward.
#pragma once

#include "core/cpu/simd.h"
#include "coupling/kernel.h"

namespace effkern {
namespace EFFKERN_UNIT {

using coupling::Operand;
using coupling::Stretch;
using coupling::Target;

// Numbers that are widened, coupled and narrowed at a time: all of them stay in the first cache.
constexpr int64_t kBlock = 512;

template <class T>
EFFKERN_INLINE void widen_block(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) vstore(to + i, load_some(from + i, count - i));
}

template <class T>
EFFKERN_INLINE void narrow_block(const float* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes) store_some(to + i, vload(from + i), count - i);
}

// `count` numbers from `at` on in fp32: where they lie, or widened into `room`.
EFFKERN_INLINE const float* read_block(const Operand& t, int64_t at, int64_t count, float* room) {
  if (!t.data) return nullptr;
  switch (t.dtype) {
    case Dtype::bf16: widen_block(static_cast<const Bf16*>(t.data) + at, count, room); return room;
    case Dtype::fp16: widen_block(static_cast<const Fp16*>(t.data) + at, count, room); return room;
    default: return static_cast<const float*>(t.data) + at;
  }
}

// Where to put numbers in fp32 from `at` on: in their place, or into `room` for `finish_block` to narrow.
EFFKERN_INLINE float* begin_block(const Target& t, int64_t at, float* room) {
  return t.dtype == Dtype::fp32 ? static_cast<float*>(t.data) + at : room;
}

EFFKERN_INLINE void finish_block(const Target& t, int64_t at, int64_t count, const float* room) {
  if (t.dtype == Dtype::bf16) narrow_block(room, count, static_cast<Bf16*>(t.data) + at);
  if (t.dtype == Dtype::fp16) narrow_block(room, count, static_cast<Fp16*>(t.data) + at);
}

// Running largest magnitudes. The maximum of a vector drops NaN, so that is kept apart.
struct Largest {
  Vec top, nan;
};

template <bool kY, bool kX, bool kGrid>
static void couple_block(const Stretch& t, const float* f, const float* y, const float* x, int64_t count, float* out,
                         Largest* largest) {
  const Vec alpha = vset(t.alpha), beta = vset(t.beta), sign = vset(t.sign), up = vset(t.up), down = vset(t.down);
  Vec top = largest->top, nan = largest->nan;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t width = min64(kLanes, count - i);
    Vec sum = load_some(f + i, width);
    if constexpr (kX) sum = vadd(sum, vmul(alpha, load_some(x + i, width)));
    if constexpr (kGrid) sum = vmul(vround(vmul(sum, up)), down);
    sum = vmul(sign, sum);
    if constexpr (kY) sum = vadd(vmul(beta, load_some(y + i, width)), sum);
    store_some(out + i, sum, width);
    if constexpr (kGrid) {
      // Read again at the end: what alpha or beta made of the padding does not count.
      const Vec seen = width < kLanes ? load_some(out + i, width) : sum;
      const Vec magnitude = vmax(vsub(vzero(), seen), seen);
      top = vmax(magnitude, top);
      nan = select_greater(magnitude, vset(-1.0f), nan, magnitude);
    }
  }
  *largest = {top, nan};
}

using BlockKernel = void (*)(const Stretch&, const float*, const float*, const float*, int64_t, float*, Largest*);

template <bool kY, bool kX>
EFFKERN_INLINE BlockKernel pick_grid(bool grid) {
  return grid ? couple_block<kY, kX, true> : couple_block<kY, kX, false>;
}

EFFKERN_INLINE BlockKernel pick_block(const Stretch& t) {
  if (t.y.data) return t.x.data ? pick_grid<true, true>(t.grid) : pick_grid<true, false>(t.grid);
  return t.x.data ? pick_grid<false, true>(t.grid) : pick_grid<false, false>(t.grid);
}

static float couple(const Stretch& t) {
  float f_room[kBlock], y_room[kBlock], x_room[kBlock], room[kBlock];
  const BlockKernel block = pick_block(t);
  Largest largest = {vzero(), vzero()};
  for (int64_t at = t.begin; at < t.end; at += kBlock) {
    const int64_t count = min64(kBlock, t.end - at);
    const float* x = read_block(t.x, at, count, x_room);
    float* out = begin_block(t.out, at, room);
    block(t, read_block(t.f, at, count, f_room), read_block(t.y, at, count, y_room), x, count, out, &largest);
    finish_block(t.out, at, count, room);
    if (!t.kept.data) continue;
    float* kept = begin_block(t.kept, at, room);
    for (int64_t i = 0; i < count; i += kLanes)
      store_some(kept + i, vmul(vset(t.keep), load_some(x + i, count - i)), count - i);
    finish_block(t.kept, at, count, room);
  }
  float tops[kLanes], nans[kLanes], found = 0.0f;
  vstore(tops, largest.top);
  vstore(nans, largest.nan);
  for (int i = 0; i < kLanes; ++i) {
    if (nans[i] != nans[i]) return nans[i];
    if (tops[i] > found) found = tops[i];
  }
  return found;
}

static constexpr coupling::Kernels kKernels = {"coupling:cpu/" EFFKERN_UNIT_NAME, couple};

}  // namespace EFFKERN_UNIT
}  // namespace effkern
