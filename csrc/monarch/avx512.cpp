// Monarch products on the avx512 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT monarch_avx512
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_NAME "avx512"
#include "core/cpu/simd.h"

#include "monarch/kernel_table.h"

const effkern::monarch::Kernels& effkern::monarch::kernels_avx512(Dtype dtype) {
  return monarch_avx512::kernels_for(dtype);
}
#endif
