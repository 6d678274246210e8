// Long convolutions on the avx2 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT long_conv_avx2
#define EFFKERN_UNIT_AVX2 1
#define EFFKERN_UNIT_NAME "avx2"
#include "core/cpu/simd.h"

#include "long_conv/kernel_table.h"

const effkern::long_conv::Kernels& effkern::long_conv::kernels_avx2(Dtype dtype) {
  return long_conv_avx2::kernels_for(dtype);
}
#endif
