// Monarch products on the avx2 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT monarch_avx2
#define EFFKERN_UNIT_AVX2 1
#define EFFKERN_UNIT_NAME "avx2"
#include "core/cpu/simd.h"

#include "monarch/kernel_table.h"

const effkern::monarch::Kernels& effkern::monarch::kernels_avx2(Dtype dtype) {
  return monarch_avx2::kernels_for(dtype);
}
#endif
