// Products with palettised weights on the avx512 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT palettized_avx512
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_NAME "avx512"
#include "core/cpu/simd.h"

#include "palettized_linear/body.h"

const effkern::palettized_linear::Kernels& effkern::palettized_linear::kernels_avx512(Dtype dtype) {
  return palettized_avx512::kernels_for(dtype);
}
#endif
