// Merging of attention results on the avx512 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT merge_avx512
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_NAME "avx512"
#include "core/cpu/simd.h"

#include "attention_merge/body.h"

const effkern::attention_merge::Kernels& effkern::attention_merge::kernels_avx512(Dtype dtype) {
  return merge_avx512::kernels_for(dtype);
}
#endif
