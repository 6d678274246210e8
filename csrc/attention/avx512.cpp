// Attention on the avx512 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT unit_avx512
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_NAME "avx512"
#include "core/cpu/simd.h"

#include "attention/unit_fp32.h"

const effkern::attention::Kernels& effkern::attention::kernels_avx512(Dtype dtype) {
  return unit_avx512::kernels_for(dtype);
}
#endif
