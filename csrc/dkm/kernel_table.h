// The entry points of a unit, for every dtype. Included last.
#pragma once

#include "dkm/backward_body.h"
#include "dkm/codes_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

// Calls `function<T, Block>` of the arithmetic that the chunk's numbers need.
#define EFFKERN_BY_BLOCK(mild, function, ...)           \
  switch (chunk.dim) {                                  \
    case 1:                                             \
      if (mild) return function<T, Mild>(__VA_ARGS__);  \
      return function<T, Sharp<1>>(__VA_ARGS__);        \
    case 2: return function<T, Sharp<2>>(__VA_ARGS__);  \
    default: return function<T, Sharp<4>>(__VA_ARGS__); \
  }

template <class T>
static void accumulate(const dkm::Chunk& chunk, const dkm::Centroids& before, double* sums) {
  EFFKERN_BY_BLOCK(before.mild, accumulate_chunk, chunk, before, sums)
}

template <class T>
static void emit(const dkm::Chunk& chunk, const dkm::Centroids& before, const float* after, void* out) {
  EFFKERN_BY_BLOCK(before.mild, emit_chunk, chunk, before, after, out)
}

template <class T>
static void collect(const dkm::Chunk& chunk, const dkm::Centroids& before, double* sums) {
  EFFKERN_BY_BLOCK(before.mild, collect_chunk, chunk, before, sums)
}

template <class T, class Block, bool kFused>
static void reverse_step(const dkm::Chunk& chunk, const dkm::Step& step, T* out, double* sums) {
  if (step.last) return reverse_chunk<T, Block, true, kFused>(chunk, step, out, sums);
  reverse_chunk<T, Block, false, kFused>(chunk, step, out, sums);
}

template <class T, class Block>
static void reverse_block(const dkm::Chunk& chunk, const dkm::Step& step, void* out, double* sums) {
  // A 16-bit number would be rounded between the iterations.
  if constexpr (sizeof(T) == sizeof(float))
    if (out) return reverse_step<T, Block, true>(chunk, step, static_cast<T*>(out), sums);
  reverse_step<T, Block, false>(chunk, step, nullptr, sums);
}

template <class T>
static void reverse(const dkm::Chunk& chunk, const dkm::Step& step, void* out, double* sums) {
  EFFKERN_BY_BLOCK(step.before.mild, reverse_block, chunk, step, out, sums)
}

template <class T>
static void gradient(const dkm::Chunk& chunk, const dkm::Step* steps, int64_t count, void* out) {
  bool mild = true;
  for (int64_t t = 0; t < count; ++t) mild = mild && steps[t].before.mild;
  EFFKERN_BY_BLOCK(mild, gradient_chunk, chunk, steps, count, out)
}

template <class T>
struct KernelTable {
  static constexpr dkm::Kernels value = {"dkm:cpu/" EFFKERN_UNIT_NAME "/stream",
                                         "dkm:cpu/" EFFKERN_UNIT_NAME "/codes",
                                         "dkm_backward:cpu/" EFFKERN_UNIT_NAME "/stream",
                                         "dkm_backward:cpu/" EFFKERN_UNIT_NAME "/codes",
                                         scratch_floats,
                                         range_chunk<T>,
                                         accumulate<T>,
                                         emit<T>,
                                         collect<T>,
                                         reverse<T>,
                                         gradient<T>,
                                         widen_numbers<T>,
                                         narrow_numbers<T>,
                                         sum_by_code<T>,
                                         gradient_by_code<T>};
};

static const dkm::Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return KernelTable<Bf16>::value;
    case Dtype::fp16: return KernelTable<Fp16>::value;
    default: return KernelTable<float>::value;
  }
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern
