// Products with palettised weights of bf16 on the avx512_bf16 level.
#if defined(__x86_64__)
#define EFFKERN_UNIT palettized_avx512_bf16
#define EFFKERN_UNIT_AVX512 1
#define EFFKERN_UNIT_BF16 1
#define EFFKERN_UNIT_NAME "avx512_bf16"
#include "core/cpu/simd.h"

#include "palettized_linear/bf16_body.h"

const effkern::palettized_linear::PairKernels& effkern::palettized_linear::pair_kernels_avx512_bf16(Dtype out) {
  return palettized_avx512_bf16::pair_kernels_for(out);
}
#endif
