// Products with palettised weights on the avx2 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT palettized_avx2
#define EFFKERN_UNIT_AVX2 1
#define EFFKERN_UNIT_NAME "avx2"
#include "core/cpu/simd.h"

#include "palettized_linear/body.h"

const effkern::palettized_linear::Kernels& effkern::palettized_linear::kernels_avx2(Dtype dtype) {
  return palettized_avx2::kernels_for(dtype);
}
#endif
