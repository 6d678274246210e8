// Merging of attention results on the avx2 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT merge_avx2
#define EFFKERN_UNIT_AVX2 1
#define EFFKERN_UNIT_NAME "avx2"
#include "core/cpu/simd.h"

#include "attention_merge/body.h"

const effkern::attention_merge::Kernels& effkern::attention_merge::kernels_avx2(Dtype dtype) {
  return merge_avx2::kernels_for(dtype);
}
#endif
