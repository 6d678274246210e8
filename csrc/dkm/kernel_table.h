// The entry points of a unit, for every dtype. Included last.
#pragma once

#include "dkm/backward_body.h"
#include "dkm/codes_body.h"

namespace effkern {
namespace EFFKERN_UNIT {

// Calls `function<T, D>` for the chunk's number of dimensions.
#define EFFKERN_BY_DIM(function, ...)            \
  switch (chunk.dim) {                           \
    case 1: return function<T, 1>(__VA_ARGS__);  \
    case 2: return function<T, 2>(__VA_ARGS__);  \
    default: return function<T, 4>(__VA_ARGS__); \
  }

template <class T>
static void accumulate(const dkm::Chunk& chunk, const float* before, float* sums) {
  EFFKERN_BY_DIM(accumulate_chunk, chunk, before, sums)
}

template <class T>
static void emit(const dkm::Chunk& chunk, const float* before, const float* after, void* out) {
  EFFKERN_BY_DIM(emit_chunk, chunk, before, after, out)
}

template <class T>
static void collect(const dkm::Chunk& chunk, const float* before, float* sums) {
  EFFKERN_BY_DIM(collect_chunk, chunk, before, sums)
}

template <class T, int D>
static void reverse_step(const dkm::Chunk& chunk, const dkm::Step& step, float* sums) {
  return step.last ? reverse_chunk<T, D, true>(chunk, step, sums) : reverse_chunk<T, D, false>(chunk, step, sums);
}

template <class T>
static void reverse(const dkm::Chunk& chunk, const dkm::Step& step, float* sums) {
  EFFKERN_BY_DIM(reverse_step, chunk, step, sums)
}

template <class T>
static void gradient(const dkm::Chunk& chunk, const dkm::Step* steps, int64_t count, void* out) {
  EFFKERN_BY_DIM(gradient_chunk, chunk, steps, count, out)
}

template <class T>
struct KernelTable {
  static constexpr dkm::Kernels value = {"dkm:cpu/" EFFKERN_UNIT_NAME "/stream",
                                         "dkm:cpu/" EFFKERN_UNIT_NAME "/codes",
                                         "dkm_backward:cpu/" EFFKERN_UNIT_NAME "/stream",
                                         "dkm_backward:cpu/" EFFKERN_UNIT_NAME "/codes",
                                         scratch_floats,
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
