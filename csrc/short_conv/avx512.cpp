// The short convolution on the avx512 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT short_conv_avx512
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_NAME "avx512"
#include "core/cpu/simd.h"

#include "short_conv/kernel_table.h"

const effkern::short_conv::Kernels& effkern::short_conv::kernels_avx512(Dtype dtype) {
  return short_conv_avx512::kernels_for(dtype);
}
#endif
