// Attention on the avx2 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT unit_avx2
#define EFFKERN_UNIT_AVX2 1
#define EFFKERN_UNIT_NAME "avx2"
#include "core/cpu/simd.h"

#include "attention/unit_fp32.h"

const effkern::attention::Kernels& effkern::attention::kernels_avx2(Dtype dtype) {
  return unit_avx2::kernels_for(dtype);
}
#endif
